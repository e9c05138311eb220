"""Measures the errors, the time and the memory of a case's contenders on this machine."""

import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Inputs, make_inputs
from bench.contenders import CONTENDERS, CannotRun, Contender, Values, run, token_losses
from bench.peers import load_peer

CHECKED_ROWS = 256
# The largest error of a correct result, relative to the largest value. It allows for logits that are rounded to
# bfloat16, as in eager PyTorch.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}

MIN_ROUNDS, MAX_ROUNDS = 3, 9


def step(contender: Contender, inputs: Inputs, case: Case) -> Values | None:
    """One step of the task: values, or a loss and its gradients in ``.grad``."""
    values, loss = run(contender, inputs, case)
    if loss is not None:
        loss.backward()
    return values


def drop_gradients(inputs: Inputs) -> None:
    for leaf in inputs.leaves():
        leaf.grad = None


def truth_of(case: Case, device: str, rows: int = CHECKED_ROWS) -> dict[str, Tensor]:
    """Values or gradients, computed in float64 from the inputs in the case's dtype, of ``rows`` rows at most."""
    inputs = make_inputs(case, device, min(case.num_rows, rows))
    exact = Inputs(
        inputs.hidden.detach().double().requires_grad_(inputs.hidden.requires_grad),
        inputs.weight.detach().double().requires_grad_(inputs.weight.requires_grad),
        inputs.targets,
        inputs.advantage.double(),
    )
    logits = exact.hidden if case.task == "logits" else F.linear(exact.hidden, exact.weight)
    logprobs = F.log_softmax(logits, dim=-1)
    values = Values(
        logprobs.gather(-1, exact.targets.clamp(min=0)[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(dim=-1)
    )
    if case.task == "score":
        return {"logprob": values.logprob, "entropy": values.entropy}
    token_losses(values, exact, case, slice(None)).sum().backward()
    return _gradients(exact)


def _gradients(inputs: Inputs) -> dict[str, Tensor]:
    named = {"dhidden": inputs.hidden, "dweight": inputs.weight}
    return {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}


def errors_of(
    contender: Contender, case: Case, device: str, truth: dict[str, Tensor], rows: int = CHECKED_ROWS
) -> dict[str, float]:
    """Largest error of each result, relative to its largest value, of as many rows as in :func:`truth_of`.
    ValueError if a result is missing."""
    inputs = make_inputs(case, device, min(case.num_rows, rows))
    values = step(contender, inputs, case)
    if values is None:
        results = _gradients(inputs)
    else:
        assert values.entropy is not None
        results = {"logprob": values.logprob, "entropy": values.entropy}
    errors = {}
    for name, expected in truth.items():
        if name not in results:
            raise ValueError(f"gives no {name}")
        kept = inputs.counts if name in ("logprob", "entropy") else slice(None)
        difference = (results[name][kept].double() - expected[kept]).abs().max()
        errors[name] = (difference / expected[kept].abs().max()).item()
    return errors


def wrong_result(errors: dict[str, float], case: Case) -> str | None:
    """Why a contender with these errors is not timed; None if they are its dtype's rounding."""
    for name, error in errors.items():
        if not error <= TOLERANCE[case.dtype]:
            return f"{name} is {error:.2g} off: not the same result"
    return None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def yardstick(case: Case, inputs: Inputs) -> Callable[[], object]:
    """A function for one bare matrix product of the case's shape and dtype; for given logits, for one copy of them."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    if case.task == "logits":
        copied = torch.empty_like(hidden)
        return lambda: copied.copy_(hidden)
    product = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    return lambda: torch.mm(hidden, weight.T, out=product)


def times_of(
    contenders: list[Contender], case: Case, device: str, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each round by contender, the yardstick's under ``""``; and for those that could not run, why.

    Each round runs every contender once, each time beginning with another one. A contender leaves the rounds when it
    has used ``seconds`` in at least MIN_ROUNDS rounds.
    """
    inputs = make_inputs(case, device)
    functions: dict[str, Callable[[], object]] = {"": yardstick(case, inputs)}
    for contender in contenders:
        functions[contender.name] = lambda contender=contender: step(contender, inputs, case)
    times: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for name, function in functions.items():
        try:
            function()  # warm-up
            times[name] = []
        except Exception as error:  # mostly out of memory: it is reported
            reasons[name] = reason_of(error)
        drop_gradients(inputs)
    names = list(times)
    for round_index in range(MAX_ROUNDS):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            if len(times[name]) >= MIN_ROUNDS and sum(times[name]) > seconds:
                continue
            times[name].append(timed(functions[name], device))
            drop_gradients(inputs)
    return times, reasons


def reason_of(error: Exception) -> str:
    """Why a contender cannot run a case, in one line."""
    if isinstance(error, CannotRun):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error}"
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def spread(times: list[float]) -> dict[str, Any]:
    """Median and quartiles, in seconds, with the rounds that they are of."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "rounds": len(times), "seconds": times}


def extra_bytes_of(contender: Contender, case: Case, device: str) -> int:
    """Peak memory of a step in bytes, without inputs and gradients; on a CPU, for the process of :func:`main` only."""
    inputs = make_inputs(case, device)
    step(contender, inputs, case)  # a warm-up: libraries are loaded, kernels compiled
    drop_gradients(inputs)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _C_LIBRARY.malloc_trim(0)
        before = _kibibytes("/proc/self/status", "VmRSS") * 1024
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    step(contender, inputs, case)
    synchronize(device)
    on_cpu = device == "cpu"
    peak = _kibibytes("/proc/self/status", "VmHWM") * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    gradients = sum(leaf.grad.nbytes for leaf in inputs.leaves() if leaf.grad is not None)
    return max(0, peak - before - gradients)


_C_LIBRARY = ctypes.CDLL(None)


def _kibibytes(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"this system's {file} has no {field}: memory on a CPU is measured on Linux only")


def memory_of(contenders: list[Contender], case: Case, device: str) -> dict[str, int | str]:
    """Bytes by contender, or why it could not run.

    On a CPU, a separate process measures, whose allocator returns freed memory to the system.
    """
    if device == "cuda":
        return _memory_here(contenders, case, device)
    names = [contender.name for contender in contenders]
    request = json.dumps({"case": case._asdict(), "contenders": names, "threads": torch.get_num_threads()})
    # The modules of this process: this checkout's first, and those of --peer in the folder where it was started.
    checkout = str(Path(__file__).parents[1])
    paths = [checkout, *(path or os.getcwd() for path in sys.path if path != checkout)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    child = subprocess.run(
        [sys.executable, "-m", "bench.measure", request], env=environment, capture_output=True, text=True
    )
    if child.returncode:
        raise RuntimeError(f"measuring the memory of {case.name} failed:\n{child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])


def _memory_here(contenders: list[Contender], case: Case, device: str) -> dict[str, int | str]:
    result: dict[str, int | str] = {}
    for contender in contenders:
        try:
            result[contender.name] = extra_bytes_of(contender, case, device)
        except Exception as error:
            result[contender.name] = reason_of(error)
    return result


def main() -> None:
    """The process that :func:`memory_of` starts: prints its measurements as JSON."""
    # With a fixed threshold, glibc returns every large block to the system when it is freed.
    mmap_threshold = -3
    _C_LIBRARY.mallopt(mmap_threshold, 1 << 20)
    # A contender that needs more memory than there is gets an error, and no process is killed.
    available = _kibibytes("/proc/meminfo", "MemAvailable") * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (available, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    known = {contender.name: contender for contender in CONTENDERS}
    contenders = [known[name] if name in known else load_peer(name) for name in request["contenders"]]
    print(json.dumps(_memory_here(contenders, Case(**request["case"]), "cpu")))


if __name__ == "__main__":
    main()
