"""`repirl adapt`: test-time training, of a policy on prompts by the rewards of a frozen PRM, without outcomes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from repirl.apps.best_of import mean_and_error, shown_mean
from repirl.apps.prompt_rows import PromptRow, fitted_config, prompts_of, read_prompt_rows
from repirl.apps.score import aggregate_by
from repirl.apps.searcher import score_responses, shown_number
from repirl.apps.solutions import Solution, as_source
from repirl.apps.stop_rule import StopOptions, StopRule
from repirl.apps.trained import Placed, is_run, policy_options, trained_prm
from repirl.checkpoint.manifest import list_checkpoints
from repirl.config import Config, ConfigError, RunError
from repirl.configfile import merge
from repirl.data.prompts import Prompt
from repirl.data.responses import decode_response
from repirl.data.text import find_end_tokens
from repirl.distributed.world import join_world
from repirl.export import export_checkpoint
from repirl.interrupt import Interrupted
from repirl.loop import train
from repirl.models import load_tokenizer
from repirl.options import VerifierConfig
from repirl.output_path import check_folder
from repirl.prm import PRMDescription, read_description
from repirl.report.log import read_metrics
from repirl.rollout.choose import make_engine
from repirl.rollout.engine import sequence_seed
from repirl.rollout.sampler import Sampler
from repirl.run import build_learners, check_output_dir, set_up_process
from repirl.verify.choose import make_verifier
from repirl.work import PhaseTimer

# What the output gets.
WRITTEN = ("run", "policy", "prompts.jsonl", "responses.jsonl", "adapt.json")
# Options that would bring answers or outcomes into training, or are those of the command.
FIXED = (
    "objective",
    "output_dir",
    "steps",
    "policy.model",
    "prm.model",
    "data.train",
    "data.eval",
    "data.answer_column",
    "data.prompt_column",
    "loss.outcome_coefficient",
)


@dataclass(frozen=True)
class AdaptOptions:
    """How a policy is adapted.

    Args:
        stop: when it ends.
        learning_rate: of the policy.
        prompts: of a turn; all, where there are fewer.
        samples: responses to a prompt.
        max_tokens: of a response; None for the 3000 of training or, if it is less, what the model has positions for.
        prompt: which column holds the prompts.
        answer: which column holds the right answers, for the accuracy before and after; None for none. Training never
            sees them.
        seed: of sampling and of the order of the prompts.
        verifier: judges responses before and after.
        placed: how the PRM is loaded before and after, and how many tokens a batch of it may hold.
    """

    stop: StopOptions = field(default_factory=StopOptions)
    learning_rate: float = 1e-6
    prompts: int = 32
    samples: int = 4
    max_tokens: int | None = None
    prompt: str = "prompt"
    answer: str | None = None
    seed: int = 0
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    placed: Placed = field(default_factory=Placed)

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ConfigError(f"--prompts-per-turn is {self.prompts}, expected at least 1")
        if self.samples < 2:
            raise ConfigError(f"--samples is {self.samples}, expected at least 2: each one's baseline is the others")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"--max-tokens is {self.max_tokens}, expected at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--lr is {self.learning_rate}, expected a number above 0")


def adapt(
    policy: str | os.PathLike,
    prm: str | os.PathLike,
    prompts: str | os.PathLike,
    output: str | os.PathLike,
    options: AdaptOptions | None = None,
    *,
    values: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a policy on prompts by the rewards of a frozen PRM, without outcomes, until a rule ends it.

    This is a run of the system `rloo-prm` with loss.outcome_coefficient 0, in OUTPUT/run, on OUTPUT/prompts.jsonl,
    which holds the prompts alone: answers never reach it. It has a KL term to the start (loss.kl_coefficient). Before
    and after it, each prompt gets one response by greedy decoding, which the PRM scores and, where answers are known,
    the verifier judges; both are in OUTPUT/responses.jsonl. OUTPUT/policy gets the policy as the last turn left it, as
    `repirl export` writes it, OUTPUT/adapt.json what is returned.

    Args:
        policy: an exported policy, or any causal language model.
        prm: an exported PRM.
        prompts: JSON lines, CSV, Parquet, a folder of them, or a data set of the hub ("name:split" for a split of it).
        output: a folder.
        options: how; None for the defaults.
        values: options of the configuration that are not to be as by default, such as {"loss": {"gamma": 0.9}}.
        resume: go on with a run that was interrupted, to the result of an uninterrupted one.

    Returns:
        `turns` · `stopped`: "kl", "no gain" or "turns", and `why` in words · `rule`: StopOptions · `kl`: of the last
        turn's rollouts · `evaluations`: the PRM's reward by which it stopped · `prm_reward` and, where answers are
        known, `accuracy`: `before`, `after` and `gain`, each with `mean` and `error`, the standard error over prompts
        (of the gain that of the prompts' differences) · `finished`, `before` and `after`: the share of responses that
        were not cut off · `prompts`, their number, and what was used: `policy`, `prm`, `seed`.

    Raises:
        ConfigError: rows, models or options that cannot be used, or an output that holds another result.
        RunError: training cannot go on, or a file cannot be written.
    """
    options, policy, prm = options or AdaptOptions(), os.fspath(policy), os.fspath(prm)
    folder = check_folder(output, WRITTEN, [prompts, policy, prm])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("repirl adapt works in one process: start it without torchrun")
    if (folder / "adapt.json").exists():
        raise ConfigError(f"--output {str(folder)!r} holds a result already (adapt.json): choose another folder")
    config, rows = _read(policy, prm, os.fspath(prompts), folder, options, values or {})
    check_output_dir(config, resume)
    try:
        before = _answers(config, rows, options, prm)
        rule = _train(config, options)
        export_checkpoint(folder / "run", folder)
        changed = config.policy.model_copy(update={"model": str(folder / "policy")})
        after = _answers(config.model_copy(update={"policy": changed}), rows, options, prm)
    except Interrupted as interruption:
        if not interruption.message and list_checkpoints(folder / "run" / "checkpoints"):
            interruption.message = f"stopped; the run is in {str(folder / 'run')!r}, go on with it by --resume"
        raise
    result = _result(rule, before, after) | {"policy": policy, "prm": prm, "seed": config.seed}
    _write_lines(folder / "responses.jsonl", [_line(*pair) for pair in zip(rows, before, after, strict=True)])
    _write(folder / "adapt.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _read(
    policy: str, prm: str, source: str, folder: Path, options: AdaptOptions, values: Mapping[str, Any]
) -> tuple[Config, list[PromptRow]]:
    """The configuration of the run, and the rows."""
    for model in (policy, prm):
        if is_run(model):
            raise ConfigError(f"{model!r} is a run's folder: export it first, by repirl export --checkpoint {model}")
    for name in FIXED:
        if _holds(values, name.split(".")):
            raise ConfigError(f"--{name} cannot be set here: repirl adapt trains on prompts alone, by a frozen PRM")
    if options.placed.convention is not None:
        raise ConfigError(
            f"--convention {options.placed.convention} cannot be used here: training reads rewards of rePIRL's PRMs"
        )
    described = read_description(prm)
    if described is None:
        raise ConfigError(f"{prm!r} does not say how its rewards are read (config.json, key `repirl`)")
    _check_reference(described, policy, prm)
    given = as_source(source)
    texts = prompts_of(given, options.prompt)
    _write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in texts])
    plain: dict[str, Any] = {
        "objective": "rloo-prm",
        "output_dir": str(folder / "run"),
        "steps": options.stop.max_turns,
        "seed": options.seed,
        "device": "auto" if options.placed.device is None else options.placed.device.partition(":")[0],
        "compute_dtype": "bfloat16" if options.placed.dtype == "bfloat16" else None,
        "policy": {"model": policy, "optimizer": {"lr": options.learning_rate}},
        "prm": {"model": prm, "reward": described.reward, "beta": described.beta, "gamma": described.gamma},
        "data": policy_options(policy) | {"train": str(folder / "prompts.jsonl"), "answer_column": None},
        "rollout": {"prompts_per_step": min(options.prompts, len(texts)), "samples_per_prompt": options.samples},
        # The rewards of a PRM have no scale of their own.
        "loss": {
            "outcome_coefficient": 0.0,
            "process_coefficient": 1.0,
            "process_norm": "std",
            "entropy_coefficient": 0.0,
            "kl_coefficient": 0.01,
        },
        "eval": {"every": 0},
        "checkpoint": {"every": options.stop.every, "keep_last": 1},
        "verifier": options.verifier.model_dump(),
    }
    config, prompts = fitted_config(merge(plain, dict(values)), options.max_tokens)
    if config.loss.kl_coefficient == 0 and options.stop.max_kl is not None:
        raise ConfigError("loss.kl_coefficient is 0, so that no KL is measured: set --max-kl none, too")
    if not config.checkpoint.every:
        raise ConfigError("checkpoint.every is 0, so that there would be no policy to export: leave it out")
    tests = config.verifier.kind == "code"
    return config, read_prompt_rows(given, prompts, options.prompt, options.answer, tests=tests)


