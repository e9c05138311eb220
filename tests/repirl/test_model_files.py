"""Model folders that are damaged, incomplete or of another kind: each is one message that says what and where."""

import json
import re
import shutil

import pytest
import torch
import yaml
from rank_processes import rank_processes
from safetensors.torch import load_file, save_file
from shared import CPU
from tiny import make_model, tiny_values
from transformers import AutoModelForTokenClassification, GPT2Config, GPT2LMHeadModel

from repirl.cli import main
from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.distributed.load import load_sharded_model
from repirl.distributed.world import join_world
from repirl.model_files import load_message
from repirl.models import load_model

FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("sound") / "model", tied=False)


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def load(path, kind="causal", **options):
    return load_model(str(path), kind=kind, dtype=torch.float32, device=CPU, **options)


def rewrite(path, change):
    """Change the tensors of a folder in place, by a function of name -> tensor."""
    weights = change(dict(load_file(path / "model.safetensors")))
    save_file({k: w.contiguous() for k, w in weights.items()}, path / "model.safetensors", metadata={"format": "pt"})


def describe(path, **changes):
    """Change config.json in place; `...` removes a key."""
    content = json.loads((path / "config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(content))


def without(*names):
    return lambda weights: {key: value for key, value in weights.items() if not key.endswith(names)}


def with_more(**more):
    return lambda weights: weights | {key.replace("__", "."): value for key, value in more.items()}


def prefixed(prefix):
    return lambda weights: {prefix + key: value for key, value in weights.items()}


def last_layer_twice(weights):
    more = {k.replace("layers.1.", "layers.2."): w.clone() for k, w in weights.items() if "layers.1." in k}
    return weights | more


INCOMPLETE = [
    (prefixed("module."), r"hold 'module.*the prefix 'module.', as a wrapper"),
    (prefixed("_orig_mod."), r"the prefix '_orig_mod.'"),
    (prefixed("base_model.model."), r"the prefix 'base_model.model.'"),
    (without("layers.0.self_attn.q_proj.weight"), rf"lack '{FIRST}', which would stay random"),
    (without("lm_head.weight"), r"lack 'lm_head.weight', which would stay random"),
    (lambda _: {"other": torch.zeros(2)}, r"lack 'lm_head.weight'.* and \d+ more.*they hold 'other' instead"),
    (last_layer_twice, r"hold 'model.layers.2.*does not have and would compute without"),
    (with_more(model__layers__0__self_attn__q_proj__bias=torch.zeros(32)), r"q_proj.bias', which the model of its"),
    (with_more(score__weight=torch.zeros(1, 32)), r"no language model: its files hold the head 'score.weight'"),
]


@pytest.mark.parametrize(("change", "message"), INCOMPLETE)
def test_weights_that_files_lack_never_stay_random(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_what_a_model_has_besides_is_left_out_and_named(folder, caplog):
    expected = load(folder).state_dict()
    rewrite(folder, with_more(vision__weight=torch.zeros(2)))
    loaded = load(folder).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert "'vision.weight', which the model does not have; left out" in caplog.text
    # Buffers of older versions are no weights.
    caplog.clear()
    rewrite(folder, without("vision.weight"))
    rewrite(folder, with_more(model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4)))
    load(folder)
    assert not caplog.text


def test_a_head_of_its_own_beside_tied_embeddings_is_refused(folder):
    describe(folder, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="tie_word_embeddings: true, but its files hold a head with other values"):
        load(folder)
    rewrite(folder, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    model = load(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_value_head_is_kept_new_or_refused(folder):
    """One output: kept, with or without a bias; none: new and zero; another kind of head: refused."""
    assert not load(folder, "value").score.weight.any()
    with pytest.raises(ConfigError, match=r"hold no head 'score'.*give 0 everywhere"):
        load(folder, "trained value")
    head = torch.arange(32.0)[None]
    rewrite(folder, with_more(score__weight=head))
    for kind in ("value", "trained value"):
        model = load(folder, kind)
        assert torch.equal(model.score.weight, head)
        assert not model.score.bias.any()
    rewrite(folder, with_more(score__bias=torch.ones(1)))
    assert load(folder, "value").score.bias.tolist() == [1.0]
    plain = AutoModelForTokenClassification.from_pretrained(folder, num_labels=1)
    assert torch.equal(plain.score.weight, head)
    for heads, message in [
        ({"score__weight": torch.zeros(2, 32)}, r"has 2 outputs, and a reward is read off one"),
        ({"score__0__weight": torch.zeros(32, 32), "score__2__weight": torch.zeros(2, 32)}, r"several layers"),
        ({"v_head__summary__weight": torch.zeros(1, 32)}, r"the head 'v_head.summary.weight', which is not the one"),
    ]:
        rewrite(folder, without("score.weight", "score.bias"))
        rewrite(folder, with_more(**heads))
        with pytest.raises(ConfigError, match=message):
            load(folder, "value")
        rewrite(folder, without(*(key.replace("__", ".") for key in heads)))


def load_in_shards(_group, values, cases):
    world = join_world(build_config(values))
    said = []
    for path, kind in cases:
        options = {"kind": kind, "dtype": torch.float32, "compute_dtype": torch.float32}
        try:
            load_sharded_model(path, world=world, **options)
            said.append("")
        except ConfigError as error:
            said.append(str(error))
    return said


def test_what_is_read_in_shards_is_checked_alike(sound, tmp_path):
    """Each process says the same, and none waits for another."""
    changes = [
        *INCOMPLETE,
        (lambda w: w | {FIRST: torch.zeros(3, 32)}, r"hold '.*q_proj.weight' with shape \[3, 32\], .*says \[32, 32\]"),
    ]
    cases = []
    for number, (change, _) in enumerate(changes):
        path = shutil.copytree(sound, tmp_path / str(number))
        rewrite(path, change)
        cases.append((str(path), "causal"))
    two = shutil.copytree(sound, tmp_path / "two")
    rewrite(two, with_more(score__weight=torch.zeros(2, 32)))
    steps = shutil.copytree(sound, tmp_path / "steps")
    rewrite(steps, with_more(score__0__weight=torch.zeros(32, 32)))
    cases += [(str(two), "value"), (str(steps), "value"), (str(sound), "trained value")]
    cases += [(str(sound), "value"), (str(sound), "causal")]
    messages = [message for _, message in changes] + [
        "has 2 outputs",
        "several layers",
        "give 0 everywhere",
        "^$",
        "^$",
    ]
    with rank_processes(2) as ranks:
        first, second = ranks.run(2, load_in_shards, tiny_values(tmp_path), cases)
    assert first == second
    for said, message in zip(first, messages, strict=True):
        assert re.search(message, said), (message, said)


def cut(path, size):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def put(name, content):
    def change(path):
        (path / name).write_bytes(content)

    return change


def only(name):
    """The weights under another name, of another format."""

    def change(path):
        (path / "model.safetensors").rename(path / name)

    return change


def as_parts(change):
    """Weights in two files and an index, which is then changed."""

    def changed(path):
        weights = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        names, places = sorted(weights), {}
        for number, part in enumerate((names[:5], names[5:])):
            save_file({n: weights[n] for n in part}, path / f"part{number}.safetensors", metadata={"format": "pt"})
            places |= dict.fromkeys(part, f"part{number}.safetensors")
        change(path, places)
        index = path / "model.safetensors.index.json"
        if not index.exists():
            index.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return changed


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HEADER = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'


def config_with(**changes):
    return lambda path: describe(path, **changes)


def spoiled_tokenizer_config(folder):
    content = json.loads((folder / "tokenizer_config.json").read_text())
    return json.dumps(content | {"model_max_length": "null"}).encode()


DAMAGE = {
    "cut off": (lambda path: cut(path, -100), r"no sound safetensors file: it has \d+ bytes, .* \(cut off\?\)"),
    "cut off in the header": (lambda path: cut(path, 100), r"its header should have \d+ bytes, the whole file has 100"),
    "empty": (lambda path: cut(path, 0), "it has 0 bytes"),
    "pointer": (put("model.safetensors", POINTER), "Git LFS pointer, not the weights: run `git lfs pull`"),
    "noise": (put("model.safetensors", b"\x05" + bytes(7) + b"noise and more"), "its header is no JSON"),
    "no tensors": (put("model.safetensors", b"\x02" + bytes(7) + b"{}"), "it holds no tensors"),
    "a web page": (put("model.safetensors", b"<html>" * 20), "its header should have"),
    "header of a list": (put("model.safetensors", b"\x03" + bytes(7) + b"[1]"), "does not describe tensors"),
    "longer than its header says": (
        put("model.safetensors", len(HEADER).to_bytes(8, "little") + HEADER + bytes(9)),
        "by its header it should have",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has no weights: expected model.safetensors"),
    "pickle": (only("pytorch_model.bin"), "a pickle, which may run any code .*convert it once"),
    "old pickle": (only("consolidated.00.pth"), "a pickle, which may run any code"),
    "gguf beside": (only("model.gguf"), "to load 'model.gguf' name it as gguf_file"),
    "part missing": (
        as_parts(lambda path, _: (path / "part1.safetensors").unlink()),
        "names 'part1.safetensors', which is not there",
    ),
    "part cut off": (
        as_parts(lambda path, _: (path / "part1.safetensors").write_bytes(b"")),
        "part1.safetensors' is no sound safetensors file: it has 0 bytes",
    ),
    "index of others": (
        as_parts(lambda _, places: places.update({"other": "part0.safetensors"})),
        "says that 'part0.safetensors' holds 'other', and it does not",
    ),
    "index cut off": (
        as_parts(lambda path, _: (path / "model.safetensors.index.json").write_text('{"weight_map": {')),
        "index.json' cannot be read as JSON",
    ),
    "index without a map": (
        as_parts(lambda path, _: (path / "model.safetensors.index.json").write_text("{}")),
        "has no `weight_map`",
    ),
    "other shapes": (config_with(intermediate_size=96), r"with shape \[\d+, \d+\], its config.json says"),
    "other vocabulary": (config_with(vocab_size=50), r"with shape \[18, 32\], its config.json says \[50, 32\]"),
    "huge": (config_with(vocab_size=10**7), r"its config.json says \[10000000, 32\]"),
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json, expected a folder that save_pr"),
    "config cut off": (put("config.json", b'{"model_type": "qw'), "config.json' cannot be read as JSON"),
    "config empty": (put("config.json", b""), "config.json' cannot be read as JSON"),
    "config a list": (put("config.json", b"[1, 2]"), r"holds \[1, 2\], expected a JSON object"),
    "config a pointer": (put("config.json", POINTER), "it is a Git LFS pointer"),
    "config not UTF-8": (put("config.json", b"\xff\xfe{}"), "config.json' cannot be read as JSON"),
    "no type": (config_with(model_type=...), "cannot load the model"),
    "unknown type": (config_with(model_type="quen"), "cannot load the model .*quen"),
    "no layers": (config_with(num_hidden_layers=0, layer_types=...), "has num_hidden_layers 0, expected an integer"),
    "layers without end": (config_with(num_hidden_layers=10**9, layer_types=...), "num_hidden_layers 1000000000"),
    "a text as size": (config_with(hidden_size="32"), "hidden_size"),
    "a negative size": (config_with(hidden_size=-32), "has hidden_size -32"),
    "heads that do not divide": (config_with(num_attention_heads=5), "num_attention_heads 5, expected a multiple of"),
    "no heads": (config_with(num_key_value_heads=0), "num_key_value_heads 0"),
    "an unknown function": (config_with(hidden_act="silly"), "cannot be built as its config.json says .*silly"),
    "an epsilon of nothing": (config_with(rms_norm_eps=-1.0), "rms_norm_eps -1.0, expected a positive number"),
    "pad outside": (config_with(pad_token_id=18), "pad_token_id 18, expected an id below vocab_size 18"),
    "gptq": (config_with(quantization_config={"quant_method": "gptq", "bits": 4}), r"is quantised \(gptq"),
    "bnb": (
        config_with(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"is quantised \(bitsandbytes",
    ),
    "gptq, unsaid": (
        lambda path: rewrite(path, with_more(model__a__qweight=torch.zeros(1))),
        r"is quantised \(GPTQ or AWQ: its files hold 'model.a.qweight'",
    ),
    "adapter": (
        put("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "some/base"}'),
        "holds a PEFT adapter .*base 'some/base', .*merge it into its base first",
    ),
    "tokenizer cut off": (put("tokenizer.json", b'{"model": {'), "cannot load the tokenizer"),
    "tokenizer empty": (put("tokenizer.json", b""), "cannot load the tokenizer"),
    "tokenizer's length in words": (
        lambda path: put("tokenizer_config.json", spoiled_tokenizer_config(path))(path),
        "is loaded, but cannot be used: .*tokenizer_config.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_message_before_anything_is_loaded(folder, tmp_path, capsys, damage):
    """By the command line, dry run and real; as policy, and as PRM beside a sound policy."""
    change, message = DAMAGE[damage]
    values = tiny_values(tmp_path, data={"max_prompt_tokens": 40, "max_expert_tokens": 80})
    change(folder)
    as_policy = values | {"policy": {"model": str(folder)}}
    as_prm = values | {"policy": {"model": values["policy"]["model"]}, "prm": {"model": str(folder)}}
    if values["policy"]["model"] == str(folder):
        as_prm["policy"] = {"model": str(make_model(tmp_path / "other"))}
    for number, (content, options) in enumerate([(as_policy, ["--dry-run"]), (as_policy, []), (as_prm, ["--dry-run"])]):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(content))
        assert main(["train", "--config", str(file), *options]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.startswith("repirl: ")
        assert error.count("\n") == 1
        assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with b'', expected b'GGUF'"),
        (b"GGUF" + bytes(40), "cannot load"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, "cannot load"),
        (b"PK\x03\x04", r"is no GGUF file: it begins with b'PK\\x03\\x04'"),
        (POINTER, "is a Git LFS pointer"),
        (None, "There is no such file$"),
    ],
)
def test_a_damaged_gguf_file_is_one_message(tmp_path, content, message):
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, gguf_file="model.gguf")


def test_a_pickle_is_not_opened(folder, tmp_path):
    """Not even where safetensors are missing."""
    marker = tmp_path / "was_run"

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    (folder / "model.safetensors").unlink()
    torch.save(Evil(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors are read"):
        load(folder)
    assert not marker.exists()


def test_models_of_other_families_are_still_complete(tmp_path):
    """Whose files have other names than their parameters, or buffers among them."""
    shape = {"vocab_size": 20, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    assert load(tmp_path / "gpt2").lm_head.weight.shape == (20, 32)


def test_a_path_that_is_missing_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    error = OSError("the hub's own text")
    for name in ("/nope", "./nope", "../nope", "~/nope", "runs/mine/out"):
        assert load_message("model", name, None, error) == f"cannot load the model {name!r}: there is no such folder"
    for name in ("out/prm", "nope"):
        said = load_message("PRM", name, None, error)
        assert "there is no such folder here, and the hub has none that can be reached: the hub's own text" in said
    assert "it is a file, expected a folder" in load_message("model", "file", None, error)
    assert "expected a folder with a Hugging Face model. the hub's" in load_message("model", str(tmp_path), None, error)
