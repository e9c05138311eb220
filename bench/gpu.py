"""Runs everything that needs a GPU, within a few minutes, on a machine that has only a GPU and PyTorch.

    python bench/gpu.py wheels --to WHEELS                       beforehand, with network: see bench/gpu_wheels.py
    python bench/gpu.py --out DIR [--wheels WHEELS] [--call 1]   at most 480 s: tests, benchmark, candidates, a profile
    python bench/gpu.py --out DIR [--wheels WHEELS] --call 2     at most 180 s: the headline cases once more

It needs no network to run. The most important steps come first: there is time for the tests and the headline cases
even if each step uses its whole time limit; the later steps run only if time is left. Each step is a separate process
with a time limit, so a step that crashes or hangs does not affect the others, and its results up to then are kept.
Three files are written to ``DIR`` every two seconds: ``gpu.json`` (all steps), ``ops.json`` (the benchmark, as
``bench.run`` writes it) and ``logs.tar.gz``. When this process ends, for any reason, all others end, too. To try the
script itself, ``--device cpu`` runs on tiny shapes what does not need a GPU.
"""

import argparse
import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if os.fspath(ROOT) not in sys.path:  # for a script, Python searches only the script's folder
    sys.path[:0] = [os.fspath(ROOT), os.fspath(ROOT / "kernels")]

from bench import gpu_wheels  # noqa: E402
from bench.turns import VARIABLE, go_file, ready_file  # noqa: E402

# Placeholders in a step's arguments: the file of its results, and the folder of the installed packages.
RESULT, INSTALLED = "{result}", "{installed}"
# No step is started with less time left, in seconds.
SHORTEST = 8.0
WRITE_EVERY = 2.0
MAX_RUNNING = 12
# For steps that take turns: how many are loaded at the same time, and the most seconds that loading may take.
MAX_LOADED = 5
LONGEST_LOADING = 180.0
# Candidates of bench/candidates.py, the most important first.
CANDIDATES = (
    "forward-pointer",
    "forward-flat-128x256x64x4",
    "forward-gluon-128x256x64x4",
    "forward-cublas-32",
    "dlogits-pointer-128",
    "dlogits-tma-128",
    "dlogits-tmastore-128",
    "products-128",
    "products-256",
    "backward-128",
    "backward-256",
    "backward-512",
    "forward-flat-128x256x64x3",
    "forward-flat-128x128x64x4",
    "forward-cublas-64",
    "forward-cublas-16",
    "dlogits-cublas-32",
    "dlogits-tma-256",
    "forward-nested-128x256x64x4",
)
CANDIDATES_ON_CPU = ("forward-pointer", "forward-flat-128x256x64x4", "dlogits-tma-128")

# Runs a command in its own process group, and ends that group when the reading end of the pipe closes: then the process
# that started it is gone.
SUPERVISOR = """
import os, select, signal, subprocess, sys
pipe, command = int(sys.argv[1]), sys.argv[2:]
signal.signal(signal.SIGTERM, signal.SIG_DFL)
process = subprocess.Popen(command)
poll = select.poll()
poll.register(pipe, select.POLLHUP)
while process.poll() is None:
    if poll.poll(200):
        os.killpg(0, signal.SIGKILL)
sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)
"""


class Step(NamedTuple):
    """A Python command with a time limit in seconds."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    """Seconds; for a step that takes turns, they count from the start of its turn."""
    needs_gpu: bool = False
    takes_turns: bool = False
    """Whether it calls ``wait_for_turn`` (``bench/turns.py``): one such step at a time has the GPU."""
    after: str = ""
    """The name of another step. If that one fails, this one is not run."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["wheels"]:
        return gpu_wheels.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or {1: 470.0, 2: 170.0}[options.call]
    stages = plan(options)
    if options.steps:
        names = [step.name for stage in stages for step in stage]
        unknown = [word for word in options.steps if not any(word in name for name in names)]
        if unknown:
            parser.error(f"--steps: no step's name has {unknown[0]!r}; there are {', '.join(names)}")
        stages = [[step for step in stage if any(word in step.name for word in options.steps)] for stage in stages]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("gpu.py: ended by a signal"))
    with tempfile.TemporaryDirectory() as work:
        runner = Runner(options, Path(work), arguments)
        try:
            for stage in [installs(options.wheels), *stages]:
                runner.run(stage)
        finally:
            runner.close()
    return int(any(step["status"] not in ("ok", "skipped") for step in runner.results["steps"].values()))