def _train(config: Config, options: AdaptOptions) -> StopRule:
    """Train until the rule says stop; a run that goes on may have ended already."""
    rule, run = StopRule(options.stop), Path(config.output_dir)
    checkpoints = list_checkpoints(run / "checkpoints")
    if checkpoints:
        done = int(checkpoints[-1].name.removeprefix("step_"))
        rule.begin([line for line in read_metrics(run / "metrics.jsonl") if line["step"] <= done])
    if not rule.reason:
        train(config, resume=bool(checkpoints), callbacks=[rule])
    return rule


def _holds(values: Mapping[str, Any], keys: Sequence[str]) -> bool:
    value: Any = values
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def _check_reference(described: PRMDescription, policy: str, prm: str) -> None:
    """ConfigError where training would read `implicit` rewards relative to another model than the PRM's own."""
    if described.reward != "implicit":
        return
    reference = None if described.reference is None else described.reference.model
    if reference is None or Path(reference).absolute() != Path(policy).absolute():
        raise ConfigError(
            f"the `implicit` rewards of {prm!r} are relative to {reference!r}, and training reads them relative to the "
            f"policy that it starts from, {policy!r}: start from the former, or use a PRM of another kind"
        )


@dataclass(frozen=True)
class _Answer:
    """A response to a prompt. score: the PRM's; right: None where that is not known."""

    response: str
    finished: bool
    score: float
    right: bool | None


