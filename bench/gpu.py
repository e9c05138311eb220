"""Everything that needs a GPU, on a machine that has nothing but one and PyTorch, in under nine minutes.

    python bench/gpu.py --out DIR [--wheels DIR]
    python bench/gpu.py --out DIR [--wheels DIR] --steps install trainers

makes the package importable, measures the machine's ceilings, tests, times tile shapes, runs the benchmarks beside the
peers that are installed or lie in ``--wheels``, and profiles a step. The second line takes up to eight minutes more: a
policy update beside TRL's trainer, which has to be there, and the PRM's cost. No network is needed. Every step is a
process of its own with a time limit; ``DIR/gpu.json`` is written after each, so one that dies or is cut short costs the
others nothing. ``--device cpu --quick`` runs what can run without a GPU, in about a minute, to try the script itself.
"""

import argparse
import contextlib
import csv
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Seconds that each step may take, in the order in which they run.
LIMITS = {
    "install": 50,
    "machine": 25,
    "tests": 135,
    "large": 45,
    "tiles": 100,
    "benchmark": 120,
    "profile": 30,
    "counters": 30,
    "trainers": 480,
}
GPU_ONLY = ("large", "counters")
ON_REQUEST = ("trainers",)

Record = Callable[..., None]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.child:
        return _child(options)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": "python bench/gpu.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": options.device,
        "quick": options.quick,
        "steps": {},
    }
    with tempfile.TemporaryDirectory() as work:
        environment = _environment(options, Path(work))
        for step in options.steps:
            if step in GPU_ONLY and options.device == "cpu":
                results["steps"][step] = {"status": "skipped", "reason": "needs a GPU"}
            else:
                results["steps"][step] = run_step(step, options, environment, Path(work))
            _write(options.out / "gpu.json", results)
            print(_summary(step, results["steps"][step]), flush=True)
    print(f"written to {options.out / 'gpu.json'}")
    return int(any(step["status"] not in ("ok", "skipped") for step in results["steps"].values()))


def run_step(
    step: str, options: argparse.Namespace, environment: dict[str, str], work: Path, limit: float | None = None
) -> dict[str, Any]:
    """Run a step in a process group of its own; what it has recorded counts however it ends."""
    limit = limit or LIMITS[step]
    result, log = work / f"{step}.json", options.out / f"{step}.log"
    command = [sys.executable, os.fspath(Path(__file__).resolve()), "--child", step, "--result", os.fspath(result)]
    command += ["--out", os.fspath(options.out), "--device", options.device, "--work", os.fspath(work)]
    command += ["--quick"] * options.quick + (["--wheels", os.fspath(options.wheels)] if options.wheels else [])
    if options.device == "cpu" and step in ("tests", "tiles"):
        environment = {**environment, "TRITON_INTERPRET": "1"}
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1), "limit": limit}
    if status != "ok":
        outcome |= {"exit_code": code, "end_of_log": log.read_text(errors="replace")[-2000:]}
    if result.exists():
        outcome |= json.loads(result.read_text())
    return outcome


def _environment(options: argparse.Namespace, work: Path) -> dict[str, str]:
    paths = [work / "site", work / "wheels", ROOT / "kernels", ROOT]
    given = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(os.fspath, paths), *([given] if given else [])]),
        "PYTHONUNBUFFERED": "1",
    }


def _child(options: argparse.Namespace) -> int:
    """One step, in its own process; it records as it goes, in the file that the parent reads."""
    recorded: dict[str, Any] = {}

    def record(**values: Any) -> None:
        recorded.update(values)
        _write(options.result, recorded)

    steps = {
        "install": install,
        "machine": machine,
        "tests": tests,
        "large": large,
        "tiles": time_tiles,
        "benchmark": benchmark,
        "profile": profile,
        "counters": counters,
        "trainers": trainers,
        "forward": forward_once,
    }
    return steps[options.child](options, record) or 0