def installs(folder: Path | None) -> list[Step]:
    """Unpack peers from wheels, and from archives of packages that are too large as wheels."""
    files = sorted(folder.iterdir()) if folder else []
    wheels = tuple(os.fspath(file.resolve()) for file in files if file.suffix == ".whl")
    words = ("-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--quiet", "--target", INSTALLED)
    steps = [Step("install wheels", words + wheels, 25)] * bool(wheels)
    code = "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter='fully_trusted')"
    for file in files:
        if file.name.endswith(".tar.xz"):
            steps.append(Step(f"install {file.name}", ("-c", code, os.fspath(file.resolve()), INSTALLED), 25))
    return steps


def plan(options: argparse.Namespace) -> list[list[Step]]:
    """The steps, in the order in which they run; those of one stage run at the same time."""
    gpu = options.device == "cuda"
    here = ("--device", options.device)

    def child(name: str, limit: float, needs_gpu: bool = False) -> Step:
        return Step(name, ("-m", "bench.gpu_steps", name, "--result", RESULT, *here), limit, needs_gpu)

    def case(only: str, limit: float, peers: str, of: str = "") -> Step:
        profile = ("--profile", "gpu" if gpu else "test", "--seconds", "0.4" if gpu else "0.01")
        words = ("-m", "bench.run", *here, *profile, "--only", only, "--peers", *peers.split(), "--json", RESULT)
        return Step(f"benchmark {only}{of}", words, limit, takes_turns=True)

    def candidate(name: str, limit: float, *sizes: int, first_try: bool = False) -> Step:
        sizes = sizes if gpu else (20, 64, 104)
        words = ("-m", "bench.candidates", name, *here, "--json", RESULT)
        words += tuple(f"--{axis}={size}" for axis, size in zip(("rows", "features", "columns"), sizes, strict=True))
        if first_try:
            return Step(f"try {name}", words, limit)
        return Step(f"candidate {name}", words, limit, takes_turns=True, after=f"try {name}" if gpu else "")

    largest, qwen = "4096x131072 16384x4096x131072 bf16", "Qwen2.5-3B 8192x2048x151936 bf16"
    if options.call == 2:
        peers = "ours eager liger"
        return [
            [child("machine", 20)],
            [case(f"{largest} policy+entropy", 65, peers), case(f"{qwen} policy+entropy", 55, peers)],
        ]
    # Liger's kernels are compiled at their first use. They run beside ours alone, so that other contenders do not wait.
    headline = [
        case(f"{largest} policy+entropy", 60, "ours eager trl"),
        case(f"{largest} policy+entropy", 80, "ours liger", of=", beside Liger"),
        case(f"{largest} score", 40, "ours eager trl"),
        case(f"{qwen} policy+entropy", 45, "ours eager trl"),
        case("Llama-3-8B 8192x4096x128256 bf16 policy+entropy, 60% masked", 40, "ours trl"),
        case("Llama-3-8B 8192x4096x128256 bf16 logits", 35, "ours eager trl"),
    ]
    if not gpu:
        headline = [case("tiny 32x64x1000 fp32 policy+entropy", 60, "ours eager")]
    more = [
        case(f"{largest} sft", 60, "ours eager liger cut"),
        case("SmolLM2-135M 65536x576x49152 bf16 policy+entropy", 40, "ours eager trl"),
    ]
    # In bfloat16 with float32 weights; sampling is left out, as it takes the longest.
    update = ("-m", "bench.trainers", *here, "--shape", "qwen3-0.6b", "--compute-dtype", "bfloat16", "--no-rollout")
    update += ("--prompt", "512", "--response", "1024", "--rounds", "1", "--cases", "spread lengths")
    return [
        [child("machine", 30)],
        # The candidates are compiled at the same time. Those that fail or hang here are not run later.
        [child("tests", 100 if gpu else 240)]
        + [candidate(name, 90, 512, 256, 4096, first_try=True) for name in CANDIDATES if gpu],
        headline,
        [candidate(name, 25, 16384, 4096, 131072) for name in (CANDIDATES if gpu else CANDIDATES_ON_CPU)],
        [child("profile", 30)],
        [child("counters", 30, needs_gpu=True)],
        [child("large", 60, needs_gpu=True), child("training", 90, needs_gpu=True)],
        [Step("trainers", (*update, "--json", RESULT), 110, needs_gpu=True)],
        more * gpu,
    ]


@dataclass
class Running:
    step: Step
    process: subprocess.Popen
    start: float
    deadline: float
    has_turn: bool = False


