"""``python -m bench.trainers``: a policy update here and in TRL's RLOOTrainer, on the same recorded rollouts.

Both contenders get the same weights, token ids, outcomes and AdamW. They run one after the other, in separate
processes, for several rounds; the table has medians of the rounds. Both must make the same update: the table gives the
relative difference of the parameters' changes in the first step. (AdamW's first step depends almost only on the signs
of the gradients; in bfloat16 the signs of small gradients differ.) Phases:

* rollout: sampling with our built-in engine and TRL's default `generate`; in tokens a second, as the lengths of
  responses differ
* old_logprob: log-probabilities of the recorded responses under the sampling weights, without gradients
* policy: forward, backward, clipping and AdamW
* PRM (ours only): scoring and updating a PRM of the policy's size on the same sequences, and its rewards

Rollout and PRM are timed in one round of the first case. TRL pads a batch to its longest sequence; a case with equal
lengths shows the difference without padding. Memory is the peak of the process (on a GPU, of its allocator) minus the
memory after the model is loaded; on a CPU it includes the copy of the changes, which both contenders keep.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bench.figures import described, machine
from bench.plan_check import SMOLLM2_135M
from repirl.batch import PackedBatch, pack
from repirl.config import Config
from repirl.configfile import build_config
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.distributed.shard import whole
from repirl.distributed.world import join_world, leave_world
from repirl.objectives.rloo import RLOO
from repirl.options import OptimizerConfig
from repirl.rollout.engine import Sampling, sequence_seed
from repirl.rollout.transformers import TransformersEngine
from repirl.run import build_learners
from repirl.work import Work, peak_memory_bytes, reset_peak_memory

NUM_PROMPTS, NUM_SAMPLES = 4, 4
# Name -> (lengths equal, gradient checkpointing, sequences in a micro-batch).
CASES = {
    "spread lengths": (False, False, 16),
    "equal lengths": (True, False, 16),
    "spread lengths, micro-batches of 4": (False, False, 4),
    "spread lengths, gradient checkpointing": (False, True, 16),
}
SHAPES = {
    "smollm2-135m": SMOLLM2_135M,
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
CONTENDERS = ("ours", "trl")
OPTIMIZER = OptimizerConfig(lr=1e-5)


def make_model(folder: Path, shape: str) -> None:
    """Save a model of a known shape with random weights: what is measured does not depend on them."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(**SHAPES[shape] | {"tie_word_embeddings": True, "initializer_range": 0.05} | special)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def record(path: Path, vocabulary: int, prompt: int, response: int, equal: bool) -> None:
    """Write rollouts: token ids of prompts, K responses each with lengths between a tenth and the whole of
    `response`, and outcomes."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    def length(longest: int) -> int:
        share = 0.1 + 0.9 * float(torch.rand(1, generator=generator))
        return longest if equal else max(1, round(share * longest))

    rollouts = []
    for _ in range(NUM_PROMPTS):
        prompt_ids = ids(length(prompt))
        responses = [ids(length(response)) for _ in range(NUM_SAMPLES)]
        # Neither all right nor all wrong: every prompt has a gradient.
        rollouts.append({"prompt": prompt_ids, "responses": responses, "outcomes": [1.0, 0.0, 1.0, 0.0]})
    path.write_text(json.dumps(rollouts))


def packed(rollouts: list[dict[str, Any]]) -> PackedBatch:
    return pack(
        [(r["prompt"], response) for r in rollouts for response in r["responses"]],
        group_ids=[g for g, r in enumerate(rollouts) for _ in r["responses"]],
        outcome=[o for r in rollouts for o in r["outcomes"]],
    )


class Clock:
    """Measures seconds by phase and step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}
        self._start = 0.0

    def start(self) -> None:
        self._synchronise()
        self._start = time.perf_counter()

    def stop(self, phase: str) -> None:
        self._synchronise()
        self.seconds.setdefault(phase, []).append(time.perf_counter() - self._start)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.detach()).cpu().clone() for name, p in model.named_parameters()}


def changes(model: torch.nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after - before[name] for name, after in parameters(model).items()}


