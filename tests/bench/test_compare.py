"""Two runs compared: ratios with their spread, and the exit code."""

import json
from pathlib import Path

import pytest

from bench.compare import compare, main, time_ratio

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "cpu"
LOSS, PEER = "ours: linear_token_loss", "torch.compile"


def times(*seconds: float) -> dict:
    ordered = sorted(seconds)
    middle = ordered[len(ordered) // 2]
    return {"median": middle, "low": ordered[0], "high": ordered[-1], "rounds": len(seconds), "seconds": list(seconds)}


def row(contender: str, *seconds: float, memory: int = 1 << 20, error: float = 1e-6) -> dict:
    figures = {"errors": {"dhidden": error, "dweight": 1e-6}, "extra_bytes": memory}
    return {"contender": contender, "ours": contender.startswith("ours"), **figures, **times(*seconds)}


def result(*rows: dict, yardstick: dict, **changes: object) -> dict:
    content = json.loads((RESULTS / "ops.json").read_text())
    case = content["cases"][1]["case"]
    rows = tuple({"products": r["median"] / yardstick["median"], **r} if "median" in r else r for r in rows)
    measured = {"name": "a case", "case": case, "checked_rows": 256, "rows": list(rows), "yardstick": yardstick}
    return content | {"format": 2, "cases": [measured]} | changes


@pytest.fixture
def files(tmp_path):
    def write(first: dict, second: dict) -> list[str]:
        paths = [tmp_path / "A.json", tmp_path / "B.json"]
        for path, content in zip(paths, (first, second), strict=True):
            path.write_text(json.dumps(content))
        return [str(path) for path in paths]

    return write


def before_and_after(**second: object) -> tuple[dict, dict]:
    """B's machine was half as fast: in products, ours takes 4 instead of 3, the peer 5 as before."""
    first = result(row(LOSS, 3.0, 3.0, 3.3), row(PEER, 5.0, 5.0, 5.0), yardstick=times(1.0, 1.0, 1.1))
    rows = (row(LOSS, 8.0, 8.8, 8.0, memory=1 << 21, error=4e-6), row(PEER, 10.0, 10.0, 10.0))
    return first, result(*rows, yardstick=times(2.0, 2.2, 2.0), **second)


def test_times_are_compared_in_products_of_the_same_rounds():
    first, second = before_and_after()
    ours, peer = compare(first, second)
    assert ours.ratios == pytest.approx({"memory": 0.5, "error": 0.25, "time": 3 / 4})
    # Each round is exactly 3 products, and exactly 4: what made rounds slow is in the yardstick, too.
    assert (ours.low, ours.high) == pytest.approx((3 / 4, 3 / 4))
    assert peer.ratios["time"] == pytest.approx(1.0)
    ours, peer = compare(first, second, "seconds")
    assert ours.ratios["time"] == pytest.approx(3 / 8)
    assert peer.ratios["time"] == pytest.approx(1 / 2)


def test_the_spread_is_that_of_medians_over_resampled_rounds():
    noisy, steady = times(1.0, 2.0, 3.0, 4.0, 5.0), times(*[1.0] * 5)
    ratio, low, high = time_ratio(noisy, steady)
    assert ratio == 3.0
    assert 1.0 <= low <= 2.0
    assert 4.0 <= high <= 5.0
    assert time_ratio(noisy, steady) == (ratio, low, high)
    # Without rounds: opposite quartiles.
    assert time_ratio({"median": 2.0, "low": 1.0, "high": 3.0}, {"median": 4.0, "low": 2.0, "high": 6.0}) == (
        pytest.approx((0.5, 1 / 6, 1.5))
    )


def test_the_exit_code_follows_the_ratios_of_ours(files, capsys):
    paths = files(*before_and_after(cpu="Another", threads=1))
    assert main(paths) == 0
    text = capsys.readouterr().out
    assert "differs: cpu: AMD EPYC / Another; compare products" in text
    assert "differs: threads: 2 / 1; compare with care" in text
    assert main([*paths, "--fail-below", "0.7"]) == 0
    assert "0.75    0.75 to 0.75       1       2       0.25" in capsys.readouterr().out
    assert main([*paths, "--fail-below", "0.8"]) == 1
    assert f"below 0.8: a case, {LOSS}: time 0.75" in capsys.readouterr().out
    assert main([*paths, "--fail-below", "0.7", "--of", "time", "memory", "error"]) == 1
    text = capsys.readouterr().out
    assert f"{LOSS}: memory 0.50" in text
    assert f"{LOSS}: error 0.25" in text
    # A peer of others that became slower is no failure.
    assert main([*paths[::-1], "--fail-below", "0.99"]) == 0


def test_one_of_ours_that_no_longer_runs_is_a_failure(files, capsys):
    first, second = before_and_after()
    second["cases"][0]["rows"][0] = {"contender": LOSS, "ours": True, "reason": "RuntimeError: no"}
    paths = files(first, second)
    assert main(paths) == 0
    assert f"a case, {LOSS} (RuntimeError: no) has figures in A only" in capsys.readouterr().out
    assert main([*paths, "--fail-below", "0.1"]) == 1


def test_older_files_and_those_without_times_can_be_compared(capsys):
    paths = [str(RESULTS / "ops.json")] * 2
    assert main([*paths, "--fail-below", "1.0"]) == 0
    assert "opposite quartiles" in capsys.readouterr().out
    assert main([str(RESULTS / "ops_memory.json")] * 2) == 0
    assert "on average" not in capsys.readouterr().out


def test_files_that_cannot_be_compared_are_refused(files, capsys):
    assert main([str(RESULTS / "ops.json"), str(RESULTS / "ops_memory.json")]) == 2
    assert "no contender has figures in the same case" in capsys.readouterr().err
    assert main([str(RESULTS / "ops.json"), "nowhere.json"]) == 2
    assert "nowhere.json cannot be read" in capsys.readouterr().err
