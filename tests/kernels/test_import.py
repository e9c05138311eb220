"""What ``import repirl_kernels`` brings along, and what the package says of itself."""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import repirl_kernels
import torch
from repirl_kernels import linear_token_loss, linear_token_stats
from shared import ROOT

import repirl

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "repirl_kernels.triton", "triton", "sympy")


def newly_imported(code: str) -> set[str]:
    """Modules that are loaded after PyTorch, by Python's own account."""
    command = [sys.executable, "-X", "importtime", "-c", f"import torch; {code}"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    names = [line.rsplit("|", 1)[1].strip() for line in report.splitlines() if line.startswith("import time:")]
    assert "torch" in names
    return set(names[names.index("torch") + 1 :])


def test_the_import_adds_no_package_to_pytorchs():
    """Python's own modules aside; time would tell less, as a machine's disk and load decide it."""
    before = newly_imported("pass")
    names = newly_imported("import repirl_kernels") - before
    assert "repirl_kernels.ops" in names
    packages = {name.split(".")[0] for name in names}
    assert packages - set(sys.stdlib_module_names) <= {"repirl_kernels", "torch"}
    assert [name for name in names if name.startswith(HEAVY)] == []


def test_the_account_finds_what_is_heavy():
    names = newly_imported("torch.compiler.assume_constant_result(lambda: None)")
    assert "torch._dynamo" in names


@pytest.mark.parametrize("backend", ["reference", None])
def test_the_loss_is_one_graph_without_the_compilers_decorator(backend):
    """On any other path the choice of the memory would be a break in it."""
    hidden, weight, targets = torch.randn(7, 16), torch.randn(33, 16), torch.randint(33, (7,))

    def loss(hidden, weight):
        return linear_token_loss(hidden, weight, targets, lambda stats, rows: -stats.logprob, backend=backend).loss

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        function(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_one_version():
    assert repirl_kernels.__version__ == repirl.__version__ == importlib.metadata.version("repirl")


def test_the_sources_alone_have_no_version():
    code = (
        "import importlib.metadata as m\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version\n"
        "import repirl_kernels\n"
        "print(repirl_kernels.__version__)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "unknown\n"


def test_a_native_module_that_cannot_be_loaded_is_told():
    code = (
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'repirl_kernels._native': raise ImportError('GLIBCXX_3.4.30 not found')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import torch\n"
        "from repirl_kernels import choose_backend\n"
        "print(choose_backend('cpu', torch.float32))\n"
        "choose_backend('cpu', torch.float32, 'native')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "reference\n"
    assert "the native CPU backend cannot be loaded (GLIBCXX_3.4.30 not found), running the slower" in done.stderr
    assert "RuntimeError: backend='native' cannot be loaded (GLIBCXX_3.4.30 not found): reinstall" in done.stderr


def test_the_readme_is_in_the_package():
    assert "README.md in this package" in repirl_kernels.__doc__
    text = (Path(repirl_kernels.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert text == (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")


def test_lora_on_the_head_trains_as_the_readme_says():
    """Given by hand, the weight of an adapted head is the frozen one below it."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    adapter = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(adapter, model)
    ids = torch.randint(61, (2, 9))
    targets = ids[:, 1:]
    leaves = [matrix.default.weight for matrix in (model.lm_head.lora_A, model.lm_head.lora_B)]
    logits = model(ids).logits[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    hidden = model.model(ids).last_hidden_state[:, :-1]

    by_hand = linear_token_stats(hidden, model.lm_head.weight, targets).logprob
    assert not torch.allclose(by_hand, expected, atol=1e-3)
    assert torch.autograd.grad(by_hand.sum(), leaves, retain_graph=True, allow_unused=True) == (None, None)

    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    section = text.split("### LoRA on the head\n")[1].split("\n##")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    namespace: dict = {}
    exec(block, namespace)
    logprob = namespace["lora_head_stats"](model.lm_head, hidden, targets).logprob
    torch.testing.assert_close(logprob, expected)
    gradients = [torch.autograd.grad(output.sum(), leaves, retain_graph=True) for output in (logprob, expected)]
    torch.testing.assert_close(*gradients)
    model.lm_head.merge()
    torch.testing.assert_close(linear_token_stats(hidden, model.lm_head.weight, targets).logprob, expected)


def test_the_wheel_holds_the_readme_and_no_tests(tmp_path):
    pytest.importorskip("scikit_build_core")
    options = {"wheel.cmake": "false", "wheel.py-api": "py3"}
    code = f"import scikit_build_core.build as b, sys; b.build_wheel(sys.argv[1], {options})"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        assert files.read("repirl_kernels/README.md").startswith(b"# repirl_kernels\n")
    assert "repirl_kernels/py.typed" in names
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"repirl", "repirl_kernels"}
