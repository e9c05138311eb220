"""A PRM trained on GSM8K, and what it says of solutions that it has not seen.

    python -m bench.gsm8k --model DIR --gguf FILE --train train.jsonl --solutions example_model_solutions.jsonl

DIR holds SmolLM2-135M-Instruct (FILE: as GGUF), train.jsonl is GSM8K's, and the solutions are those of four models to
its test problems, with right and wrong marked (github.com/openai/grade-school-math). Stages, each by the function
behind a command of repirl; what a stage has made is not made again, so that a call which was stopped goes on:

1. SFT of the start on human solutions, so that its responses are written as the experts' are;
2. `repirl sample`: responses of that model to other training problems, which the verifier of mathematics judges;
3. the PRM (objective prm-offline), from the SFT model, on the human solutions of these problems and the responses;
4. `repirl score`: on held-out training problems the human solution and the SFT model's responses, and on test problems
   the four models' solutions; beside the PRM the mean log-probability by the start and by the SFT model, and length.

Each number of --updates goes on from the one before, and has a row for itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench.figures import machine, save
from bench.gsm8k_page import Scored, figures, page
from repirl.apps.sample import sample
from repirl.apps.score import ScoreOptions, score
from repirl.apps.trained import Placed
from repirl.checkpoint.manifest import list_checkpoints
from repirl.config import Config
from repirl.configfile import build_config, load_preset, merge
from repirl.export import export_checkpoint
from repirl.loop import train
from repirl.models import load_model, load_tokenizer, save_tokenizer
from repirl.prm import PRMDescription, PromptFormat
from repirl.report.log import read_metrics

Row = dict[str, Any]

# Not the chat template of the preset, whose system message would be a fifth of all tokens.
TEMPLATE = "Question: {prompt}\nAnswer:\n"
GENERATORS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
START, SFT = "log-probability, start model", "log-probability, SFT model"
# How the PRM is trained -> what is changed in the preset.
ARMS: dict[str, Row] = {
    "value": {"prm": {"reward": "value"}, "irl": {"use_outcome": False}},
    "value, outcomes": {"prm": {"reward": "value"}, "irl": {"use_outcome": True}},
    "logit": {"prm": {"reward": "logit"}, "irl": {"use_outcome": False}},
    "logprob": {"prm": {"reward": "logprob"}, "irl": {"use_outcome": False}},
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; problems of a kind are not used for another one."""

    sft_solutions: int = 192
    sft_updates: int = 8
    sft_batch: int = 16
    sft_rate: float = 3e-5
    problems: int = 48
    held_out: int = 12
    samples: int = 3
    max_tokens: int = 200
    problems_per_update: int = 4
    prm_rate: float = 1e-4
    head_rate: float = 1e-3
    test_problems: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Study:
    """Where everything is. model: a folder, with `gguf` in it as GGUF · train, solutions: files of data."""

    folder: Path
    model: str
    gguf: str | None
    train: Path
    solutions: Path
    sizes: Sizes
    preset: str = "smollm2-gsm8k"
    threads: int = 1

    @property
    def sft(self) -> Path:
        """The SFT model."""
        return self.folder / "sft-model" / "policy"

    def config(self, changes: Row) -> Config:
        """The preset on this machine, with changes."""
        values: Row = {
            "seed": self.sizes.seed,
            "num_threads": self.threads,
            "device": "cpu",
            "data": {
                "prompt_column": "prompt",
                "solution_column": "solution",
                "solution_remove": None,
                "chat_template": False,
                "prompt_template": TEMPLATE,
                "eval": None,
            },
            "rollout": {"max_response_tokens": self.sizes.max_tokens, "temperature": 1.0, "max_sequences": 64},
            "checkpoint": {"every": 8, "keep_last": 1},
            "log": {"tensorboard": False},
        }
        return build_config(merge(merge(load_preset(self.preset), values), changes))


