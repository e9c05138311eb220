"""A run that goes on is the same experiment, or says what is not."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import tiny_values
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from repirl.checkpoint import fingerprints as fingerprinting
from repirl.checkpoint.fingerprints import fingerprint_model, fingerprint_rows, fingerprint_tokenizer
from repirl.checkpoint.identity import BY_CONTENT, FREE, is_within, option_names
from repirl.checkpoint.manifest import list_checkpoints
from repirl.cli import main
from repirl.config import Config
from repirl.configfile import build_config, load_config
from repirl.data import Data
from repirl.data.load import rows_by_option
from repirl.data.prompts import Prompt
from repirl.dataconfig import DataConfig, SourceConfig
from repirl.report.log import read_metrics
from repirl.run import build

# What changes what is learned, which --changed has to name; a section stands for all of its options. With FREE and
# BY_CONTENT these are all options: whoever adds one says here or there what it is.
MEANING = [
    *("objective", "seed", "steps", "dtype", "compute_dtype", "order", "adapters"),
    *("loss", "irl", "prime", "discriminator", "iq", "dpo", "dqo", "step_prm", "rollout.filter"),
    *(f"verifier.{name}" for name in ("kind", "function", "timeout_seconds")),
    *(f"verifier.code.{name}" for name in ("test_seconds", "memory_mb", "float_tolerance")),
    *(f"verifier.code.{name}" for name in ("partial_credit", "checker")),
    *(f"verifier.code.max_{name}" for name in ("processes", "open_files", "file_mb", "output_kb")),
    *("rollout.prompts_per_step", "rollout.samples_per_prompt", "rollout.max_response_tokens"),
    *("rollout.temperature", "rollout.overlap"),
    *(f"data.{name}" for name in ("chat_template", "system", "chat_template_kwargs", "prompt_template", "end_tokens")),
    *(f"prm.{name}" for name in ("reward", "gamma", "beta", "reference", "warmup_turns")),
    *(
        f"{learner}.{option}"
        for learner in ("policy", "prm", "critic")
        for option in (
            "updates_per_step",
            *(f"optimizer.{name}" for name in ("lr", "betas", "eps", "weight_decay", "head_lr", "head_updates")),
            *(f"optimizer.{name}" for name in ("warmup_steps", "schedule", "max_grad_norm", "state_bits")),
        )
    ),
]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, data, my.yaml and a run of one turn, whose experts have been read by the reference."""
    folder = tmp_path_factory.mktemp("trained")
    values = tiny_values(
        folder,
        output_dir="run",
        steps=1,
        prm={"reward": "implicit"},
        irl={"experts": "all", "experts_per_step": 24},
        eval={"every": 0},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    # Relative, so that the folder can be copied.
    values["policy"]["model"] = "model"
    values["data"] = {name: Path(value).name for name, value in values["data"].items()}
    (folder / "my.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--config", "my.yaml"]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of that folder, which is the working directory."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def resume(*arguments, config=("--config", "my.yaml")):
    return main(["train", *config, "--resume", "--steps", "2", *arguments])


def refusal(capsys, *arguments):
    """Resume, expect exit code 2 and one line on stderr, nothing done; returns that line."""
    capsys.readouterr()
    assert resume(*arguments) == 2
    assert [path.name for path in list_checkpoints("run/checkpoints")] == ["step_1"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def rewrite(name, change):
    """Change the list of rows of a JSON lines file."""
    rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in change(rows)))


def without_norms():
    """The model as a Llama of equal shapes: the norms of queries and keys are dropped."""
    model = AutoModelForCausalLM.from_pretrained("model")
    weights = {name: w for name, w in model.state_dict().items() if "q_norm" not in name and "k_norm" not in name}
    kept = LlamaConfig().to_dict().keys() - {"model_type", "architectures"}
    llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k in kept}))
    llama.load_state_dict(weights)
    llama.save_pretrained("model")


