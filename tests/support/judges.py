"""Verifiers for tests in which a random model has to be right now and then."""


def even_length(response: str, answer: str) -> float:
    """Right if the response has an even number of characters."""
    return float(len(response) % 2 == 0)
