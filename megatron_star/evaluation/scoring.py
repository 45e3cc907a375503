"""RULER's string matching: what share of the references an answer contains."""

from collections.abc import Sequence


def match_all(text: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the text, in whatever case."""
    return sum(reference.lower() in text.lower() for reference in references) / len(references)


def match_any(text: str, references: Sequence[str]) -> float:
    """1 if a reference occurs in the text, in whatever case, else 0."""
    return float(any(reference.lower() in text.lower() for reference in references))


MATCHING = {"all": match_all, "any": match_any}