def read(path: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows; the file has its name when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.rename(path)


def plain(solution: str) -> str:
    """A solution without the annotations of GSM8K's calculator."""
    return re.sub("<<[^>]*>>", "", solution)


def split(study: Study) -> None:
    """sft.jsonl, problems.jsonl and held_out.jsonl: training problems at random, none in two files."""
    if (study.folder / "held_out.jsonl").exists():
        return
    sizes = study.sizes
    rows = [
        {
            "prompt": row["question"],
            "answer": row["answer"].rpartition("#### ")[2].strip(),
            "solution": plain(row["answer"]),
        }
        for row in read(study.train)
    ]
    counts = {"sft": sizes.sft_solutions, "problems": sizes.problems, "held_out": sizes.held_out}
    if sum(counts.values()) > len(rows):
        raise ValueError(f"{study.train} has {len(rows)} problems, {sum(counts.values())} are needed: choose fewer")
    random.Random(sizes.seed).shuffle(rows)
    for name, count in counts.items():
        write(study.folder / f"{name}.jsonl", rows[:count])
        rows = rows[count:]


def other_models(study: Study) -> tuple[list[Row], int]:
    """The solutions of other models to test problems at random, written as GSM8K's are ("#### N" for "A: N").

    Returns:
        The rows; and how many solutions were left out because they do not end with an answer.
    """
    chosen = list(enumerate(read(study.solutions)))
    random.Random(study.sizes.seed).shuffle(chosen)
    rows, unended = [], 0
    for number, row in chosen[: study.sizes.test_problems]:
        for generator in GENERATORS:
            body, mark, answer = plain(row[generator]["solution"]).rpartition("\nA: ")
            if not mark:
                unended += 1
                continue
            rows.append(
                {
                    "prompt": row["question"],
                    "response": f"{body}\n#### {answer.strip()}",
                    "problem": number,
                    "generator": generator,
                    "right": row[generator]["is_correct"],
                }
            )
    return rows, unended


def start_model(study: Study) -> Path:
    """The start model as a plain one, which is quicker to load than GGUF."""
    target = study.folder / "start"
    if not (target / "done").exists():
        model = load_model(
            study.model, kind="causal", dtype=torch.float32, device=torch.device("cpu"), gguf_file=study.gguf
        )
        model.save_pretrained(target)
        save_tokenizer(load_tokenizer(study.model, study.gguf), target)
        (target / "done").touch()
    return target


def train_to(config: Config, target: Path) -> None:
    """Train to the last turn, from where an earlier call came to, and export."""
    if (target / "done").exists():
        return
    train(config, resume=bool(list_checkpoints(Path(config.output_dir) / "checkpoints")))
    export_checkpoint(config.output_dir, target)
    (target / "done").touch()


def train_sft(study: Study) -> None:
    """Stage 1."""
    sizes = study.sizes
    changes: Row = {
        "objective": "sft",
        "output_dir": str(study.folder / "sft-run"),
        "steps": sizes.sft_updates,
        "policy": {"model": str(start_model(study)), "optimizer": {"lr": sizes.sft_rate}},
        "data": {"train": str(study.folder / "sft.jsonl")},
        "irl": {"experts_per_step": sizes.sft_batch},
    }
    train_to(study.config(changes), study.folder / "sft-model")


def sample_rollouts(study: Study, name: str) -> Path:
    """Stage 2: responses of the SFT model to the problems of NAME.jsonl."""
    target = study.folder / f"{name}_rollouts.jsonl"
    if not target.exists():
        changes: Row = {
            "policy": {"model": str(study.sft)},
            "data": {"train": str(study.folder / f"{name}.jsonl")},
            "rollout": {"prompts_per_step": 32, "samples_per_prompt": study.sizes.samples},
        }
        sample(study.config(changes | {"output_dir": str(study.folder / "sampled")}), target)
    return target


def train_prm(study: Study, arm: str, updates: int) -> Path:
    """Stage 3. Returns the exported PRM."""
    sizes, place = study.sizes, arm.replace(", ", "-")
    optimizer: Row = {"lr": sizes.prm_rate}
    if arm.startswith("value"):
        optimizer["head_lr"] = sizes.head_rate
    changes: Row = {
        "objective": "prm-offline",
        "output_dir": str(study.folder / f"prm-run-{place}"),
        "steps": updates,
        "policy": {"model": str(study.sft)},
        "prm": {"optimizer": optimizer},
        "data": {
            "train": str(study.folder / "problems.jsonl"),
            "trajectories": {"path": str(sample_rollouts(study, "problems")), "logprob_column": "logprobs"},
        },
        # Without a pass of the reference, which other weights or the reference as base measure would need.
        "irl": {"weights": "uniform", "target_ess": None, "base_measure": "uniform"},
        "rollout": {"prompts_per_step": sizes.problems_per_update, "samples_per_prompt": sizes.samples},
    }
    target = study.folder / f"prm-{place}-{updates}"
    train_to(study.config(merge(ARMS[arm], changes)), target)
    return target / "prm"


def as_prm(model: Path, target: Path) -> Path:
    """A language model as a PRM whose rewards are its log-probabilities: its files, and a description."""
    if not (target / "config.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            if file.name != "config.json" and not (target / file.name).exists():
                (target / file.name).symlink_to(file.resolve())
        prompt = PromptFormat(chat_template=False, prompt_template=TEMPLATE, system=None)
        described = PRMDescription(reward="logprob", prompt=prompt).model_dump(mode="json")
        config = json.loads((model / "config.json").read_text()) | {"repirl": described}
        (target / "config.json").write_text(json.dumps(config))
    return target


def test_files(study: Study) -> tuple[dict[str, Path], int]:
    """Stage 4, what is scored: rows with `problem`, `generator` and `right`. Also the solutions that were left out."""
    own, others = study.folder / "own_rows.jsonl", study.folder / "others_rows.jsonl"
    rows, unended = other_models(study)
    if not others.exists():
        write(others, rows)
    sampled = read(sample_rollouts(study, "held_out"))
    if not own.exists():
        held_out = read(study.folder / "held_out.jsonl")
        numbers = {row["prompt"]: number for number, row in enumerate(held_out)}
        human = [
            {"prompt": r["prompt"], "response": r["solution"], "problem": n, "generator": "human", "right": True}
            for n, r in enumerate(held_out)
        ]
        kept = ("prompt", "response", "finished")
        ours = [
            {key: row[key] for key in kept}
            | {"problem": numbers[row["prompt"]], "generator": "SFT model", "right": row["outcome"] > 0.5}
            for row in sampled
        ]
        write(own, [*human, *ours])
    return {"own": own, "others": others}, unended


def scored(study: Study, prm: Path, name: str, source: Path) -> Scored:
    """Stage 4: the rows of a file, with the scores of a model in several aggregates."""
    output = study.folder / "scores" / f"{prm.parent.name}-{prm.name}-{source.name}"
    options = ScoreOptions(token_rewards=True, placed=Placed(device="cpu", tokens=2048))
    torch.set_num_threads(study.threads)
    score(prm, source, output, options, resume=output.exists())
    return Scored.of(name, read(output))


def account(study: Study, arms: dict[str, list[int]]) -> Row:
    """What training and sampling took: tokens with those of prompts, and seconds."""

    def run(folder: str, until: int | None = None) -> Row:
        lines = [line for line in read_metrics(study.folder / folder / "metrics.jsonl") if line["step"] > 0][:until]
        sums = {key: sum(line.get(key, 0) for line in lines) for key in ("tokens", "seconds/step")}
        last = {
            key.partition("/")[2]: value
            for key, value in lines[-1].items()
            if key in ("policy/loss", "prm/reward_gap", "prm/ess_fraction", "prm/log_z")
        }
        return {"updates": len(lines), "tokens": sums["tokens"], "seconds": round(sums["seconds/step"])} | last

    sampled = {}
    for name in ("problems", "held_out"):
        rows = read(study.folder / f"{name}_rollouts.jsonl")
        sampled[name] = {
            "responses": len(rows),
            "tokens": sum(len(row["response_ids"]) for row in rows),
            "right": sum(row["outcome"] > 0.5 for row in rows),
            "unfinished": sum(not row["finished"] for row in rows),
        }
    passes = study.sizes.problems_per_update / study.sizes.problems
    trained = {
        f"{arm}, {updates} updates": run(f"prm-run-{arm.replace(', ', '-')}", updates) | {"passes": updates * passes}
        for arm, all_updates in arms.items()
        for updates in all_updates
    }
    return {"sft": run("sft-run"), "sampled": sampled, "prm": trained}


def study_gsm8k(study: Study, arms: dict[str, list[int]]) -> Row:
    """All stages.

    Args:
        study: data, models and sizes.
        arms: of ARMS; for each the numbers of updates after which its PRM is judged, increasing.

    Returns:
        `sizes`, `account`, `left_out` (solutions that do not end) and `figures`, for `own` and `others`.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    split(study)
    train_sft(study)
    files, unended = test_files(study)
    models = {
        START: as_prm(start_model(study), study.folder / "as-prm" / "start"),
        SFT: as_prm(study.sft, study.folder / "as-prm" / "sft"),
    }
    for arm, all_updates in arms.items():
        models |= {f"PRM, {arm}, {updates} updates": train_prm(study, arm, updates) for updates in all_updates}
    result: Row = {"sizes": asdict(study.sizes), "account": account(study, arms), "left_out": unended, "figures": {}}
    for name, source in files.items():
        result["figures"][name] = figures([scored(study, prm, label, source) for label, prm in models.items()])
    return result


def command(options: argparse.Namespace) -> str:
    """The call without the paths of this machine."""
    given = "--model DIR " + "--gguf FILE " * (options.gguf is not None)
    given += f"--train train.jsonl --solutions example_model_solutions.jsonl --arms {shlex.quote(options.arms)} "
    given += f"--updates {' '.join(map(str, options.updates))}"
    changed = [field for field in fields(Sizes) if getattr(options, field.name) != field.default]
    given += "".join(f" --{field.name.replace('_', '-')} {getattr(options, field.name)}" for field in changed)
    return f"python -m bench.gsm8k {given}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="of the start model")
    parser.add_argument("--gguf", metavar="FILE", help="the start model's file in DIR, if it is GGUF")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="GSM8K's train.jsonl")
    parser.add_argument("--solutions", type=Path, required=True, metavar="FILE", help="example_model_solutions.jsonl")
    parser.add_argument("--preset", default="smollm2-gsm8k", help="whose options are used where none is given here")
    parser.add_argument("--arms", default="value", help='which PRMs, such as "value;logprob"')
    parser.add_argument("--updates", type=int, nargs="+", default=[24], help="after which PRMs are judged, increasing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/gsm8k"), help="models, runs and files")
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu/gsm8k.json"))
    for field in fields(Sizes):
        default: Any = field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    arms = options.arms.split(";")
    if unknown := sorted(set(arms) - set(ARMS)):
        parser.error(f"--arms: {', '.join(unknown)}; there are {'; '.join(ARMS)}")
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
    places = {name: getattr(options, name) for name in ("folder", "model", "gguf", "train", "solutions")}
    study = Study(sizes=sizes, preset=options.preset, threads=options.threads, **places)
    about = {"date": datetime.date.today().isoformat(), "threads": options.threads} | machine()
    content = {"command": command(options), "machine": about} | study_gsm8k(study, dict.fromkeys(arms, options.updates))
    save(options.output, content, page(content))
    print(page(content))


if __name__ == "__main__":
    main()
