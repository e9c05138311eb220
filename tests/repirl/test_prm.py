"""An exported PRM says how its rewards are read, and read by nothing but its folder they are those of training."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import make_model, tiny_values
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
)

from repirl.batch import pack
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.cli import main
from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.data.experts import load_experts
from repirl.data.prompts import encode_prompt
from repirl.dataconfig import DataConfig
from repirl.export import export_checkpoint
from repirl.models import load_tokenizer
from repirl.options import PRMConfig
from repirl.prm import PRMDescription, PromptFormat, load_prm
from repirl.rewards import read_rewards
from repirl.run import build

README = Path(__file__).parents[2] / "README.md"
REWARDS = ("value", "logit", "soft_q", "logprob", "implicit")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROMPT = {
    "chat_template": False,
    "prompt_template": "1+{prompt}",
    "system": None,
    "chat_template_kwargs": {},
    "end_tokens": None,
}


def train_and_export(folder, reward, *, adapters):
    """A run of two turns by the command line, and its export; nothing has its default that the description tells."""
    base = make_model(folder / "model")
    # What a model says that a run starts from, such as another export, is not what the run's own export says.
    config = AutoConfig.from_pretrained(base)
    config.repirl = {"format": 0, "role": "stale"}
    config.save_pretrained(base)
    values = tiny_values(
        folder,
        steps=2,
        prm={"reward": reward, "beta": 0.5, "gamma": 0.9, "optimizer": {"lr": 0.02}},
        data={"prompt_template": "1+{prompt}"},
        rollout={"temperature": 0.7},
        irl={"use_outcome": False},
        eval={"every": 0},
        checkpoint={"every": 2},
        adapters={"rank": 4} if adapters else None,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    assert main(["export", "--checkpoint", values["output_dir"], "--output", str(folder / "out")]) == 0
    return SimpleNamespace(config=build_config(values), out=folder / "out", folder=folder)


@pytest.fixture(scope="module")
def implicit(tmp_path_factory):
    return train_and_export(tmp_path_factory.mktemp("implicit"), "implicit", adapters=False)


@pytest.fixture(scope="module")
def value(tmp_path_factory):
    return train_and_export(tmp_path_factory.mktemp("value"), "value", adapters=False)


def ids_of(config):
    """The experts' pairs of token ids, as training has them; the last is a beginning only."""
    pairs = [(e.prompt_ids, e.response_ids) for e in load_experts(config.data, load_tokenizer(config.policy.model))]
    return [*pairs[:7], (pairs[7][0], pairs[7][1][:3])]


def texts_of(config):
    rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    return [(row["prompt"], row["solution"]) for row in rows]


def training_rewards(config, pairs):
    """What the run itself reads, from its checkpoint."""
    run = build(config)
    run.restore(resolve_checkpoint(config.output_dir))
    batch = pack(pairs)
    if config.prm.reward == "implicit":
        run.reference.write(batch)
    rewards = read_rewards(run.learners["prm"].score(batch), batch, config.prm)
    run.close()
    return run, rewards.split(batch.response_cu_seqlens.diff().tolist())


def assert_close(actual, expected):
    assert [f.shape for f in actual] == [e.shape for e in expected]
    assert all(f.dtype == torch.float32 and f.device.type == "cpu" for f in actual)
    torch.testing.assert_close(torch.cat(list(actual)), torch.cat(list(expected)), **CLOSE)


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("reward", REWARDS)
def test_rewards_of_an_export_are_those_of_training(tmp_path, reward, adapters):
    made = train_and_export(tmp_path, reward, adapters=adapters)
    pairs = ids_of(made.config)
    run, expected = training_rewards(made.config, pairs)
    prm = load_prm(made.out / "prm", device="cpu")
    actual = prm.rewards(pairs)
    assert_close(actual, expected)
    # Of a PRM that has learned something.
    assert float(torch.cat(actual).std()) > 1e-3
    assert prm.description.temperature == run.learners["prm"].temperature
    # In float32 at most rounding depends on what else there is, and on how it is cut.
    assert_close([prm.rewards([pair])[0] for pair in pairs], expected)
    small = load_prm(made.out / "prm", device="cpu", tokens_per_microbatch=8)
    assert_close(small.rewards(pairs[::-1])[::-1], expected)