def install(options: argparse.Namespace, record: Record) -> None:
    """Peers from wheels; then the package with its C++ module where it can be built, else from the sources."""
    wheels = sorted(options.wheels.glob("*.whl")) if options.wheels else []
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--find-links", options.wheels]
        target = ["--quiet", "--target", options.work / "wheels"]
        done = subprocess.run([*command, *target, *wheels], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        record(wheels=[wheel.name for wheel in wheels], wheels_installed=done.returncode == 0)
        print(done.stdout)
    if subprocess.run([sys.executable, "-c", "import repirl_kernels._native"], capture_output=True).returncode == 0:
        record(package="installed already, with its C++ module")
        return
    missing = [name for name in ("cmake", "c++") if shutil.which(name) is None]
    missing += [] if importlib.util.find_spec("nanobind") else ["nanobind"]
    if missing:
        record(package=f"from the sources, without the C++ module: no {', '.join(missing)} here")
        return
    record(package="from the sources, without the C++ module: it did not build")
    build_extension(options.work / "site", options.work / "build")
    record(package="built, with its C++ module")


def build_extension(site: Path, build: Path) -> None:
    """A copy of the package in ``site``, with the C++ module in it."""
    command = [sys.executable, "-m", "nanobind", "--cmake_dir"]
    nanobind = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    definitions = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={nanobind}"]
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *definitions], check=True)
    subprocess.run(["cmake", "--build", build, "--parallel", str(len(os.sched_getaffinity(0)))], check=True)
    # Only now: a package without its module would hide the sources.
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels" / "repirl_kernels", site / "repirl_kernels", ignore=ignore)
    subprocess.run(["cmake", "--install", build, "--prefix", site], check=True)


def machine(options: argparse.Namespace, record: Record) -> None:
    """What this runs on, and its two ceilings: bytes copied and multiply-adds."""
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
            continue  # torch has it on CUDA only
        a, b = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
        keywords = {} if out_dtype is None else {"out_dtype": out_dtype}
        seconds = median_seconds(functools.partial(torch.mm, a, b, **keywords), options)
        products[name] = {"size": size, "seconds": seconds, "tflop_per_s": 2 * size**3 / seconds / 1e12}
        record(products=products)


def tests(options: argparse.Namespace, record: Record) -> int:
    """``tests/gpu`` but for the largest shapes; on a CPU a few of them in Triton's interpreter."""
    if options.device == "cpu":
        return _pytest(options, record, ["tests/gpu/test_edge_cases_on_gpu.py", "-k", "edge_case_10 or edge_case_14"])
    workers = ["-n", str(min(8, len(os.sched_getaffinity(0))))] if importlib.util.find_spec("xdist") else []
    return _pytest(options, record, ["tests/gpu", "--ignore=tests/gpu/test_large_shapes.py", *workers])


def large(options: argparse.Namespace, record: Record) -> int:
    """The tests that want the whole memory, one after the other."""
    return _pytest(options, record, ["tests/gpu/test_large_shapes.py"])


def _pytest(options: argparse.Namespace, record: Record, arguments: list[str]) -> int:
    # The machine's pytest may be older than the one that the project asks for.
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
    """``(test, outcome)`` from a line that pytest prints for a test, by itself or by one of several workers."""
    words = "PASSED|FAILED|ERROR|SKIPPED"
    alone = re.match(rf"(tests/\S+::.*?) ({words})\b", line)
    worker = re.match(rf"\[gw\d+\] \[ *\d+%\] ({words}) (tests/\S+::.*)", line)
    if alone:
        return alone[1], alone[2].lower()
    return (worker[2].strip(), worker[1].lower()) if worker else ("", "")