class Runner:
    """Runs stages, and keeps the files in ``options.out`` up to date while it does."""

    script, file = "bench/gpu.py", "gpu.json"

    def __init__(self, options: argparse.Namespace, work: Path, arguments: Sequence[str]) -> None:
        self.options, self.work = options, work
        self.deadline = time.monotonic() + options.seconds
        self.results: dict[str, Any] = {
            "command": " ".join([f"python {self.script}", *arguments]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": options.device,
            "seconds": options.seconds,
            "steps": {},
        }
        options.out.mkdir(parents=True, exist_ok=True)
        self._lifeline = os.pipe()
        self._running: dict[str, Running] = {}
        self._written = 0.0
        self.environment = self._environment()

    def run(self, stage: Sequence[Step]) -> None:
        """Run the steps of a stage at the same time; of those that take turns, at most MAX_LOADED are loaded."""
        waiting = list(stage)
        while waiting or self._running:
            loading = sum(running.step.takes_turns for running in self._running.values())
            while (
                waiting and len(self._running) < MAX_RUNNING and not (waiting[0].takes_turns and loading >= MAX_LOADED)
            ):
                step = waiting.pop(0)
                before = self.results["steps"].get(step.after, {}).get("status", "ok")
                if step.needs_gpu and self.options.device == "cpu":
                    self._finish(step.name, {"status": "skipped", "reason": "needs a GPU"})
                elif before != "ok":
                    self._finish(step.name, {"status": "skipped", "reason": f"{step.after}: {before}"})
                elif self._time_left() < SHORTEST:
                    self._finish(step.name, {"status": "not reached", "reason": "no time was left"})
                else:
                    self._start(step)
                    loading += step.takes_turns
            self._give_turn()
            time.sleep(0.05)
            for name in list(self._running):
                self._look_at(name)
            if time.monotonic() - self._written > WRITE_EVERY:
                self.write()
        self.write()

    def _time_left(self) -> float:
        return self.deadline - time.monotonic() - 2

    def _give_turn(self) -> None:
        """Give the turn to the first step that is ready, if no step has it. Waiting does not count as run time."""
        takers = [running for running in self._running.values() if running.step.takes_turns]
        ready = [running for running in takers if ready_file(self._prefix(running.step)).exists()]
        for running in ready:
            if not running.has_turn:
                running.deadline = math.inf
        if not ready or any(running.has_turn for running in takers):
            return
        first = ready[0]
        if self._time_left() < SHORTEST:
            self._end(first.step.name, "not reached")
            return
        first.start = time.monotonic()
        first.deadline = first.start + min(first.step.limit, self._time_left())
        first.has_turn = True
        go_file(self._prefix(first.step)).touch()

    def close(self) -> None:
        """End all steps that run, and write the files a last time."""
        for name in list(self._running):
            self._end(name, "interrupted")
        os.close(self._lifeline[1])
        os.close(self._lifeline[0])
        self.write()
        print(f"written to {self.options.out / self.file}")

    def write(self) -> None:
        """Write ``gpu.json``, ``ops.json`` and ``logs.tar.gz`` with the results so far."""
        self._written = time.monotonic()
        results, out = self.so_far(), self.options.out
        replace_file(out / "gpu.json", (json.dumps(results, indent=1) + "\n").encode())
        benchmarks = [step for name, step in results["steps"].items() if name.startswith("benchmark ")]
        benchmarks = [step["result"] for step in benchmarks if step.get("result", {}).get("cases")]
        if benchmarks:
            cases = [case for result in benchmarks for case in result["cases"]]
            merged = {**benchmarks[0], "command": self.results["command"], "cases": cases}
            replace_file(out / "ops.json", (json.dumps(merged, indent=1) + "\n").encode())
        self.write_logs()

    def so_far(self) -> dict[str, Any]:
        """The results, with the steps that are running."""
        results = {**self.results, "steps": dict(self.results["steps"])}
        for name, running in self._running.items():
            seconds = round(time.monotonic() - running.start, 1)
            results["steps"][name] = {"status": "running", "seconds": seconds, **self._recorded(name)}
        return results

    def write_logs(self) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=3) as tar:
            for log in sorted(self.work.glob("*.log")):
                tar.add(log, arcname=log.name)
        replace_file(self.options.out / "logs.tar.gz", archive.getvalue())

    def _environment(self) -> dict[str, str]:
        # nvidia-cutlass-dsl adds its second folder to the path by a .pth file, which Python reads in site-packages
        # only.
        installed = self.work / "installed"
        paths = [installed, installed / "nvidia_cutlass_dsl" / "dsl_packages", ROOT / "kernels", ROOT]
        given = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(os.fspath, paths), *([given] if given else [])]),
            "PYTHONUNBUFFERED": "1",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            # Without Liger's check of the targets, which makes the host wait for the GPU.
            "LIGER_SCALED_CE_SM90_VALIDATE_TARGETS": "0",
        }
        if self.options.device == "cpu":
            environment |= {"TRITON_INTERPRET": "1"}
        return environment

    def _prefix(self, step: Step) -> str:
        return os.fspath(self.work / key_of(step.name))

    def _start(self, step: Step) -> None:
        key = key_of(step.name)
        environment = {**self.environment, VARIABLE: self._prefix(step)} if step.takes_turns else self.environment
        places = {RESULT: self.work / f"{key}.json", INSTALLED: self.work / "installed"}
        words = [os.fspath(places.get(word, word)) for word in step.arguments]
        supervisor = [sys.executable, "-I", "-S", "-c", SUPERVISOR, str(self._lifeline[0]), sys.executable, *words]
        with (self.work / f"{key}.log").open("w") as log:
            process = subprocess.Popen(
                supervisor,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self._lifeline[0]],
            )
        now = time.monotonic()
        limit = LONGEST_LOADING if step.takes_turns else step.limit
        self._running[step.name] = Running(step, process, now, now + min(limit, self._time_left()))

    def _look_at(self, name: str) -> None:
        running = self._running[name]
        if running.process.poll() is not None:
            self._end(name, "ok" if running.process.returncode == 0 else "failed")
        elif time.monotonic() > running.deadline:
            self._end(name, "out of time")

    def _end(self, name: str, status: str) -> None:
        running = self._running.pop(name)
        step, process, start, deadline = running.step, running.process, running.start, running.deadline
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # inside a driver call, a process may end late
            process.wait(timeout=10)
        outcome: dict[str, Any] = {
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            "limit": round(deadline - start, 1) if deadline < math.inf else None,
            "command": " ".join(["python", *step.arguments]),
            **self._recorded(name),
        }
        if status != "ok":
            log = (self.work / f"{key_of(name)}.log").read_text(errors="replace")
            outcome |= {"exit_code": process.returncode, "end_of_log": log[-2000:]}
        self._finish(name, outcome)

    def _recorded(self, name: str) -> dict[str, Any]:
        try:
            return {"result": json.loads((self.work / f"{key_of(name)}.json").read_text())}
        except (OSError, ValueError):  # not written yet, or incomplete
            return {}

    def _finish(self, name: str, outcome: dict[str, Any]) -> None:
        self.results["steps"][name] = outcome
        print(summary(name, outcome), flush=True)