def other_weights():
    tensors = load_file("model/model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, "model/model.safetensors", {"format": "pt"})


def other_template():
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = f"1+1={TEMPLATE}"
    tokenizer.save_pretrained("model")


def other_tokens():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = Path("model", name).read_text()
        Path("model", name).write_text(text.replace("<unk>", "<other>"))


def turned(rows):
    return rows[::-1]


def other_solutions(rows):
    return [row | {"solution": f"#### {row['answer']}"} for row in rows]


def other_answer(rows):
    return [rows[0] | {"answer": "7"}, *rows[1:]]


def test_every_option_says_whether_it_may_change():
    names = set(option_names())
    assert {"steps", "data.train", "data.train.path", "policy.optimizer.lr", "adapters.rank"} <= names
    for name in names:
        places = [kind for kind in (FREE, BY_CONTENT, MEANING) if is_within(name, kind)]
        assert len(places) == 1, f"{name}: add it to FREE or BY_CONTENT of checkpoint/identity.py, or to MEANING here"
    for name in chain(FREE, BY_CONTENT, MEANING):
        assert name in names or any(other.startswith(f"{name}.") for other in names), name


def test_all_data_has_fingerprints():
    sources = {
        f"data.{name}"
        for name, info in DataConfig.model_fields.items()
        if any(other.startswith(f"{name}.path") for other in option_names(DataConfig)) and info is not None
    }
    assert {"data.train", "data.eval", "data.experts"} <= sources
    assert sources == set(rows_by_option(None, None, Data()))
    assert all(is_within(source, BY_CONTENT) for source in sources)
    assert set(SourceConfig.model_fields) == {"path", "name", "split", "revision"}


@pytest.mark.parametrize(
    ("arguments", "texts", "names"),
    [
        (["--policy.optimizer.lr", "5e-4"], ["policy.optimizer.lr 0.001 -> 0.0005"], "policy.optimizer.lr"),
        (["--prm.gamma", "0.5"], ["prm.gamma 1.0 -> 0.5"], "prm.gamma"),
        (["--loss.gamma", "0.5", "--prm.beta=2"], ["loss.gamma 1.0 -> 0.5", "prm.beta 1.0 -> 2.0"], None),
        (["--prm.reward", "logprob"], ['prm.reward "implicit" -> "logprob"'], "prm.reward"),
        (["--objective", "sft"], ['objective "repirl" -> "sft"', "content of data.train (24 rows"], None),
        (
            ["--data.experts", "[train.jsonl, train.jsonl]"],
            ["content of data.experts (24 rows"],
            "data.experts",
        ),
        (["--adapters.rank", "4"], ['adapters null -> {"rank": 4'], "adapters"),
        (
            ["--data.chat_template", "true", "--data.system", "1"],
            ["data.chat_template false -> true", 'data.system null -> "1"', "content of data.train (24 rows"],
            "data.chat_template,data.system,data.eval,data.experts,data.train",
        ),
        (
            ["--policy.optimizer.schedule", "linear"],
            ["steps 1 -> 2", 'policy.optimizer.schedule "constant" -> "linear"'],
            "steps,policy.optimizer.schedule",
        ),
    ],
)
def test_other_options_are_refused_by_name(run, capsys, arguments, texts, names):
    error = refusal(capsys, *arguments)
    assert "this is not the run that wrote checkpoint 'run/checkpoints/step_1'" in error
    assert all(text in error for text in texts), error
    assert names is None or error.endswith(f"--resume --changed {names}\n")
    # What the message says allows it, as far as this comparison goes.
    assert "this is not the run" not in refusal(capsys, *arguments, "--changed", "nonsense")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (without_norms, "policy.model,prm.model"),
        (other_weights, "policy.model,prm.model"),
        (other_template, "policy.chat_template"),
        (other_tokens, "policy.tokenizer"),
        (lambda: rewrite("train.jsonl", turned), "data.experts,data.train"),
        (lambda: rewrite("train.jsonl", lambda rows: rows[1:]), "data.experts,data.train"),
        (lambda: rewrite("train.jsonl", other_solutions), "data.experts"),
        (lambda: rewrite("train.jsonl", other_answer), "data.train"),
        (lambda: rewrite("eval.jsonl", turned), "data.eval"),
    ],
)
def test_other_models_and_data_are_refused_by_name(run, capsys, change, names):
    change()
    error = refusal(capsys)
    assert all(f"content of {name} (" in error for name in names.split(",")), error
    assert error.endswith(f"--resume --changed {names}\n")


def test_moved_files_and_what_does_not_change_the_meaning_are_allowed_and_told(run, capsys):
    shutil.move("train.jsonl", "moved.jsonl")
    shutil.move("model", "elsewhere")
    shutil.move("run", "new")
    arguments = ["--data.train", "moved.jsonl", "--policy.model", "elsewhere", "--output_dir=new", "--eval.every", "3"]
    assert resume(*arguments, "--data.max_prompt_tokens", "1000", "--changed", "lr") == 0
    out = capsys.readouterr().out
    for line in (
        'changed: output_dir "run" -> "new"',
        "changed: steps 1 -> 2",
        'changed: policy.model "model" -> "elsewhere"',
        'changed: data.train.path "train.jsonl" -> "moved.jsonl"',
        "changed: data.max_prompt_tokens 1536 -> 1000",
        "changed: eval.every 0 -> 3",
        "--changed names 'lr', which is as it was",
        "resuming at turn 2 of 2, from new/checkpoints/step_1",
    ):
        assert f"{line}\n" in out
    assert out.count("changed: ") == 6