def test_the_description_says_all_and_stays_with_the_model(implicit, value, tmp_path):
    content = json.loads((implicit.out / "prm" / "config.json").read_text())["repirl"]
    assert content == {
        "format": 1,
        "role": "prm",
        "reward": "implicit",
        "beta": 0.5,
        "gamma": 0.9,
        "temperature": 1.0,
        "reference": {"model": implicit.config.policy.model, "gguf_file": None},
        "token": "action",
        "steps": {"rule": "separator", "separator": "; ", "score": "tokens", "aggregate": "mean"},
        "prompt": PROMPT,
        "calibration": None,
    }
    of_value = json.loads((value.out / "prm" / "config.json").read_text())["repirl"]
    assert of_value == {**content, "reward": "value", "reference": None}
    # Plain transformers load it, and what they save says the same.
    for made, kind in ((implicit, AutoModelForCausalLM), (value, AutoModelForTokenClassification)):
        model, info = kind.from_pretrained(made.out / "prm", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        again = tmp_path / kind.__name__
        model.save_pretrained(again)
        AutoTokenizer.from_pretrained(made.out / "prm").save_pretrained(again)
        pairs = ids_of(made.config)
        first, second = (load_prm(folder, device="cpu") for folder in (made.out / "prm", again))
        assert first.description == second.description
        assert torch.equal(torch.cat(first.rewards(pairs)), torch.cat(second.rewards(pairs)))
    # Steps as the caller has them.
    export_checkpoint(value.config.output_dir, tmp_path / "out", step_separator="; ")
    assert load_prm(tmp_path / "out" / "prm", device="cpu").description.steps.separator == "; "


def test_the_policy_says_how_it_was_sampled(value, tmp_path):
    content = json.loads((value.out / "policy" / "config.json").read_text())["repirl"]
    assert content == {"format": 1, "role": "policy", "temperature": 0.7, "prompt": PROMPT}
    # Offline the distribution itself is taught; and what ends a response is the tokenizer's token.
    base = make_model(tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    values = tiny_values(tmp_path, objective="sft", steps=1, rollout={"temperature": 0.7}, eval={"every": 0})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    [policy] = export_checkpoint(values["output_dir"], tmp_path / "out")
    assert json.loads((policy / "config.json").read_text())["repirl"]["temperature"] == 1.0
    assert GenerationConfig.from_pretrained(policy).eos_token_id == load_tokenizer(str(policy)).eos_token_id == 1


def test_texts_are_encoded_as_in_training(value):
    prm = load_prm(value.out / "prm", device="cpu")
    texts = texts_of(value.config)
    experts = load_experts(value.config.data, load_tokenizer(value.config.policy.model))
    as_ids = [(list(e.prompt_ids), list(e.response_ids)) for e in experts]
    assert prm.encode(texts) == as_ids
    # A prompt and a response may differ in kind, and lists of two are pairs as well.
    assert prm.encode([[texts[0][0], as_ids[0][1]], (as_ids[1][0], texts[1][1])]) == as_ids[:2]
    # One end token, whoever put it there; none for what is not finished.
    assert prm.encode([(texts[0][0], texts[0][1] + "<eos>")]) == as_ids[:1]
    assert prm.encode(texts, finished=False) == [(prompt, response[:-1]) for prompt, response in as_ids]
    cut = [(prompt, response[:-1]) for prompt, response in as_ids]
    assert_close(prm.rewards(texts, finished=False), prm.rewards(cut))
    assert prm.encode(cut) == cut
    assert prm.rewards([]) == []


def test_prompts_go_through_the_chat_template(tmp_path):
    folder = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    tokenizer.save_pretrained(folder)
    form = PromptFormat(chat_template=True, prompt_template="{prompt}-1", system="3+")
    prm = load_prm(folder, device="cpu", description=PRMDescription(reward="logprob", prompt=form))
    [(prompt, response)] = prm.encode([("4+5", "9")])
    assert tokenizer.decode(prompt).replace(" ", "") == "3+4+5-1="
    assert tuple(prompt) == encode_prompt("4+5", DataConfig(**form.model_dump()), tokenizer)
    assert response == [*tokenizer("9").input_ids, tokenizer.eos_token_id]


def test_a_plain_model_is_a_prm_by_its_logprobs(value):
    prm = load_prm(value.out / "policy", device="cpu", description=PRMDescription(reward="logprob", temperature=0.7))
    pairs = ids_of(value.config)
    model = AutoModelForCausalLM.from_pretrained(value.out / "policy")
    for (prompt, response), rewards in zip(pairs, prm.rewards(pairs), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / 0.7
        torch.testing.assert_close(
            rewards, logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0], **CLOSE
        )
    # In half precision it is the same model, roughly.
    half = load_prm(
        value.out / "policy", device="cpu", dtype=torch.bfloat16, description=PRMDescription(reward="logprob")
    )
    rough = torch.cat(half.rewards(pairs))
    assert rough.dtype == torch.float32
    exact = torch.cat(load_prm(value.out / "policy", device="cpu", description=half.description).rewards(pairs))
    assert 0 < float((rough - exact).abs().max()) < 0.5


def test_a_reference_that_moved_is_named_anew(implicit, value, tmp_path):
    pairs = ids_of(implicit.config)
    expected = load_prm(implicit.out / "prm", device="cpu").rewards(pairs)
    folder = shutil.copytree(implicit.out / "prm", tmp_path / "prm")
    moved = shutil.copytree(implicit.config.policy.model, tmp_path / "moved")
    change(folder, reference={"model": str(tmp_path / "gone"), "gguf_file": None})
    with pytest.raises(ConfigError, match=r"reference of the PRM .*gone.*give reference="):
        load_prm(folder, device="cpu")
    assert_close(load_prm(folder, device="cpu", reference=moved).rewards(pairs), expected)
    change(folder, reference=None)
    with pytest.raises(ConfigError, match="none is named: give reference="):
        load_prm(folder, device="cpu")
    assert_close(load_prm(folder, device="cpu", reference=moved).rewards(pairs), expected)
    with pytest.raises(ConfigError, match="'value' have none: leave it out"):
        load_prm(value.out / "prm", device="cpu", reference=moved)


def change(folder, **keys):
    """Change the description in a folder; a key that is `...` is removed."""
    content = json.loads((folder / "config.json").read_text())
    described = {**content["repirl"], **keys}
    content["repirl"] = {key: value for key, value in described.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"gamma": ..., "steps": ...}, ["lacks 'gamma', 'steps'", "export the PRM again"]),
        ({"format": 2}, ["has format 2", "reads format 1"]),
        ({"reward": "sum"}, ["wrong 'reward'", "'sum'", "'soft_q'"]),
        ({"prompt": {"chat_template": True}}, ["wrong 'prompt.prompt_template'", "required"]),
        ({"shape": 1}, ["wrong 'shape'"]),
        ({"reward": "logprob"}, ["'logprob'", "ForCausalLM", "Qwen3ForTokenClassification"]),
    ],
)
def test_a_wrong_description_is_refused(value, tmp_path, keys, parts):
    folder = shutil.copytree(value.out / "prm", tmp_path / "prm")
    change(folder, **keys)
    with pytest.raises(ConfigError) as error:
        load_prm(folder, device="cpu")
    assert all(part in str(error.value) for part in parts), error.value


