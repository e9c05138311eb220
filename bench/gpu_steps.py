"""Steps of ``bench/gpu.py`` that have no command of their own: ``python -m bench.gpu_steps STEP --result FILE``.

Each step writes its results to the file as soon as it has them, so that they are kept however the step ends.
"""

import argparse
import csv
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = Callable[..., None]

STEP_SHAPE = (16384, 4096, 131072)


def main(arguments: Sequence[str] | None = None) -> int:
    steps = {
        "machine": machine,
        "tests": tests,
        "large": large,
        "training": training,
        "profile": profile,
        "counters": counters,
        "step": one_step,
    }
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=list(steps))
    parser.add_argument("--result", type=Path, required=True, metavar="FILE", help="where figures are written")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    recorded: dict[str, Any] = {}

    def record(**values: Any) -> None:
        recorded.update(values)
        partial = options.result.with_suffix(".partial")
        partial.write_text(json.dumps(recorded, indent=1) + "\n")
        partial.replace(options.result)

    return steps[options.step](options, record) or 0


def machine(options: argparse.Namespace, record: Record) -> None:
    """Describe the machine, and measure how fast it copies and multiplies."""
    import torch
    import triton
    from repirl_kernels import choose_backend

    record(
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        backend=choose_backend(options.device, torch.bfloat16),
        cores=len(os.sched_getaffinity(0)),
    )
    on_gpu = options.device == "cuda"
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        record(
            gpu=properties.name,
            gpu_memory_gib=round(properties.total_memory / 2**30, 1),
            multiprocessors=properties.multi_processor_count,
            capability=f"{properties.major}.{properties.minor}",
            cuda=torch.version.cuda,
        )
        if shutil.which("nvidia-smi"):
            fields = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
            values = subprocess.run(command, capture_output=True, text=True).stdout.strip().split(", ")
            record(nvidia_smi=dict(zip(fields.split(","), values, strict=False)))
    source = torch.randn(2**30 if on_gpu else 2**18, device=options.device)
    seconds = median_seconds(functools.partial(torch.empty_like(source).copy_, source), options)
    record(copy={"bytes": 8 * source.numel(), "seconds": seconds, "gb_per_s": 8 * source.numel() / seconds / 1e9})
    size = 8192 if on_gpu else 256
    products = {}
    for name, dtype, out_dtype in (
        ("bf16", torch.bfloat16, None),
        ("bf16 to fp32", torch.bfloat16, torch.float32),
        ("fp32", torch.float32, None),
    ):
        if out_dtype is not None and not on_gpu:
            continue  # CUDA only
        a, b = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
        keywords = {} if out_dtype is None else {"out_dtype": out_dtype}
        seconds = median_seconds(functools.partial(torch.mm, a, b, **keywords), options)
        products[name] = {"size": size, "seconds": seconds, "tflop_per_s": 2 * size**3 / seconds / 1e12}
        record(products=products)


def tests(options: argparse.Namespace, record: Record) -> int:
    """Run the ops' tests, except those of large shapes; on a CPU, a few of them in Triton's interpreter."""
    if options.device == "cpu":
        return _pytest(record, ["tests/gpu/test_edge_cases_on_gpu.py", "-k", "edge_case_10 or edge_case_14"])
    workers = ["-n", str(min(8, len(os.sched_getaffinity(0))))] if importlib.util.find_spec("xdist") else []
    return _pytest(record, ["tests/gpu/test_gpu_ops.py", "tests/gpu/test_edge_cases_on_gpu.py", *workers])


def large(options: argparse.Namespace, record: Record) -> int:
    """Run the tests that need much memory, one after the other."""
    return _pytest(record, ["tests/gpu/test_large_shapes.py"])


def training(options: argparse.Namespace, record: Record) -> int:
    """Run the trainer's tests."""
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    return _pytest(record, ["tests/gpu/test_training_on_gpu.py", *workers])


