"""``python -m bench.plan_check``: compares the memory that `repirl plan` predicts with a training run's, on a CPU.

``--table FILE`` instead writes what fits GPUs of 24, 48 and 80 GiB for a model of Qwen3-4B's shape, without training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from bench.figures import described, machine, save
from repirl.configfile import build_config, describe, merge
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.plan.fit import describe_fit, find_fit, gib, usable
from repirl.plan.phases import PROCESS_BYTES
from repirl.plan.plan import GIB, plan
from repirl.report.log import read_metrics

ROOT = Path(__file__).parents[1]
INTRODUCTION = """# Plan and reality

For each setting, a separate run of two training steps, with a model of SmolLM2-135M's shape (random weights) and
generated data whose lengths are at the configuration's limits. `predicted` is the peak of `repirl plan`; `measured` is
the peak of resident memory that the run logs (`memory/peak_bytes`), that of the largest process if there are several.

glibc keeps freed blocks of up to 32 MiB in its heap, between blocks in use. The plan counts only memory in use, so
`measured` is with `MALLOC_MMAP_THRESHOLD_=131072` and `MALLOC_TRIM_THRESHOLD_=131072`: blocks above this size return to
the system when they are freed. `unset` is the same run without these variables, for some settings. One thread.
"""
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
PROMPT, EXPERT, RESPONSE = 96, 96, 16
CHECKPOINTING = {"policy": {"gradient_checkpointing": True}, "prm": {"gradient_checkpointing": True}}
REFERENCE, LOGPROB = {"irl": {"base_measure": "reference"}}, {"prm": {"reward": "logprob"}}
STATE_BITS = {"policy": {"optimizer": {"state_bits": 8}}}
# Label, processes, changes, whether it is also measured with glibc's default settings.
SETTINGS: list[tuple[str, int, dict[str, Any], bool]] = [
    ("sft, one micro-batch of 960 tokens", 1, {"objective": "sft", "irl": {"experts_per_step": 5}}, True),
    ("rloo, two micro-batches", 1, {"objective": "rloo", "batch": {"tokens_per_microbatch": 256}}, False),
    ("rloo, compute_dtype bfloat16", 1, {"objective": "rloo", "compute_dtype": "bfloat16"}, False),
    ("rloo, state_bits 8", 1, {"objective": "rloo"} | STATE_BITS, False),
    ("rloo, 2 processes", 2, {"objective": "rloo"}, False),
    ("repirl, value, four micro-batches", 1, {"batch": {"tokens_per_microbatch": 256}}, False),
    ("repirl, logprob, reference", 1, LOGPROB | REFERENCE, False),
    ("repirl, logprob, gradient checkpointing", 1, merge(LOGPROB, CHECKPOINTING), False),
    ("repirl, value, reference, adapters", 1, {"adapters": {"rank": 16}} | REFERENCE, True),
    ("repirl, value, offload_idle", 1, {"offload_idle": True}, False),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plan_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", nargs="+", metavar="WORD", help="only settings with such a word in their label")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results as JSON, and beside them as Markdown")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the plans for Qwen3-4B's shape there instead")
    options = parser.parse_args(arguments)
    command = " ".join(["python", "-m", "bench.plan_check", *(arguments or sys.argv[1:])])
    if options.table:
        options.table.write_text(qwen3_page(command))
        print(f"written to {options.table}")
        return 0
    words = [word.lower() for word in options.settings or [""]]
    chosen = [setting for setting in SETTINGS if any(word in setting[0].lower() for word in words)]
    if not chosen:
        parser.error(f"no setting has one of {options.settings} in its label: {[s[0] for s in SETTINGS]}")
    result = {"command": command, "machine": machine(), "process_bytes_after_imports": imported_bytes(), "settings": []}
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        for label, processes, changes, unset in chosen:
            row = check(Path(folder), label, processes, changes, unset)
            result["settings"].append(row)
            print(line(row), flush=True)
            if options.output:  # after each setting, for a run that ends early
                save(options.output, result, page(result))
    return 0


def make_files(folder: Path) -> None:
    """Write the model, and prompts and expert solutions that are exactly as long as the settings allow."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M, **ids)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    with open(folder / "train.jsonl", "w") as file:
        for _ in range(64):
            # Each digit is one token; an expert solution has one more, its end token.
            digits = ["".join(rng.choices("0123456789", k=count)) for count in (PROMPT, EXPERT - 1)]
            file.write(json.dumps({"prompt": digits[0], "answer": "none", "solution": digits[1]}) + "\n")