def configuration(options: argparse.Namespace, objective: str, budget: int) -> Config:
    """Our configuration for this update."""
    side = {"optimizer": {"lr": OPTIMIZER.lr}, "gradient_checkpointing": options.checkpointing}
    return build_config(
        {
            "objective": objective,
            "output_dir": "unused",
            "steps": options.steps + 1,
            "device": options.device,
            "compute_dtype": options.compute_dtype,
            "policy": {"model": options.model} | side,
            "prm": {"reward": "value"} | side,
            # The sequence's sum of log-probabilities, averaged over sequences, as in RLOOTrainer; no entropy bonus.
            "loss": {"aggregation": "constant_length", "entropy_coefficient": 0.0, "sampler_ratio_cap": None},
            "rollout": {"max_response_tokens": 1},
            "data": {"train": "unused", "solution_column": "unused"},
            "batch": {"tokens_per_microbatch": budget},
        }
    )


def run_ours(options: argparse.Namespace, rollouts: list[dict[str, Any]]) -> dict[str, Any]:
    """Time updates of the policy, then those of the PRM."""
    longest = max(len(r["prompt"]) + len(x) for r in rollouts for x in r["responses"])
    budget = options.microbatch * longest
    config = configuration(options, "rloo", budget)
    world = join_world(config)
    policy, objective = build_learners(config, world, Work())["policy"], RLOO(config)
    device, model = world.device, policy.model
    before = parameters(model)
    clock, update = Clock(device), {}
    reset_peak_memory(device)
    base = peak_memory_bytes(device)
    for step in range(options.steps + 1):
        batch = packed(rollouts)
        clock.start()
        old = policy.score(batch)["logprob"]
        clock.stop("old_logprob")
        clock.start()
        batch.write("old_logprob", old)
        batch.write("sampler_logprob", old)
        objective.prepare(batch)
        policy.update(batch, objective)
        clock.stop("policy")
        if step == 0:
            update = changes(model, before)
    memory = peak_memory_bytes(device) - base
    if options.rollout:
        engine = TransformersEngine(policy, pad_id=0, max_sequences=99)
        prompts = [r["prompt"] for r in rollouts for _ in r["responses"]]
        seeds = [sequence_seed(0, i) for i in range(len(prompts))]
        sampling = Sampling(options.response, 1.0, (model.config.eos_token_id,))
        for _ in range(2):
            clock.start()
            responses = engine.generate(prompts, seeds, sampling)
            clock.stop("rollout")
        clock.seconds["rollout"] = [clock.seconds["rollout"][-1] / sum(len(r.token_ids) for r in responses)]
        del engine
    if options.prm:
        del policy, model
        prm = build_learners(configuration(options, "repirl", budget), world, Work(), ("prm",))["prm"]
        mean_value = SimpleNamespace(loss=lambda outputs, micro: (outputs["value"].mean(), {}))
        for _ in range(options.steps + 1):
            clock.start()
            prm.score(batch)
            prm.update(batch, mean_value)
            prm.score(batch)
            clock.stop("prm")
    leave_world()
    return {"seconds": clock.seconds, "memory": memory, "update": update}


