"""The page of applications holds the means and errors of what was measured."""

from bench.applications import page


def row(seed, share, told=True):
    auroc = {name: {"value": value} for name, value in (("reward_failed", 0.7), ("logprob", 0.6), ("length", 0.5))}
    signal = {"turn": 10, "solved_later": 9, "never_solved": 8, "too_few": not told, "auroc": auroc if told else {}}
    names = ("best_of_n", "majority", "weighted", "oracle")
    return {
        "seed": seed,
        "rerank": [{"n": 16} | {name: {"mean": share + i / 10} for i, name in enumerate(names)}],
        "search": {f"{side} {name}": share for side in ("search", "baseline") for name in names},
        "search_tokens": 600.0 + seed,
        "baseline_responses": 16.5,
        "localize": {name: {"first_error_f1": share, "auroc": 0.9} for name in ("PRM", "start model")},
        "signal": [signal],
        "adapt": {
            "accuracy": {name: {"mean": share} for name in ("before", "after", "gain")},
            "turns": 20 + seed,
            "stopped": "kl",
        },
    }


def test_the_page_gives_means_and_standard_errors():
    lines = page([row(0, 0.4), row(1, 0.5, told=False)], {"cores": 2}).splitlines()
    assert "| 16 | 45.0 ± 5.0 | 55.0 ± 5.0 | 65.0 ± 5.0 | 75.0 ± 5.0 |" in lines
    assert "| beam search | 45.0 ± 5.0 | 45.0 ± 5.0 | 45.0 ± 5.0 | 45.0 ± 5.0 |" in lines
    assert "| PRM | 45.0 ± 5.0 | 0.900 ± 0.000 |" in lines
    # The second seed had too few prompts of one kind.
    assert "| 10 | 1 of 2 | 9 / 8, 9 / 8 | 0.70 | 0.60 | 0.50 |" in lines
    assert "| 45.0 ± 5.0 | 45.0 ± 5.0 | 45.0 ± 5.0 | 20 (kl), 21 (kl) |" in lines
    assert "600 ± 0 tokens a prompt, which are 16.5 ± 0.0 whole responses." in lines