def summary(name: str, outcome: dict[str, Any]) -> str:
    """A step in a few lines of text."""
    words = [f"{name:44} {outcome['status']:12}"]
    if "seconds" in outcome:
        words.append(f"{outcome['seconds']:6.1f} s")
    result = outcome.get("result", {})
    words += [str(value) for value in (outcome.get("reason"), *(result.get(key) for key in ("gpu", "reason"))) if value]
    words += [f"{result[key]} {key}" for key in ("passed", "failed", "error", "skipped") if result.get(key)]
    words += [f"\n    unsuccessful: {test}" for test in result.get("unsuccessful", [])[:12]]
    if "copy" in result:
        words.append(f"copy {result['copy']['gb_per_s']:.0f} GB/s")
        for title, row in result.get("products", {}).items():
            words.append(f"{title} {row['tflop_per_s']:.1f} TFLOP/s")
    if name.startswith(("candidate", "try")):
        shown = ("median_ms", "products", "errors", "registers", "spills", "pieces", "error")
        words += [f"{key} {_short(result[key])}" for key in shown if key in result]
    for case in result.get("cases", []):
        for row in case["rows"]:
            figures = row.get("reason") or f"{1e3 * row['median']:8.2f} ms {row['products']:6.2f}"
            memory = f" {row['extra_bytes'] / 2**20:7.0f} MiB" if "extra_bytes" in row else ""
            words.append(f"\n    {row['contender']:28} {figures}{memory}")
    for op, profile in result.get("ops", {}).items():
        words.append(f"\n    {op}: {profile['total_milliseconds']:.1f} ms")
        for row in profile["kernels"][:7]:
            words.append(f"\n    {row['milliseconds']:9.3f} ms {row['share']:6.1%}  {row['name'][:80]}")
    if outcome["status"] not in ("ok", "skipped", "not reached"):
        words.append("\n    " + outcome["end_of_log"][-500:].replace("\n", "\n    "))
    return "  ".join(words)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(entry)}" for key, entry in value.items())
    return str(value)[:200]


def key_of(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def replace_file(file: Path, content: bytes) -> None:
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results and logs go")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--call", type=int, choices=[1, 2], default=1, help="which plan; default 1")
    parser.add_argument("--seconds", type=float, help="for all steps together; default 470, of --call 2: 170")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="what `wheels --to DIR` gathered; default: nothing")
    parser.add_argument("--steps", nargs="+", metavar="WORD", help="only steps with such a word in their name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
