"""PRMs of others give the step scores of their authors' code, as their model cards and TRL have it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
)

from repirl.apps.trained import Placed
from repirl.cli import main
from repirl.config import ConfigError
from repirl.foreign import QWEN_SYSTEM, load_foreign

STEPS = ["8 + 7 = 15", "15 - 3 = 12", "The answer is 12"]
PROBLEM = "What is 8 + 7 - 3?"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
}


def save_tokenizer(folder):
    """Of bytes, with a token for " -" and those of Qwen's chats and steps."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate([*alphabet, "Ġ-"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("Ġ", "-")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<extra_0>"]
    bpe.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_qwen(folder, labels=2):
    """As Qwen2ForProcessRewardModel saves itself, a class that only its repository has."""
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=300, eos_token_id=tokenizer.eos_token_id, **SHAPE)
    body = Qwen2Model(config)
    head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, labels))
    tensors = {f"model.{key}": value for key, value in body.state_dict().items()}
    tensors |= {f"score.{key}": value for key, value in head.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = config.to_dict() | {"architectures": ["Qwen2ForProcessRewardModel"], "dtype": "float32"}
    content["auto_map"] = {"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"}
    (folder / "config.json").write_text(json.dumps(content))
    return tokenizer, body.eval(), head


@torch.no_grad()
def qwen_scores(tokenizer, body, head):
    messages = [
        {"role": "system", "content": QWEN_SYSTEM},
        {"role": "user", "content": PROBLEM},
        {"role": "assistant", "content": "<extra_0>".join(STEPS) + "<extra_0>"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    chances = head(body(ids).last_hidden_state).softmax(-1)[0]
    return chances[ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>"), 1].tolist()


def test_qwen_math_prm_scores_its_tags_by_a_head_of_two_layers(tmp_path):
    expected = qwen_scores(*make_qwen(tmp_path))
    assert len(expected) == 3
    prm = load_foreign(str(tmp_path), "qwen-math-prm", device="cpu")
    # Steps end with a blank line, in text.
    [scores] = prm.step_scores([(PROBLEM, "\n\n".join(STEPS) + "\n\n")])
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert prm.response_scores([(PROBLEM, "\n\n".join(STEPS))]) == pytest.approx([min(expected)], abs=1e-5)


def test_math_shepherd_scores_the_sign_behind_each_step(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=300, eos_token_id=257, head_dim=8, **SHAPE)).eval()
    model.save_pretrained(tmp_path)
    numbered = [f"Step {number}: {step}" for number, step in enumerate(STEPS, 1)]
    text = f"{PROBLEM} " + "\n".join(f"{step} ки" for step in numbered)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    good, bad = tokenizer.encode("+ -", add_special_tokens=False)
    with torch.no_grad():
        chances = model(ids).logits[0][:, [good, bad]].softmax(-1)[:, 0]
    expected = chances[ids[0] == tokenizer.encode("ки")[-1]].tolist()
    assert len(expected) == 3
    prm = load_foreign(str(tmp_path), "math-shepherd", device="cpu")
    for response in ("\n".join(STEPS), "\n".join(numbered)):
        [scores] = prm.step_scores([(PROBLEM, response)])
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_classifiers_have_one_or_two_labels(tmp_path, labels, bias):
    tokenizer = save_tokenizer(tmp_path)
    torch.manual_seed(labels)
    config = LlamaConfig(vocab_size=300, eos_token_id=257, num_labels=labels, **SHAPE)
    model = LlamaForTokenClassification(config).eval()
    with torch.no_grad():
        model.score.bias.normal_() if bias else model.score.bias.zero_()
    model.save_pretrained(tmp_path)
    if not bias:
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["score.bias"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = tokenizer(PROBLEM + "".join(step + "\n" for step in STEPS), return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0][ids[0] == tokenizer.encode("\n")[0]]
    expected = logits[:, 0].sigmoid() if labels == 1 else logits.softmax(-1)[:, 1]
    [scores] = load_foreign(str(tmp_path), "classifier", device="cpu").step_scores([(PROBLEM, "\n".join(STEPS))])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_commands_read_them_too(tmp_path, capsys):
    (model := tmp_path / "model").mkdir()
    expected = qwen_scores(*make_qwen(model))
    rows = [
        {"prompt": PROBLEM, "steps": STEPS, "label": 1},
        {"prompt": PROBLEM, "response": "\n".join(STEPS), "label": -1},
        {"prompt": PROBLEM, "response": " # ".join(STEPS), "label": -1},
    ]
    prm = ["--prm", str(model), "--convention", "qwen-math-prm", "--device", "cpu"]
    for number, (row, split) in enumerate(zip(rows, ([], ["newline"], ["tag:#"]), strict=True)):
        (tmp_path / "in.jsonl").write_text(json.dumps(row))
        out = tmp_path / f"{number}.jsonl"
        arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(out), *["--split", *split] * bool(split)]
        assert main(["score", *prm, *arguments]) == 0
        scored = json.loads(out.read_text())
        assert scored["step_scores"] == pytest.approx(expected, abs=1e-5)
        assert scored["score"] == min(scored["step_scores"])
    (tmp_path / "in.jsonl").write_text(json.dumps({"problem": PROBLEM, "steps": STEPS, "label": 1}))
    assert main(["localize", *prm, "--input", str(tmp_path / "in.jsonl")]) == 0
    assert "0.5" in capsys.readouterr().out
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROBLEM, "steps": ["1<extra_0>2", "3"]}))
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "no.jsonl")]
    assert main(["score", *prm, *arguments]) == 2
    assert "line 1: the tag '<extra_0>', which the PRM scores behind each of the 2 steps, is read 3 times" in (
        capsys.readouterr().err
    )


def test_models_of_another_convention_are_refused(tmp_path):
    (qwen := tmp_path / "qwen").mkdir()
    make_qwen(qwen)
    with pytest.raises(ConfigError, match=r"classifier expects one linear head .* holds score.0.bias \[32\]"):
        load_foreign(str(qwen), "classifier", device="cpu")
    (three := tmp_path / "three").mkdir()
    make_qwen(three, labels=3)
    with pytest.raises(ConfigError, match="expects a head `score` of two layers with two labels"):
        load_foreign(str(three), "qwen-math-prm", device="cpu")
    tensors = load_file(qwen / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, qwen / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 'model.layers.1.mlp.up_proj.weight': they are not complete"):
        load_foreign(str(qwen), "qwen-math-prm", device="cpu")
    with pytest.raises(ConfigError, match="--convention is 'qwen', expected one of classifier, qwen-math-prm"):
        Placed(convention="qwen")
    with pytest.raises(ConfigError, match="--convention is 'qwen'"):
        load_foreign(str(qwen), "qwen")
    with pytest.raises(ConfigError, match="--reference x: rewards by --convention have none"):
        Placed(convention="classifier", reference="x")