def _pytest(record: Record, arguments: list[str]) -> int:
    # The machine's pytest may be older than the version that the project requires.
    flags = ["-v", "-p", "no:cacheprovider", "--tb=short", "-o", "minversion=7.0"]
    command = [sys.executable, "-m", "pytest", *flags, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    unsuccessful: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        test, outcome = outcome_of(line)
        if outcome:
            counts[outcome] += 1
            unsuccessful += [test] * (outcome in ("failed", "error"))
            record(**counts, unsuccessful=unsuccessful)
    return process.wait()


def outcome_of(line: str) -> tuple[str, str]:
    """``(test, outcome)`` from a line that pytest prints for a test, with one worker or several; else empty strings."""
    words = "PASSED|FAILED|ERROR|SKIPPED"
    alone = re.match(rf"(tests/\S+::.*?) ({words})\b", line)
    worker = re.match(rf"\[gw\d+\] \[ *\d+%\] ({words}) (tests/\S+::.*)", line)
    if alone:
        return alone[1], alone[2].lower()
    return (worker[2].strip(), worker[1].lower()) if worker else ("", "")


def profile(options: argparse.Namespace, record: Record) -> None:
    """Measure the time of each kernel in one forward and backward pass of both linear ops."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = options.device == "cuda"
    shape = STEP_SHAPE if on_gpu else (64, 64, 1000)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    ops = {}
    for name, step in _training_steps(options, shape).items():
        step()
        with torch.profiler.profile(activities=activities) as profiler:
            step()
        kernels = []
        for event in profiler.key_averages():
            # An operator's row repeats the time of its kernels, which have rows of their own.
            if event.device_type != (DeviceType.CUDA if on_gpu else DeviceType.CPU):
                continue
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if microseconds > 0:
                kernels.append({"name": event.key[:120], "calls": event.count, "milliseconds": microseconds / 1e3})
        kernels.sort(key=lambda row: -row["milliseconds"])
        total = sum(row["milliseconds"] for row in kernels)
        for row in kernels:
            row["share"] = row["milliseconds"] / total
        ops[name] = {"total_milliseconds": total, "kernels": kernels[:25]}
        record(shape=shape, ops=ops)


def _training_steps(options: argparse.Namespace, shape: tuple[int, int, int]) -> dict[str, Callable[[], None]]:
    import torch
    from repirl_kernels import linear_token_loss, linear_token_stats

    num_rows, num_features, num_columns = shape
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, num_features, device=options.device).bfloat16().requires_grad_()
    weight = torch.randn(num_columns, num_features, device=options.device).mul_(3 / num_features**0.5).bfloat16()
    weight.requires_grad_()
    targets = torch.randint(num_columns, (num_rows,), device=options.device)

    def finish() -> None:
        hidden.grad = weight.grad = None
        if options.device == "cuda":
            torch.cuda.synchronize()

    def stats_step() -> None:
        stats = linear_token_stats(hidden, weight, targets)
        (stats.logprob + 0.01 * stats.entropy).sum().backward()
        finish()

    def loss_step() -> None:
        def loss_fn(stats, rows):  # type: ignore[no-untyped-def]
            return stats.logprob + 0.01 * stats.entropy

        linear_token_loss(hidden, weight, targets, loss_fn).loss.backward()
        finish()

    return {"linear_token_stats": stats_step, "linear_token_loss": loss_step}


def one_step(options: argparse.Namespace, record: Record) -> None:
    """The training step of which ``counters`` reads the hardware counters."""
    _training_steps(options, (8192, 4096, 131072))["linear_token_stats"]()


def counters(options: argparse.Namespace, record: Record) -> int:
    """Read hardware counters of the linear kernels with Nsight Compute (``ncu``), if installed, at unchanged clocks."""
    if shutil.which("ncu") is None:
        record(reason="ncu is not installed")
        return 0
    child = [sys.executable, "-m", "bench.gpu_steps", "step", "--result", f"{options.result}.step"]
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
    command = ["ncu", "--clock-control", "none", "--kernel-name", "regex:linear_(forward|dlogits)_kernel"]
    command += ["--launch-count", "2", "--csv", "--page", "details"]
    command += [word for section in sections for word in ("--section", section)]
    done = subprocess.run([*command, *child], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    record(counters=counters_of(done.stdout))
    return done.returncode


def counters_of(output: str) -> dict[str, dict[str, str]]:
    """``{kernel: {"section: metric": "value unit"}}`` from the CSV that ``ncu`` prints among other lines."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name"):
            metrics = kernels.setdefault(row["Kernel Name"], {})
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            metrics[f"{row['Section Name']}: {row['Metric Name']}"] = value
    return kernels


def median_seconds(function: Callable[[], Any], options: argparse.Namespace) -> float:
    """Median seconds of at least five runs, and of as many as fit in 0.3 s (on a CPU: of two)."""
    import torch

    if options.device == "cpu":
        times = []
        for _ in range(2):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    for _ in range(2):
        function()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    while len(times) < 5 or (sum(times) < 0.3 and len(times) < 100):
        events[0].record()
        function()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]) / 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