def settings_of(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a configuration on the files of `make_files`, with these changes."""
    plain = {
        "objective": "repirl",
        "output_dir": str(folder / "run"),
        "steps": 2,
        "device": "cpu",
        "policy": {"model": str(folder / "model"), "optimizer": {"lr": 1e-5}},
        "prm": {"optimizer": {"lr": 1e-5}},
        "data": {
            "train": str(folder / "train.jsonl"),
            "solution_column": "solution",
            "max_prompt_tokens": PROMPT,
            "max_expert_tokens": EXPERT,
        },
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_response_tokens": RESPONSE},
        "batch": {"tokens_per_microbatch": 1024},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False, "peak_tflops": 1.0},
    }
    return merge(plain, changes)


def check(folder: Path, label: str, processes: int, changes: dict[str, Any], unset: bool) -> dict[str, Any]:
    """Plan one setting and train with it: a row of the results."""
    config = build_config(settings_of(folder, changes))
    predicted = plan(config, processes)
    row: dict[str, Any] = {
        "setting": label,
        "processes": processes,
        "changes": changes,
        "phase": predicted.peak.name,
        "predicted_bytes": predicted.peak.total,
        "predicted_rows": predicted.peak.rows,
        "measured_bytes": train(folder, describe(config), processes, RETURNED)["memory/peak_bytes"],
    }
    if unset:
        row["unset_bytes"] = train(folder, describe(config), processes, {})["memory/peak_bytes"]
    return row


def train(folder: Path, text: str, processes: int, variables: dict[str, str], threads: int = 1) -> dict[str, Any]:
    """Run `repirl train` in separate processes.

    Args:
        folder: gets the configuration and the run.
        text: the configuration as YAML.
        processes: their number.
        variables: added to their environment, which is this process's without the ``MALLOC_`` variables.
        threads: the number in each process.

    Returns:
        The last line of the run's metrics.

    Raises:
        RuntimeError: the run fails; the message has its output.
    """
    (folder / "config.yaml").write_text(text)
    subprocess.run(["rm", "-rf", str(folder / "run")], check=True)
    launcher = [sys.executable, "-m", "repirl.cli"]
    if processes > 1:
        launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "repirl.cli"]
        launcher = [sys.executable, "-m", *launch]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | variables
    command = [*launcher, "train", "--config", str(folder / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return read_metrics(folder / "run" / "metrics.jsonl")[-1]


def imported_bytes() -> int:
    """Resident memory of a process that has imported what training needs, and nothing more."""
    code = (
        "import repirl.loop; from pathlib import Path; "
        "print([x.split()[1] for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmRSS')][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def line(row: dict[str, Any]) -> str:
    """One setting as a row of the table."""
    predicted, measured = row["predicted_bytes"], row["measured_bytes"]
    cells = [row["setting"], row["phase"], gib(predicted), gib(measured), f"{predicted / measured:.2f}"]
    unset = row.get("unset_bytes")
    cells += [gib(unset), f"{predicted / unset:.2f}"] if unset else ["", ""]
    return f"| {' | '.join(cells)} |"


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    imported = gib(result["process_bytes_after_imports"])
    lines = [
        INTRODUCTION,
        f"Made by `{result['command']}`; {described(result['machine'])}.",
        f"After its imports, a process holds {imported} GiB here; the plan assumes {gib(PROCESS_BYTES)} GiB, which it "
        "reaches during training.",
        "",
        "| setting | peak in | predicted, GiB | measured | ratio | unset | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(line(row) for row in result["settings"]),
    ]
    return "\n".join(lines) + "\n"


# What fits, for a model of Qwen3-4B's shape and the paper's lengths.

PAPER = {
    "objective": "repirl",
    "output_dir": "runs/qwen3-4b",
    "steps": 1,
    "device": "cuda",
    "policy": {"gradient_checkpointing": True},
    "prm": {"gradient_checkpointing": True},
    "data": {"train": "math/train.jsonl", "solution_column": "solutions"},
    "rollout": {"prompts_per_step": 128, "samples_per_prompt": 4, "max_sequences": 16, "engine": "transformers"},
    "irl": {"experts": "all", "experts_per_step": 512},
    "compute_dtype": "bfloat16",
    "checkpoint": {"every": 20},
}
BITS = {"optimizer": {"state_bits": 8}}
OFFLOAD = {"offload_idle": True}
QUANTISED = OFFLOAD | {"policy": BITS, "prm": BITS}
SMALL = QUANTISED | {"batch": {"tokens_per_microbatch": 4608}}
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("full fine-tuning of policy and PRM", {}),
    ("+ `offload_idle`", OFFLOAD),
    ("+ `optimizer.state_bits: 8`", QUANTISED),
    ("+ micro-batches of 4608 tokens", SMALL),
    ("`parallel.cpu_offload`", {"parallel": {"cpu_offload": True}}),
    ("`adapters`, rank 16", {"adapters": {"rank": 16}}),
    ("`adapters` and a reference", {"adapters": {"rank": 16}, "irl": {"base_measure": "reference"}}),
]
MEMORIES, PROCESSES = (24, 48, 80), (1, 2, 4, 8)


def qwen3_page(command: str) -> str:
    """The page of which ways to train fit on how many GPUs of which size. Nothing is measured."""
    with tempfile.TemporaryDirectory() as folder:
        Qwen3Config(**QWEN3_4B).save_pretrained(folder)
        base = merge(PAPER, {"policy": {"model": folder}})
        plans = {
            label: [plan(build_config(merge(base, changes)), n, "cuda") for n in PROCESSES] for label, changes in WAYS
        }
        fits = [find_fit(build_config(base), memory * GIB, 1, "cuda") for memory in MEMORIES]
    rows = []
    for label, by_processes in plans.items():
        cells = [f"{gib(p.peak.total)} {p.peak.name}{marks(p.peak.total)}" for p in by_processes]
        rows.append(f"| {label} | {' | '.join(cells)} | {gib(sum(by_processes[0].host.values()))} |")
    rooms = ", ".join(gib(usable(memory * GIB, "cuda")) for memory in MEMORIES)
    lines = [
        "# What fits: Qwen3-4B's shape",
        "",
        f"Made by `{command}` from the model's configuration alone: predictions, not measurements.",
        "",
        "rePIRL with a value PRM and the paper's lengths: prompts of 1536 tokens, responses and experts of 3000; 128",
        "prompts with 4 responses each and 512 experts a step. Float32 weights with `compute_dtype: bfloat16`,",
        "gradient checkpointing, micro-batches of 16384 tokens, the built-in engine with 16 sequences side by side.",
        "",
        "The peak on each GPU in GiB, and its phase. ●●● fits GPUs of 24, 48 and 80 GiB, ●● those of 48 and 80, ●",
        f"those of 80. At most {rooms} GiB of these are used: 5% and 1 GiB are left for the CUDA context,",
        "libraries and fragmentation. Host: GiB of host memory, with one GPU.",
        "",
        f"| | {' | '.join(f'{n} GPU{chr(115) * (n > 1)}' for n in PROCESSES)} | host |",
        f"|---|{'---|' * len(PROCESSES)}---:|",
        *rows,
        "",
        "Each of the first four lines holds the changes of those above it. What `repirl plan --memory 24,48,80` finds",
        "for the first line on one GPU, the cheapest switches first:",
        "",
        *(f"- {describe_fit(fit)}" for fit in fits),
    ]
    return "\n".join(lines) + "\n"


def marks(count: int) -> str:
    """A dot for each size of memory that holds so many bytes."""
    fitting = sum(count <= usable(memory * GIB, "cuda") for memory in MEMORIES)
    return f" {'●' * fitting}" if fitting else ""


if __name__ == "__main__":
    sys.exit(main())