def time_tiles(options: argparse.Namespace, record: Record) -> None:
    """What tile shapes and sizes cost, fastest first. Nothing is changed by it: those in use stand in ``tiles.py``."""
    import torch
    from repirl_kernels import linear_token_loss
    from repirl_kernels import triton as kernels
    from repirl_kernels.triton import tiles

    on_gpu = options.device == "cuda"
    used = tiles.architecture(torch.device(options.device), interpreted=not on_gpu)
    tables: dict[str, list[dict[str, Any]]] = {}

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device=options.device)

    def rank(title: str, candidates: Sequence[Any], run: Callable, work: float, in_use: Any, check: Callable) -> None:
        """Time ``run(candidate)``, which does ``work`` (1e12 operations or bytes); compare ``check(candidate)``."""
        table = tables[title] = []
        expected = None
        for candidate in candidates:
            row: dict[str, Any] = {"candidate": _plain(candidate), "in_use": candidate == in_use}
            try:
                result = check(candidate).float()
                expected = result if expected is None else expected
                row["difference"] = float((result - expected).abs().max() / expected.abs().max())
                row["seconds"] = median_seconds(functools.partial(run, candidate), options)
                row["tera_per_s"] = work / row["seconds"]
            except Exception as error:  # a shape that the compiler or the GPU refuses is a result
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            table.append(row)
            table.sort(key=lambda row: row.get("seconds", float("inf")))
            record(tables=tables)

    linear = tiles.CANDIDATES if on_gpu else (tiles.LinearTile(16, 32, 32, 1, 1), tiles.LinearTile(32, 32, 32, 1, 1))
    tile = tiles.forward_tile(used, torch.bfloat16, 8, False, False)
    for num_rows, num_features, num_columns in (
        [(8192, 4096, 128256), (8192, 2048, 151936)] if on_gpu else [(20, 64, 99)]
    ):
        case = f"{num_rows}x{num_features}x{num_columns} bf16"
        operations = 2e-12 * num_rows * num_features * num_columns
        hidden = normal(num_rows, num_features).bfloat16().requires_grad_()
        weight = normal(num_columns, num_features).mul_(3 / num_features**0.5).bfloat16().requires_grad_()
        targets = torch.randint(num_columns, (num_rows,), device=options.device)
        upstream = [normal(num_rows) for _ in range(4)]
        operands = (hidden.detach(), weight.detach(), targets, None)
        _, logsumexp, _, _, mean_logit = kernels.linear_forward(*operands, 1.0, None, num_columns)
        saved = (logsumexp.float(), mean_logit, 1.0, None, num_columns)

        def forward(candidate: Any, operands=operands, num_columns=num_columns) -> Any:
            with _replaced(tiles, "forward_tile", lambda *_: candidate):
                return kernels.linear_forward(*operands, 1.0, None, num_columns)[0]

        def forward_in_groups(candidate: int, operands=operands, num_columns=num_columns) -> Any:
            with _replaced(tiles, "GROUP_ROWS", candidate):
                return kernels.linear_forward(*operands, 1.0, None, num_columns)[0]

        def backward(candidate: Any, needed=True, upstream=upstream, operands=operands, saved=saved) -> Any:
            with _replaced(tiles, "backward_tile", lambda *_: candidate):
                return kernels.linear_backward(*upstream, *operands, *saved, needed, False, False)[0]

        def backward_in_slabs(slab_bytes: int, upstream=upstream, operands=operands, saved=saved) -> Any:
            arguments = (*upstream, *operands, *saved, True, True, False)
            return kernels.linear_backward(*arguments, slab_bytes=slab_bytes)[0]

        def loss_in_chunks(chunk_bytes: int, hidden=hidden, weight=weight, targets=targets) -> Any:
            arguments = (hidden, weight, targets, lambda stats, rows: stats.logprob)
            return linear_token_loss(*arguments, chunk_bytes=chunk_bytes, backend="triton").token_loss

        # Without gradients that need a product, what is left of the backward pass is the kernel.
        kernel_alone = functools.partial(backward, needed=False)
        groups = (4, 8, 16, 32)
        slabs = [mib << 20 for mib in ((64, 128, 256, 512) if on_gpu else (1, 128))]
        chunks = [mib << 20 for mib in ((512, 1024, 2048, 4096) if on_gpu else (1, 2048))]
        rank(f"forward, tile, {case}", linear, forward, operations, tile, forward)
        rank(f"gradient of logits, tile, {case}", linear, kernel_alone, operations, tile, backward)
        rank(
            f"forward, rows of tiles, {case}",
            groups,
            forward_in_groups,
            operations,
            tiles.GROUP_ROWS,
            forward_in_groups,
        )
        three = 3 * operations
        rank(f"backward, slab, {case}", slabs, backward_in_slabs, three, tiles.SLAB_BYTES, backward_in_slabs)
        rank(f"loss, chunk, {case}", chunks, loss_in_chunks, three, 2 << 30, loss_in_chunks)

    num_rows, num_columns = (8192, 128256) if on_gpu else (20, 300)
    case = f"{num_rows}x{num_columns} bf16"
    logits = normal(num_rows, num_columns).bfloat16()
    targets = torch.randint(num_columns, (num_rows,), device=options.device)
    upstream = [normal(num_rows) for _ in range(4)]
    _, logsumexp, _, _, mean_logit = kernels.logits_forward(logits, targets, 1.0, None, num_columns)

    def given_forward(candidate: Any) -> Any:
        with _replaced(tiles, "row_tile", lambda *_: candidate):
            return kernels.logits_forward(logits, targets, 1.0, None, num_columns)[0]

    def given_backward(candidate: Any) -> Any:
        arguments = (*upstream, logits, targets, logsumexp.float(), mean_logit, 1.0, None, num_columns)
        with _replaced(tiles, "row_tile", lambda *_: candidate):
            return kernels.logits_backward(*arguments)[:, :256]

    rows = [tiles.RowTile(block, 32768, warps) for block in (2048, 4096, 8192) for warps in (4, 8)]
    rows = rows if on_gpu else [tiles.RowTile(64, 256, 1), tiles.RowTile(128, 256, 1)]
    read = 1e-12 * logits.nbytes
    row_tile = tiles.row_tile(used, False)
    rank(f"given logits, forward, tile, {case}", rows, given_forward, read, row_tile, given_forward)
    rank(f"given logits, backward, tile, {case}", rows, given_backward, 2 * read, row_tile, given_backward)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _plain(candidate: Any) -> Any:
    return candidate._asdict() if hasattr(candidate, "_asdict") else candidate


