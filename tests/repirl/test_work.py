"""Timers add up, and peak memory starts anew."""

import subprocess
import sys
import time

import pytest
from shared import CPU

from repirl.work import PhaseTimer, peak_memory_bytes, reset_peak_memory


def test_timer_adds_up_by_phase():
    timer = PhaseTimer()
    for _ in range(2):
        with timer("a"):
            time.sleep(0.01)
    with pytest.raises(RuntimeError, match="x"), timer("b"):
        raise RuntimeError("x")
    metrics = timer.step_metrics()
    assert set(metrics) == {"seconds/a", "seconds/b", "seconds/step"}
    assert 0.02 <= metrics["seconds/a"] <= metrics["seconds/step"]
    assert set(timer.step_metrics()) == {"seconds/step"}


def test_peak_memory_starts_anew_after_a_reset():
    block = bytearray(200 * 2**20)
    high = peak_memory_bytes(CPU)
    assert high >= len(block)
    del block
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < high - 100 * 2**20


def test_a_learner_needs_nothing_of_what_is_shown():
    code = "import sys, repirl.learner; sys.exit(any(name in sys.modules for name in ('rich', 'repirl.report')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
