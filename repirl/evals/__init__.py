"""Benchmarks, one file each: the format of their data, what a model is asked, and what judges its responses."""

from repirl.evals.aime import AIME
from repirl.evals.amc import AMC
from repirl.evals.benchmark import Benchmark, Problem, Sampling
from repirl.evals.gsm8k import GSM8K
from repirl.evals.humaneval import HUMANEVAL, HUMANEVAL_BASE
from repirl.evals.livecodebench import LIVECODEBENCH
from repirl.evals.math500 import MATH500
from repirl.evals.mbpp import MBPP
from repirl.evals.minerva import MINERVA
from repirl.evals.olympiadbench import OLYMPIADBENCH

__all__ = ["BENCHMARKS", "Benchmark", "Problem", "Sampling"]

# Those whose responses are judged, by their names on the command line.
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        GSM8K,
        MATH500,
        AIME,
        AMC,
        MINERVA,
        OLYMPIADBENCH,
        HUMANEVAL,
        HUMANEVAL_BASE,
        MBPP,
        LIVECODEBENCH,
    )
}
