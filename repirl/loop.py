"""The training loop. A row of systems.py says which learners a turn trains, and how.

An online turn is that of rePIRL (Wu et al., ICML 2026, algorithm 1): sample, verify, update the PRM, update the policy.
An offline turn updates the learners on data, without sampling. The code here does not depend on a system's name.
"""

from __future__ import annotations

from collections.abc import Sequence

from repirl.batch import PackedBatch
from repirl.callbacks import Callbacks, any_stops, begin
from repirl.config import Config
from repirl.evaluate import evaluate_run
from repirl.interrupt import Interrupted, Signals, end_with_torchrun
from repirl.lock import locked
from repirl.objectives import Metrics
from repirl.record import record_turn
from repirl.report.profile import profiled
from repirl.report.reporter import Reporter
from repirl.run import Run, build, check_output_dir
from repirl.streams import Scores
from repirl.work import peak_flops_of, peak_memory_bytes


def train(config: Config, *, resume: bool = False, changed: Sequence[str] = (), callbacks: Callbacks = ()) -> int:
    """Train until `config.steps` turns are done, or a callback ends the run. With torchrun all processes call this.

    Args:
        config: the run's configuration.
        resume: go on from the newest complete checkpoint in `config.output_dir`.
        changed: options, models and data that may differ from the checkpoint's (checkpoint/identity.py).
        callbacks: told of each turn (callbacks.py).

    Returns:
        The number of turns that are done, with those before the checkpoint.

    Raises:
        ConfigError: the configuration does not fit the data, the models or the checkpoint.
        RunError: training cannot go on: too many updates that are not finite, or an engine that does not work.
        Interrupted: a signal asked the run to end. The turn was finished and saved, unless a second signal came.
    """
    end_with_torchrun()
    with (
        locked(config.output_dir),
        build(config, resume=check_output_dir(config, resume), changed=changed) as run,
    ):
        return _train(run, callbacks)


def _train(run: Run, callbacks: Callbacks) -> int:
    config, timer = run.config, run.timer
    done = start = run.resume()
    peak_flops = peak_flops_of(config, run.world)
    with Reporter(config, run.world, start) as reporter:
        if start == 0 and run.evaluates and config.eval.every:
            reporter.log(0, evaluate_run(run, 0, reporter) | timer.step_metrics(run.world, peak_flops))
        begin(callbacks, config)
        with Signals(defer=True) as signals:
            for done in range(start + 1, config.steps + 1):
                with profiled(config, run.world, done):
                    metrics = online_turn(run, done - 1, reporter) if config.system.online else offline_turn(run)
                record_turn(run, done, reporter)
                metrics |= run.data.metrics()
                if run.evaluates and config.eval.every and (done % config.eval.every == 0 or done == config.steps):
                    metrics |= evaluate_run(run, done, reporter)
                metrics |= timer.step_metrics(run.world, peak_flops)
                metrics["memory/peak_bytes"] = run.world.maximum(peak_memory_bytes(run.world.device))
                reporter.log(done, metrics)
                ends = any_stops(callbacks, done, metrics, run.world) or done == config.steps
                signal = signals.requested(run.world)
                # After the log, in which every turn of a checkpoint has a line: so its time counts for the next turn.
                with timer("checkpoint"):
                    if config.checkpoint.every and (ends or signal is not None or done % config.checkpoint.every == 0):
                        run.save(done, metrics.get("eval/accuracy"))
                    run.checkpointer.poll()
                if ends:
                    break
                if signal is not None:
                    run.checkpointer.finish()
                    raise Interrupted(signal, run.account(done), is_complete=True)
        run.checkpointer.finish()  # Here, so that an error while the last one is written is an error of the run.
    return done


def offline_turn(run: Run) -> Metrics:
    """Update each learner on data, without sampling."""
    metrics: Metrics = {}
    rollouts = run.next_trajectories()
    for name in run.objectives:
        metrics |= update(run, name, rollouts)
    return metrics


def online_turn(run: Run, turn: int, reporter: Reporter) -> Metrics:
    """One turn of the dual loop: sample and verify rollouts, then update each learner."""
    assert run.sampler is not None
    last = turn + 1 == run.config.steps
    reporter.phase("rollout")
    rollouts, metrics = run.sampler.rollouts(turn, last=last)
    if rollouts is None:
        # No prompt passed rollout.filter.
        return metrics | {f"{name}/skipped": 1 for name in run.objectives}
    with run.timer("old_logprob"):
        metrics |= score_rollouts(run, rollouts)
    run.gate.begin(turn)
    for name in run.objectives:
        reporter.phase(name)
        metrics |= update(run, name, rollouts)
        if name == "policy":
            run.sampler.policy_updated(turn, last=last)
    return metrics | run.gate.metrics()


def score_rollouts(run: Run, rollouts: PackedBatch) -> Metrics:
    """Write log-probabilities under the policy and the reference into the rollouts, and check the sampler's.

    Raises:
        MismatchError: the sampler's log-probabilities are not the policy's.
    """
    assert run.sampler is not None
    outputs = run.learners["policy"].score(rollouts)
    rollouts.write("old_logprob", outputs["logprob"])
    if run.reference is not None:
        run.reference.write(rollouts)
    mismatch = (rollouts.read("old_logprob") - rollouts.read("sampler_logprob")).abs()
    run.sampler.check(mismatch)
    return {"policy/entropy": float(outputs["entropy"].mean()), "rollout/sampler_mismatch_max": float(mismatch.max())}


def update(run: Run, name: str, rollouts: PackedBatch | None) -> Metrics:
    """Make this turn's updates of one learner, with its objective; returns the metrics of the last update."""
    learner, objective = run.learners[name], run.objectives[name]
    with run.timer(name):
        batch = objective.select(rollouts, run.data)
        if batch is not None and objective.reads_reference and run.reference is not None:
            run.reference.complete(batch)
    if batch is None:
        return {f"{name}/skipped": 1}
    metrics: Metrics = {}
    scores = Scores(run.config, run.learners, name, run.timer)
    rate = run.gate.rate(name)
    for _ in range(getattr(run.config, name).updates_per_step if rate > 0 else 0):
        scores.write(batch, objective.reads_learners)
        run.gate.look(name, batch)
        with run.timer(name):
            metrics |= objective.prepare(batch)
            metrics |= learner.update(batch, objective, rate)
    named = {f"{name}/{key}": value for key, value in metrics.items()}
    return named if run.config.system.online else named | {"tokens": batch.num_tokens}
