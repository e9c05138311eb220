"""What the paper says, or the theory, as comparisons of two arms, and what the study's runs say of it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from bench.figures import standard_error


@dataclass(frozen=True)
class Claim:
    """On `task`, arm `better` ends with a higher accuracy than arm `worse`. source: who says so."""

    text: str
    task: str
    better: str
    worse: str
    source: str


PAPER, OURS = "the paper", "us"
CLAIMS = [
    Claim("rePIRL is better than RLOO", "exact", "rePIRL", "RLOO", PAPER),
    Claim("rePIRL is better than PRIME", "exact", "rePIRL", "PRIME", PAPER),
    Claim("rePIRL is better than SFT on its experts", "exact", "rePIRL", "SFT", PAPER),
    Claim("A PRM suffices without outcome rewards: better than RLOO", "exact", "PRM only", "RLOO", PAPER),
    Claim("Verdicts on the PRM's sides (pseudo experts, failures) help", "exact", "rePIRL", "rePIRL, PRM apart", PAPER),
    Claim("Importance sampling helps", "exact", "rePIRL", "rePIRL, uniform weights", PAPER),
    Claim(
        "Importance sampling is better than more policy updates without it",
        "exact",
        "rePIRL",
        "rePIRL, uniform weights, 4 policy updates",
        PAPER,
    ),
    Claim("`logprob` is better than `value`", "exact", "rePIRL", "rePIRL, value", OURS),
    Claim("With a fooled verifier, rePIRL is better than RLOO", "last-digit", "rePIRL", "RLOO", OURS),
    Claim(
        "A PRM that learns apart from outcomes survives a fooled verifier",
        "last-digit",
        "rePIRL, PRM apart",
        "rePIRL",
        OURS,
    ),
    Claim("With a fooled verifier, a PRM alone is better than RLOO", "last-digit", "PRM only", "RLOO", OURS),
    *(
        Claim(
            f"With a fooled verifier and 16 experts, {text} is better than {worse}",
            "last-digit-16",
            better,
            worse,
            OURS,
        )
        for text, better in (("a PRM apart from it", "rePIRL, PRM apart"), ("a PRM alone", "PRM only"))
        for worse in ("RLOO", "rePIRL", "SFT")
    ),
    Claim("A lenient verifier: PRM apart is better than RLOO", "lenient", "rePIRL, PRM apart", "RLOO", OURS),
    Claim("With 8 experts rePIRL is better than SFT", "experts-8", "rePIRL", "SFT", OURS),
    Claim("With 16 experts rePIRL is better than SFT", "experts-16", "rePIRL", "SFT", OURS),
    Claim("With 16 experts a PRM alone is better than SFT", "experts-16", "PRM only", "SFT", OURS),
    Claim("From a harder start rePIRL is better than RLOO", "hard", "rePIRL", "RLOO", PAPER),
    Claim("From a harder start rePIRL is better than SFT", "hard", "rePIRL", "SFT", PAPER),
    Claim("In 120 turns from a harder start rePIRL is better than RLOO", "hard-120", "rePIRL", "RLOO", PAPER),
    Claim("On programs rePIRL is better than RLOO", "code", "rePIRL", "RLOO", PAPER),
    Claim("On programs rePIRL is better than SFT on its experts", "code", "rePIRL", "SFT", PAPER),
    Claim("On programs a PRM suffices without tests: better than RLOO", "code", "PRM only", "RLOO", PAPER),
]


def verdict(differences: list[float]) -> str:
    """What paired differences of accuracies (of at least two seeds) say: by twice their standard error.

    Args:
        differences: one a seed, better minus worse arm, as shares.
    """
    if len(differences) < 2:
        return "not told from one seed"
    center, error = mean(differences), standard_error(differences)
    if center - 2 * error > 0:
        return "agrees"
    if center + 2 * error < 0:
        return "disagrees"
    return "not told apart"