def run_trl(options: argparse.Namespace, rollouts: list[dict[str, Any]]) -> dict[str, Any]:
    """RLOOTrainer with its sampling replaced by the recorded responses; everything else is its own."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    device = torch.device(options.device)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    before = parameters(model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    clock, update = Clock(device), {}
    total = len(rollouts) * NUM_SAMPLES

    class Replay(RLOOTrainer):
        """RLOOTrainer whose `_generate` returns the recorded token ids, without texts."""

        def _generate(self, prompts: list[str]) -> tuple[list[list[int]], list[list[int]], list[str]]:
            chosen = [rollouts[int(p)] for p in prompts[::NUM_SAMPLES]]
            responses = [x for r in chosen for x in r["responses"]]
            return [r["prompt"] for r in chosen for _ in r["responses"]], responses, [""] * len(responses)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            clock.start()
            scored = super()._generate_and_score_completions(inputs)
            clock.stop("old_logprob")
            return scored

    class Steps(TrainerCallback):
        """Measures the seconds of a whole step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            whole = time.perf_counter() - self.start
            # A step includes preparing and scoring the batch.
            clock.seconds.setdefault("policy", []).append(whole - clock.seconds["old_logprob"][-1])
            if state.global_step == 1:
                update.update(changes(model, before))

    def outcome(prompts: list[str], **_: Any) -> list[float]:
        return [o for p in prompts[::NUM_SAMPLES] for o in rollouts[int(p)]["outcomes"]]

    with tempfile.TemporaryDirectory() as folder:
        arguments = RLOOConfig(
            output_dir=folder,
            per_device_train_batch_size=options.microbatch,
            gradient_accumulation_steps=total // options.microbatch,
            num_generations=NUM_SAMPLES,
            max_completion_length=options.response,
            max_steps=options.steps + 1,
            beta=0.0,
            learning_rate=OPTIMIZER.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=OPTIMIZER.max_grad_norm,
            gradient_checkpointing=options.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=options.compute_dtype == "bfloat16",
            use_cpu=device.type == "cpu",
            shuffle_dataset=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_list([{"prompt": str(i)} for i in range(len(rollouts))])
        trainer = Replay(model, outcome, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Steps()])
        reset_peak_memory(device)
        base = peak_memory_bytes(device)
        trainer.train()
        memory = peak_memory_bytes(device) - base
        if options.rollout:
            prompts = [r["prompt"] for r in rollouts for _ in r["responses"]]
            for _ in range(2):
                clock.start()
                responses = trainer._generate_single_turn(prompts, None, {})
                clock.stop("rollout")
            clock.seconds["rollout"] = [clock.seconds["rollout"][-1] / sum(map(len, responses))]
    return {"seconds": clock.seconds, "memory": memory, "update": update}


def child(options: argparse.Namespace) -> None:
    """Run one contender in one case; write its figures as JSON, and the update of its first step."""
    if options.threads:
        torch.set_num_threads(options.threads)
    rollouts = json.loads(Path(options.recorded).read_text())
    result = (run_ours if options.child == "ours" else run_trl)(options, rollouts)
    torch.save(result.pop("update"), f"{options.out}.pt")
    # The first step is a warm-up: memory is allocated, kernels are chosen.
    result["seconds"] = {phase: statistics.median(values[1:] or values) for phase, values in result["seconds"].items()}
    Path(options.out).write_text(json.dumps(result))


def run_child(name: str, case: str, folder: Path, options: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    equal, checkpointing, microbatch = CASES[case]
    recorded = folder / f"rollouts_{'equal' if equal else 'spread'}.json"
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "bench.trainers", "--child", name, "--recorded", str(recorded), "--out", str(out)]
    command += ["--model", options.model, "--device", options.device, "--steps", str(options.steps)]
    command += ["--response", str(options.response), "--microbatch", str(microbatch), *extra]
    command += ["--compute-dtype", options.compute_dtype]
    command += ["--threads", str(options.threads)] if options.threads else []
    result = subprocess.run(
        [*command, *(["--checkpointing"] if checkpointing else [])], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{name} failed in case {case!r}:\n{result.stderr[-3000:]}")
    return json.loads(out.read_text())


def difference(folder: Path) -> float:
    """The norm of the difference of both updates, relative to that of TRL's."""
    ours, theirs = (torch.load(folder / f"{name}.json.pt", weights_only=True) for name in CONTENDERS)
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - theirs[name]).double().pow(2).sum()) for name in ours)
    return (apart / sum(float(x.double().pow(2).sum()) for x in theirs.values())) ** 0.5