def test_folders_that_are_no_prm_are_refused(value, tmp_path):
    plain = make_model(tmp_path / "model")
    for folder, message in [
        (plain, r"no key `repirl`.*older repirl.*description="),
        (value.out / "policy", r"is the policy of an export, no PRM: the PRM is '.*/prm'"),
        (value.out, r"is no model; the PRM of this export is '.*out/prm'"),
        (tmp_path / "nowhere", r"cannot load the PRM .*nowhere"),
        (resolve_checkpoint(value.config.output_dir) / "prm", "has format 0, this repirl reads format 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_prm(folder, device="cpu")
    with pytest.raises(ConfigError, match=r"'value'.*ForTokenClassification.*Qwen3ForCausalLM"):
        load_prm(plain, device="cpu", description=PRMDescription(reward="value"))
    with pytest.raises(ValueError, match="tokens_per_microbatch is 0, expected at least 1"):
        load_prm(value.out / "prm", device="cpu", tokens_per_microbatch=0)


@pytest.mark.parametrize(
    ("pairs", "kind", "message"),
    [
        ([("1+1=", "2"), ("1+2=", "")], ValueError, "pair 1: the response has no tokens"),
        ([([3], [])], ValueError, "pair 0: the response has no tokens"),
        ([([], [3])], ValueError, "pair 0: the prompt has no tokens"),
        (
            [([3], [4]), ([3, 18], [4])],
            ValueError,
            "pair 1: the prompt has the token id 18, .* vocabulary has 18 tokens",
        ),
        ([([3], [-1])], ValueError, "pair 0: the response has the token id -1"),
        ([([3], [4.0])], TypeError, r"pair 0: the response is \[4.0\], expected text or a list of token ids"),
        ([([3], [True])], TypeError, "pair 0: the response is"),
        ([([3], 4)], TypeError, "pair 0: the response is 4"),
        ([(None, "2")], TypeError, "pair 0: the prompt is None"),
        (("1+1=", "2"), TypeError, r"pair 0 is '1\+1=', expected \(prompt, response\)"),
        (["ab", "cd"], TypeError, "pair 0 is 'ab'"),
        ([("1+1=",)], TypeError, "pair 0 is"),
        ("1+1=2", TypeError, "pairs is a str, expected a list"),
        ([([3] * 30, [4] * 11)], ValueError, r"pair 0 has 41 tokens \(30 of the prompt, 11 .*window has 40"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(value, pairs, kind, message):
    prm = load_prm(value.out / "prm", device="cpu")
    prm.learner.model.config.max_position_embeddings = 40
    with pytest.raises(kind, match=message):
        prm.rewards(pairs)
    assert prm.rewards([([3] * 30, [4] * 10)])[0].shape == (10,)


def test_pairs_beyond_a_sliding_window_are_padded(value, tmp_path):
    folder = shutil.copytree(value.out / "prm", tmp_path / "prm")
    window = {"use_sliding_window": True, "sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]}
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | window))
    prm = load_prm(folder, device="cpu")
    assert prm.rewards([([3] * 6, [4] * 4)])[0].shape == (4,)
    assert prm.learner.model.packs
    # Longer than the window: padded by the model's own attention, which has one.
    pair = ([3, 4, 5, 6, 7, 8], [9, 4, 5, 6, 7])
    plain = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    expected = plain(torch.tensor([pair[0] + pair[1]])).logits[0, 6:, 0].detach()
    torch.testing.assert_close(prm.rewards([pair])[0], expected, atol=2e-5, rtol=1e-5)
    assert not prm.learner.model.packs


def test_the_example_in_the_readme_runs(value, monkeypatch, capsys):
    [code] = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "load_prm" in code]
    monkeypatch.chdir(value.folder)
    exec(compile(code, README.name, "exec"), {})
    assert capsys.readouterr().out


def test_kinds_of_rewards_are_those_of_the_configuration():
    assert PRMDescription.model_fields["reward"].annotation == PRMConfig.model_fields["reward"].annotation


def test_step_scores_are_mean_rewards_unless_the_file_says_otherwise(tmp_path):
    """A PRM of tokens scores a step by the mean of its tokens' rewards; the last one ends with the end token."""
    model = make_model(tmp_path / "model")
    rule = {"rule": "separator", "separator": "; "}
    pair = ("8+7-3=", "8+7=15; 15-3=12; #### 12")
    for aggregate, way in {
        "mean": torch.mean,
        "min": torch.amin,
        "product": torch.prod,
        "last": lambda x: x[-1],
    }.items():
        described = PRMDescription(reward="logprob", steps={**rule, "aggregate": aggregate})
        prm = load_prm(model, device="cpu", description=described)
        [reward], [scores] = prm.rewards([pair]), prm.step_scores([pair])
        expected = torch.stack([part.mean() for part in reward.split([7, 8, 4])])
        torch.testing.assert_close(scores, expected)
        assert prm.response_scores([pair]) == [pytest.approx(float(way(expected)))]
    assert prm.step_scores([]) == []