def _answers(config: Config, rows: Sequence[PromptRow], options: AdaptOptions, prm: str) -> list[_Answer]:
    """One response of the policy to each prompt, by greedy decoding, judged and scored."""
    config = set_up_process(config)
    world, timer = join_world(config), PhaseTimer()
    tokenizer = load_tokenizer(config.policy.model, config.policy.gguf_file)
    ends = find_end_tokens(config.data, tokenizer, config.policy.model)
    learner = build_learners(config, world, timer.work, ("policy",))["policy"]
    verifier = make_verifier(config.verifier)
    engine = make_engine(config, learner, tokenizer)
    with closing(Sampler(config, learner, tokenizer, engine, verifier, None, timer)) as sampler:
        asked = [Prompt(row.number, row.token_ids, row.answer) for row in rows]
        seeds = [sequence_seed(config.seed, "adapt", row.number) for row in rows]
        judged = sampler.ask(asked, seeds, 0.0)
    if learner.residency is not None:
        learner.residency.close()
    responses = [
        Solution(row.place, {}, row.prompt, decode_response(response.token_ids, ends, tokenizer), response.ended)
        for row, (response, _) in zip(rows, judged, strict=True)
    ]
    with trained_prm(prm, options.placed) as (loaded, _):
        scores = score_responses(loaded, responses, aggregate_by(loaded, None), options.placed.tokens)
    return [
        _Answer(str(one.response), one.finished, score, None if outcome is None else outcome > 0.5)
        for one, (_, score), (_, outcome) in zip(responses, scores, judged, strict=True)
    ]


def _result(rule: StopRule, before: Sequence[_Answer], after: Sequence[_Answer]) -> dict[str, Any]:
    # A response that was cut off before it had any text has no score.
    scored = [(b.score, a.score) for b, a in zip(before, after, strict=True) if math.isfinite(b.score + a.score)]
    judged = [
        (float(b.right), float(a.right))
        for b, a in zip(before, after, strict=True)
        if b.right is not None and a.right is not None
    ]
    return {
        "turns": rule.turn,
        "stopped": rule.reason,
        "why": rule.described(),
        "rule": asdict(rule.options),
        "kl": rule.kls[-1] if rule.kls else None,
        "evaluations": rule.evaluations,
        "prm_reward": _compared(scored),
        "accuracy": _compared(judged),
        "finished": {"before": fmean(b.finished for b in before), "after": fmean(a.finished for a in after)},
        "prompts": len(before),
    }


def _compared(pairs: Sequence[tuple[float, float]]) -> dict[str, dict[str, float | None]] | None:
    """Means with their standard errors, before, after and of the differences; None without any pair."""
    if not pairs:
        return None
    values = {
        "before": [before for before, _ in pairs],
        "after": [after for _, after in pairs],
        "gain": [after - before for before, after in pairs],
    }
    means = {name: mean_and_error(numbers) for name, numbers in values.items()}
    return {name: {"mean": mean, "error": error} for name, (mean, error) in means.items()}


def _line(row: PromptRow, before: _Answer, after: _Answer) -> dict[str, Any]:
    known = {} if row.answer is None else {"answer": row.answer}
    sides = {
        name: {key: value for key, value in asdict(one).items() if value is not None}
        | {"score": shown_number(one.score)}
        for name, one in {"before": before, "after": after}.items()
    }
    return {"prompt": row.prompt} | known | sides


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def print_result(result: Mapping[str, Any]) -> None:
    """A table of before and after, and why it stopped."""
    from repirl.report.display import print_table

    rows = []
    for name, label in {"prm_reward": "PRM's reward", "accuracy": "accuracy"}.items():
        if (figures := result[name]) is not None:
            rows.append([label, *(shown_mean(**figures[side]) for side in ("before", "after", "gain"))])
    rows.append(["finished", *(f"{result['finished'][side]:.4f}" for side in ("before", "after")), ""])
    print_table(f"{result['prompts']} prompts, greedy decoding", ["", "before", "after", "gain"], rows)
    kl = "" if result["kl"] is None else f"; KL to the start {result['kl']:.4f} nats a token"
    print(f"stopped after {result['turns']} turns: {result['why']}{kl}")