def test_named_changes_are_made_and_the_checkpoint_has_them(run, capsys):
    changed = ["--policy.optimizer.lr", "5e-4", "--prm.optimizer.lr", "2e-4", "--loss.gamma", "0.5"]
    assert "--changed lr,loss.gamma\n" in refusal(capsys, *changed, "--changed", "lr")
    assert resume(*changed, "--changed", "lr,loss.gamma") == 0
    out = capsys.readouterr().out
    assert "changed: policy.optimizer.lr 0.001 -> 0.0005\n" in out
    assert "changed: prm.optimizer.lr 0.001 -> 0.0002\n" in out
    line = read_metrics("run/metrics.jsonl")[-1]
    assert (line["step"], line["policy/lr"], line["prm/lr"]) == (2, 5e-4, 2e-4)
    # From now on that is the run, and going back would be a change.
    assert main(["train", "--resume", "run", "--steps", "3", "--policy.optimizer.lr=1e-3"]) == 2
    assert "policy.optimizer.lr 0.0005 -> 0.001" in capsys.readouterr().err


def taken_up(*changed):
    """The run, with the state of its checkpoint, and its configuration's experts."""
    run = build(load_config("my.yaml", ["--steps", "2"]), resume=True, changed=changed)
    assert run.resume() == 1
    state = {name: part.state_dict() for name, part in run.data.feeds.items()}
    places = {name: part["cursor"]["position"] for name, part in state.items()}
    sampler = run.sampler.state_dict()["cursor"]["position"]
    run.close()
    return places["experts"], len(state["experts"]["reference"]), sampler


def test_other_experts_leave_nothing_of_the_old_ones(run):
    assert taken_up() == (24, 24, 3)
    rewrite("train.jsonl", other_solutions)
    assert taken_up("data.experts") == (0, 0, 3)
    rewrite("train.jsonl", lambda rows: rows[:7])
    assert taken_up("data.experts", "data.train") == (0, 0, 0)


def test_another_family_is_refused_even_if_it_is_named(run, capsys):
    without_norms()
    error = refusal(capsys, "--changed", "model")
    assert "does not fit the configured models: it holds 'model.model.layers.0.self_attn.k_norm.weight'," in error


def test_another_reference_has_said_nothing_yet(run):
    other_weights()
    assert taken_up("model") == (24, 0, 3)


