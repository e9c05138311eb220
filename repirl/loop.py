"""The dual loop of rePIRL (Wu et al., ICML 2026, algorithm 1): sample, verify, update the PRM, update the policy.

Plain RLOO is the same loop without the PRM, supervised fine-tuning the same without rollouts.
"""

from __future__ import annotations

from repirl.batch import PackedBatch
from repirl.config import Config, ConfigError
from repirl.evaluate import evaluate
from repirl.learner import TrainingError
from repirl.objectives import irl, rloo, sft
from repirl.report.reporter import Reporter
from repirl.rollout.engine import MismatchError
from repirl.run import Run, build, check_output_dir
from repirl.sampling import (
    begin_rollouts,
    check_sampler,
    finish_rollouts,
    sample_experts,
    write_expert_streams,
    write_reference,
)
from repirl.work import PhaseTimer, peak_flops_of, peak_memory_bytes


def train(config: Config, *, resume: bool = False) -> int:
    """Train `config.steps` steps, from the newest sound checkpoint with `resume`; returns the steps done in all.

    Under torchrun every process calls it.
    """
    goes_on = check_output_dir(config, resume)
    run = build(config)
    if len(set(run.world.gather([goes_on]))) > 1:
        raise ConfigError(f"output_dir {config.output_dir!r} is not one folder for all processes: only some see a run")
    try:
        _train(run, resume=goes_on)
    except (TrainingError, MismatchError):
        # On all processes alike: a checkpoint that is being written can be completed.
        run.checkpointer.finish()
        run.abort()
        raise
    except BaseException:
        run.abort()
        raise
    run.close()
    return config.steps


def _train(run: Run, *, resume: bool) -> None:
    config = run.config
    start = run.resume() if resume else 0
    timer, peak_flops = PhaseTimer(run.work), peak_flops_of(config, run.world)
    with Reporter(config, run.world, start) as reporter:
        for step in range(start, config.steps):
            metrics: dict[str, float] = {}
            if step == 0 and run.held_out and config.eval.every:
                accuracy = evaluate(run)
                reporter.log(0, {"eval/accuracy": accuracy} | timer.step_metrics(run.world, peak_flops))
            if config.objective == "sft":
                metrics |= sft_step(run, timer)
            else:
                metrics |= dual_step(run, step, timer, reporter)
            done = step + 1
            if run.held_out and config.eval.every and (done % config.eval.every == 0 or done == config.steps):
                with timer("eval"):
                    metrics["eval/accuracy"] = evaluate(run)
            metrics |= timer.step_metrics(run.world, peak_flops)
            metrics["memory/peak_bytes"] = run.world.maximum(peak_memory_bytes(run.world.device))
            reporter.log(done, metrics)
            # After the log: a step that a checkpoint holds has its line. Its seconds count for the next step.
            with timer("checkpoint"):
                if config.checkpoint.every and (done % config.checkpoint.every == 0 or done == config.steps):
                    run.save(done, metrics.get("eval/accuracy"))
                run.checkpointer.poll()
        # What is still being written may fail, and belongs to the run.
        run.checkpointer.finish()


def sft_step(run: Run, timer: PhaseTimer) -> dict[str, float]:
    experts = sample_experts(run)
    with timer("policy"):
        found = [run.policy.update(experts, sft.loss(experts)) for _ in range(run.config.policy.updates_per_step)]
    return _named("policy", found[-1]) | {"tokens": experts.num_tokens}


def dual_step(run: Run, step: int, timer: PhaseTimer, reporter: Reporter) -> dict[str, float]:
    """One turn of the dual loop."""
    config = run.config
    more_to_come = step + 1 < config.steps
    reporter.phase("rollout")
    if run.in_flight is None:
        with timer("push_weights"):
            run.ready_engine()
    with timer("rollout"):
        rollouts, metrics = finish_rollouts(run, step)
    if config.rollout.overlap == "step" and more_to_come:
        # The next step's are sampled from weights that this step is about to improve.
        with timer("push_weights"):
            run.ready_engine()
        begin_rollouts(run, step + 1)
    run.rest_engine()
    with timer("old_logprob"):
        outputs = run.policy.score(rollouts)
        rollouts.write("old_logprob", outputs["logprob"])
        write_reference(run, rollouts)
    mismatch = (rollouts.read("old_logprob") - rollouts.read("sampler_logprob")).abs()
    check_sampler(run, mismatch)
    metrics |= {
        "policy/entropy": float(outputs["entropy"].mean()),
        "rollout/sampler_mismatch_max": float(mismatch.max()),
    }
    for side in ("policy", "prm") if config.order == "policy_first" else ("prm", "policy"):
        reporter.phase(side)
        if side == "policy":
            metrics |= update_policy(run, rollouts, timer)
            if config.rollout.overlap == "prm" and more_to_come:
                with timer("push_weights"):
                    run.ready_engine()
                begin_rollouts(run, step + 1)
        elif run.prm:
            metrics |= update_prm(run, rollouts, timer)
    return metrics


def update_prm(run: Run, rollouts: PackedBatch, timer: PhaseTimer) -> dict[str, float]:
    """n_prm updates on experts against rollouts; two passes each."""
    config, prm = run.config, run.prm
    # log mu: what the trainer says of the weights that sampled. Only the sampler itself knows of older ones, and of
    # adapters that it has rounded together with their base.
    merged = config.adapters is not None and config.rollout.engine != "transformers"
    behaviour = "sampler_logprob" if config.rollout.overlap == "step" or merged else "old_logprob"
    with timer("prm"):
        experts = sample_experts(run)
        write_expert_streams(run, experts)
        batch = irl.training_batch(experts, rollouts, config.irl.use_outcome)
        if batch is None:
            return {"prm/skipped_no_failures": 1}
        for _ in range(config.prm.updates_per_step):
            batch.write("reward", irl.rewards(prm.score(batch), batch, config.prm))
            metrics = irl.write_coefficients(batch, config.irl, behaviour)
            metrics |= prm.update(batch, irl.loss(batch, config.prm, config.irl))
    return _named("prm", metrics)


def update_policy(run: Run, rollouts: PackedBatch, timer: PhaseTimer) -> dict[str, float]:
    """Advantages from outcome and PRM, then n_policy updates."""
    config = run.config
    if run.prm and config.loss.process_coefficient != 0:
        with timer("reward"):
            rollouts.write("reward", irl.rewards(run.prm.score(rollouts), rollouts, config.prm))
    metrics = rloo.write_advantages(rollouts, config.loss)
    with timer("policy"):
        for _ in range(config.policy.updates_per_step):
            loss = rloo.ClippedLoss(rollouts, config.loss, config.rollout.max_response_tokens)
            metrics |= run.policy.update(rollouts, loss) | loss.metrics(run.world)
    return _named("policy", metrics)


def _named(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