def measure_case(case: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds of both contenders, one after the other: a row of the results."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for turn in range(options.rounds):
        first = turn == 0 and case == next(iter(CASES))
        for name in CONTENDERS if turn % 2 == 0 else reversed(CONTENDERS):
            extra = ["--rollout"] if first and not options.no_rollout else []
            extra += ["--prm"] if first and name == "ours" else []
            rounds[name].append(run_child(name, case, folder, options, extra))
            # In the log, for a run that ends early.
            print(f"{case}, round {turn + 1}, {name}: {json.dumps(rounds[name][-1])}", flush=True)
    equal = CASES[case][0]
    rollouts = json.loads((folder / f"rollouts_{'equal' if equal else 'spread'}.json").read_text())
    lengths = [len(r["prompt"]) + len(x) for r in rollouts for x in r["responses"]]
    longest = max(len(r["prompt"]) for r in rollouts) + max(len(x) for r in rollouts for x in r["responses"])
    row: dict[str, Any] = {
        "case": case,
        "tokens": sum(lengths),
        "padding": 1 - sum(lengths) / (longest * len(lengths)),
        "update_difference": difference(folder),
    }
    for name, results in rounds.items():
        phases = sorted({phase for r in results for phase in r["seconds"]})
        seconds = {p: [r["seconds"][p] for r in results if p in r["seconds"]] for p in phases}
        row[name] = {"seconds": seconds, "memory": [r["memory"] for r in results]}
    return row


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: seconds by phase (median and range of the rounds), tokens a second, memory, and the ratio."""
    lines = []
    for result in results:
        lines += [
            f"### {result['case']}",
            "",
            f"{result['tokens']} tokens in {NUM_PROMPTS * NUM_SAMPLES} sequences; padded to one length, "
            f"{result['padding']:.0%} would be padding. The updates differ by {result['update_difference']:.1e} of "
            "their size.",
            "",
            "| phase | ours | TRL | ours / TRL |",
            "|---|---:|---:|---:|",
        ]
        for phase in ("rollout", "old_logprob", "policy", "prm"):
            cells, medians = [], []
            for name in CONTENDERS:
                values = result[name]["seconds"].get(phase)
                if values is None:
                    cells.append("-")
                    continue
                medians.append(statistics.median(values))
                if phase == "rollout":
                    cells.append(f"{1 / medians[-1]:.0f} tokens/s")
                else:
                    spread = f"{min(values):.2f} to {max(values):.2f}"
                    cells.append(f"{medians[-1]:.2f} s ({spread}), {result['tokens'] / medians[-1]:.0f} tokens/s")
            if cells != ["-", "-"]:
                ratio = f"{medians[0] / medians[1]:.2f}" if len(medians) == 2 else "-"
                lines.append(f"| {phase} | {cells[0]} | {cells[1]} | {ratio} |")
        memory = [statistics.median(result[name]["memory"]) / 2**20 for name in CONTENDERS]
        lines += [f"| memory | {memory[0]:.0f} MiB | {memory[1]:.0f} MiB | {memory[0] / memory[1]:.2f} |", ""]
    return "\n".join(lines)


def write(path: Path, arguments: list[str], results: list[dict[str, Any]]) -> None:
    """Results as JSON, and the table beside it."""
    from trl import __version__ as trl_version

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "python -m bench.trainers " + " ".join(arguments),
        "machine": machine() | {"trl": trl_version},
        "threads": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())),
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1))
    title = f"# A policy update beside TRL's RLOOTrainer\n\n`{content['command']}`: {described(content['machine'])}."
    path.with_suffix(".md").write_text(f"{title}\n\n{table(results)}")


def main(arguments: list[str] | None = None) -> int:
    """Run all cases, print the table, write it and the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.trainers", description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR", help="a causal language model; default: random weights of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of products; weights and moments are float32 (TRL: mixed precision)",
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=96, help="longest prompt")
    parser.add_argument("--response", type=int, default=160, help="longest response")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-rollout", action="store_true", help="sampling is not timed: it takes the longest")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", metavar="FILE", help="results; the table goes beside it")
    for name in ("--child", "--recorded", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--checkpointing", "--rollout", "--prm"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--microbatch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model is None:
            make_model(folder / "model", options.shape)
            options.model = str(folder / "model")
        vocabulary = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
        for equal in (False, True):
            path = folder / f"rollouts_{'equal' if equal else 'spread'}.json"
            record(path, vocabulary, options.prompt, options.response, equal)
        results = []
        for case in options.cases:
            results.append(measure_case(case, folder, options))
            print(table(results[-1:]), flush=True)
            if options.json:
                write(Path(options.json), arguments or sys.argv[1:], results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