def test_a_run_goes_on_by_its_folder_alone(run, capsys):
    Path("my.yaml").unlink()
    shutil.move("run", "moved")
    assert main(["train", "--resume", "moved", "--steps", "2", "--eval.num_prompts=2"]) == 0
    out = capsys.readouterr().out
    assert "changed: steps 1 -> 2\n" in out
    assert "resuming at turn 2 of 2, from moved/checkpoints/step_1\n" in out
    assert [line["step"] for line in read_metrics("moved/metrics.jsonl")] == [1, 2]
    # The newest configuration that is as it was written.
    Path("moved/checkpoints/step_2/config.yaml").write_text("steps: 3")
    assert main(["train", "--resume", "moved"]) == 0
    assert "all 1 turns are done already, from moved/checkpoints/step_1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resume", "run"],
        ["--resume=run"],
        ["--resume", "--output_dir", "run"],
        ["--resume", "run", "--config", "my.yaml"],
        ["--config", "my.yaml", "--resume"],
        ["--config", "my.yaml", "--resume", "--output_dir=run"],
    ],
)
def test_ways_to_say_what_is_resumed(run, monkeypatch, arguments):
    calls = []
    monkeypatch.setattr("repirl.loop.train", lambda config, **options: calls.append((config, options)))
    assert main(["train", *arguments, "--steps", "7", "--changed", "lr, data.train"]) == 0
    [(config, options)] = calls
    assert (config.steps, config.output_dir, config.irl.experts_per_step) == (7, "run", 24)
    assert options == {"resume": True, "changed": ["lr", "data.train"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs the folder of a run (--resume DIR), or a configuration (--config FILE)"),
        (["--resume", "nowhere"], "there is no run to resume in 'nowhere'"),
        (["--resume", "run/checkpoints/step_1"], "there is no run to resume in 'run/checkpoints/step_1'"),
        (["--resume", "nowhere", "--config", "my.yaml"], "there is no run to resume in 'nowhere'"),
        (["--resume", "my.yaml"], "--resume 'my.yaml' is a file, expected the folder of a run"),
        (["--resume", "run", "--output_dir", "other"], "--resume run and --output_dir other are two folders"),
        (["--config", "my.yaml", "--changed", "lr"], "--changed lr is about a run that goes on: give --resume, too"),
        (["--resume", "run", "--changed", "lrr"], "names 'lrr', and there is no such option (did you mean 'lr'?)"),
        (["--resume", "run", "--changed", "policy.lr"], "names 'policy.lr', and there is no such option"),
    ],
)
def test_mistakes_are_told(run, capsys, arguments, message):
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_models_fingerprint_is_of_its_content_and_not_of_its_files(run):
    before = fingerprint_model("model")
    AutoModelForCausalLM.from_pretrained("model").save_pretrained("parts", max_shard_size="20KB")
    assert len(list(Path("parts").glob("*.safetensors"))) > 1
    assert fingerprint_model("parts") == before
    config = json.loads(Path("parts/config.json").read_text())
    Path("parts/config.json").write_text(json.dumps(config | {"rope_theta": 5.0, "transformers_version": "1"}))
    assert fingerprint_model("parts") != before
    Path("parts/config.json").write_text(json.dumps(config | {"transformers_version": "1"}))
    assert fingerprint_model("parts") == before
    Path("parts/generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert fingerprint_model("parts") != before


def test_of_large_models_samples_are_read(run, monkeypatch):
    sizes = []
    pread = fingerprinting.os.pread

    def count(descriptor, size, offset):
        sizes.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(fingerprinting.os, "pread", count)
    monkeypatch.setattr(fingerprinting, "MAX_SAMPLED_TENSORS", 5)
    monkeypatch.setattr(fingerprinting, "SAMPLE_BYTES", 100)
    before = fingerprint_model("model")
    assert 3 <= len(sizes) <= 5
    assert max(sizes) == 100
    # All weights of a model change when it is trained.
    tensors = {name: 1.001 * tensor for name, tensor in load_file("model/model.safetensors").items()}
    save_file(tensors, "model/model.safetensors", {"format": "pt"})
    assert fingerprint_model("model") != before


def test_a_gguf_files_fingerprint_is_of_its_start_and_samples(tmp_path):
    content = bytearray(b"GGUF" + bytes(3 << 20))
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    before = fingerprint_model(str(tmp_path), "a.gguf")
    for place in (1000, len(content) // 2, len(content) - 5000):
        changed = content.copy()
        changed[place : place + (16 << 10)] = b"1" * len(changed[place : place + (16 << 10)])
        file.write_bytes(changed)
        assert fingerprint_model(str(tmp_path), "a.gguf") != before
    file.write_bytes(content)
    assert fingerprint_model(str(tmp_path), "a.gguf") == before


def test_rows_differ_by_tokens_answers_and_order():
    rows = [Prompt(0, (1, 2), "3"), Prompt(1, (4,), None)]
    prints = {
        fingerprint_rows(rows),
        fingerprint_rows(rows[::-1]),
        fingerprint_rows(rows[:1]),
        fingerprint_rows([rows[0], Prompt(1, (4,), "None")]),
        fingerprint_rows([Prompt(0, (1,), "3"), Prompt(1, (2, 4), None)]),
    }
    assert len(prints) == 5
    assert fingerprint_rows(list(rows)) in prints


def test_a_tokenizers_fingerprint_outlives_saving(run):
    tokenizer = AutoTokenizer.from_pretrained("model")
    before = fingerprint_tokenizer(tokenizer)
    tokenizer.save_pretrained("again")
    assert fingerprint_tokenizer(AutoTokenizer.from_pretrained("again")) == before
    tokenizer.add_tokens(["%"])
    assert fingerprint_tokenizer(tokenizer) != before


def test_the_stored_configuration_is_the_runs(run):
    stored = load_config("run/checkpoints/step_1/config.yaml")
    assert isinstance(stored, Config)
    given = build_config(yaml.safe_load(Path("my.yaml").read_text()))
    # What was left open has been set (defaults.py).
    assert given.rollout.engine == "auto"
    assert stored == given.model_copy(update={"rollout": given.rollout.model_copy(update={"engine": "transformers"})})
