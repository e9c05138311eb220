"""Benchmarks, one file each: the format of their data, what a model is asked, and what judges its responses."""

from repirl.evals.benchmark import Benchmark, Problem, Sampling
from repirl.evals.gsm8k import GSM8K

__all__ = ["BENCHMARKS", "Benchmark", "Problem", "Sampling"]

# Those whose responses are judged, by their names on the command line.
BENCHMARKS = {benchmark.name: benchmark for benchmark in (GSM8K,)}