def benchmark(options: argparse.Namespace, record: Record) -> int:
    """``python -m bench.run``, which writes its results after each case."""
    file = options.out / "benchmark.json"
    quick = ["--profile", "test", "--seconds", "0.01", "--dtype", "fp32", "--task", "policy+entropy", "logits"]
    quick += ["--peers", "ours", "eager"]
    profile = quick if options.quick else ["--profile", "gpu", "--seconds", "0.4"]
    command = [sys.executable, "-m", "bench.run", "--device", options.device, *profile, "--json", os.fspath(file)]
    record(command=" ".join(["python", *command[1:-1], file.name]), file=file.name)
    return subprocess.run(command).returncode


def profile(options: argparse.Namespace, record: Record) -> None:
    """Time by kernel of one forward and backward pass of ``linear_token_stats``."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = options.device == "cuda"
    shape = (8192, 4096, 128256) if on_gpu else (64, 64, 1000)
    step = _training_step(options, shape)
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
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
    record(shape=shape, total_milliseconds=total, kernels=kernels[:25])


def _training_step(options: argparse.Namespace, shape: tuple[int, int, int]) -> Callable[[], None]:
    import torch
    from repirl_kernels import linear_token_stats

    num_rows, num_features, num_columns = shape
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, num_features, device=options.device).bfloat16().requires_grad_()
    weight = torch.randn(num_columns, num_features, device=options.device).mul_(3 / num_features**0.5).bfloat16()
    weight.requires_grad_()
    targets = torch.randint(num_columns, (num_rows,), device=options.device)

    def step() -> None:
        stats = linear_token_stats(hidden, weight, targets)
        (stats.logprob + 0.01 * stats.entropy).sum().backward()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def counters(options: argparse.Namespace, record: Record) -> int:
    """Nsight Compute's counters of the forward kernel, where ``ncu`` is installed. It leaves the clocks alone."""
    if shutil.which("ncu") is None:
        record(reason="ncu is not installed")
        return 0
    child = [sys.executable, os.fspath(Path(__file__).resolve()), "--child", "forward", "--device", "cuda"]
    child += ["--out", os.fspath(options.out), "--result", os.fspath(options.work / "forward.json")]
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
    command = ["ncu", "--clock-control", "none", "--kernel-name", "regex:linear_forward_kernel", "--launch-count", "1"]
    command += [word for section in sections for word in ("--section", section)] + ["--csv", "--page", "details"]
    done = subprocess.run([*command, *child], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    record(counters=counters_of(done.stdout))
    return done.returncode


def trainers(options: argparse.Namespace, record: Record) -> int:
    """``python -m bench.trainers``, which writes its results after each case."""
    needed = ("trl", "datasets", "pydantic", "rich", "yaml")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        record(reason=f"not installed: {', '.join(missing)}")
        return 0
    file = options.out / "trainers.json"
    full = ["--shape", "llama-3.2-1b", "--compute-dtype", "bfloat16", "--prompt", "512", "--response", "1024"]
    quick = ["--shape", "tiny", "--rounds", "1", "--steps", "1", "--response", "24", "--threads", "1"]
    cases = ["--cases", "spread lengths"] if options.quick else []
    command = [sys.executable, "-m", "bench.trainers", "--device", options.device, *(quick if options.quick else full)]
    command += [*cases, "--json", os.fspath(file)]
    record(command=" ".join(["python", *command[1:-1], file.name]), file=file.name)
    return subprocess.run(command).returncode


def counters_of(output: str) -> dict[str, str]:
    """``{"section: metric": "value unit"}`` from the CSV that ``ncu`` prints among other lines."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    return {
        f"{row['Section Name']}: {row['Metric Name']}": f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in csv.DictReader(lines)
        if row.get("Metric Name")
    }


def forward_once(options: argparse.Namespace, record: Record) -> None:
    """What ``counters`` looks at."""
    import torch
    from repirl_kernels import linear_token_stats

    hidden = torch.randn(8192, 4096, device=options.device).bfloat16()
    weight = torch.randn(128256, 4096, device=options.device).bfloat16().mul_(3 / 64)
    linear_token_stats(hidden, weight, torch.randint(128256, (8192,), device=options.device))
    torch.cuda.synchronize()


def median_seconds(function: Callable[[], Any], options: argparse.Namespace) -> float:
    """Median of at least five runs, and of as many as fit in 0.3 s (in quick runs: of two)."""
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


def _summary(step: str, outcome: dict[str, Any]) -> str:
    words = [f"{step:10} {outcome['status']:12}"]
    if "seconds" in outcome:
        words.append(f"{outcome['seconds']:6.1f} s")
    words += [str(outcome[key]) for key in ("reason", "package", "gpu", "backend") if key in outcome]
    words += [f"{outcome[key]} {key}" for key in ("passed", "failed", "error", "skipped") if outcome.get(key)]
    if "copy" in outcome:
        words.append(f"copy {outcome['copy']['gb_per_s']:.0f} GB/s")
    words += [f"{name} {row['tflop_per_s']:.1f} TFLOP/s" for name, row in outcome.get("products", {}).items()]
    for title, rows in outcome.get("tables", {}).items():
        if rows and "seconds" in rows[0]:
            speed = f"{1e3 * rows[0]['seconds']:.2f} ms, {rows[0]['tera_per_s']:.2f} T/s"
            places = [f"number {1 + index} of {len(rows)}" for index, row in enumerate(rows) if row["in_use"]]
            best = rows[0]["candidate"]
            best = "x".join(map(str, best.values())) if isinstance(best, dict) else best
            words.append(f"\n    {title}: {speed} by {best}; in use: {''.join(places) or 'none of these'}")
    for row in outcome.get("kernels", [])[:6]:
        words.append(f"\n    {row['milliseconds']:9.3f} ms {row['share']:6.1%}  {row['name'][:80]}")
    if outcome["status"] in ("failed", "out of time"):
        words.append("\n    " + outcome["end_of_log"][-600:].replace("\n", "\n    "))
    return "  ".join(words)


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results and logs go")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="the benchmark of tiny shapes only")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="wheels of peers, installed without their dependencies"
    )
    usual = [step for step in LIMITS if step not in ON_REQUEST]
    parser.add_argument("--steps", nargs="+", choices=list(LIMITS), default=usual, help="only these")
    for hidden in ("--child", "--result", "--work"):
        parser.add_argument(hidden, type=str if hidden == "--child" else Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
