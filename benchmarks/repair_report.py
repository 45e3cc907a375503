"""What `repairs.py` measured: one record a sample and candidate, and what they say together."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from benchmarks.repair_candidates import Candidate
from megatron_star.checked_input import json_lines, place, strict_fields, validated
from megatron_star.evaluation.statistics import bootstrap_ratio
from megatron_star.job.answer_files import check_asked_the_same

EXACT = "exact"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One candidate on one sample.

    Attributes:
        id: sample and candidate; unique.
        layers: `exact_layers` by number, for a candidate that counts them.
        log_probability: of the right answer, in nats.
        pairs: against exact's.
        star_operations: of star as published, in the same blocks.
        seconds: of the encoding, by one process.
    """

    id: str
    sample: str
    candidate: str
    task: str
    length: int
    depth: float | None
    num_tokens: int
    layers: str
    right: bool
    log_probability: float
    pairs: float
    operations: float
    exact_operations: float
    star_operations: float
    crossing_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON."""
        return asdict(self)


class _Record(Measured):
    """What a line must have: besides, the model and its dtype."""

    asked: dict[str, str]


FIELDS = strict_fields(_Record)


def read_measured(paths: Iterable[Path]) -> list[Measured]:
    """All records of these files; a torn last line is left out.

    Raises:
        ValueError: a line is something else, a sample occurs twice with a candidate, or there are two models.
        OSError: a file cannot be read.
    """
    records: dict[str, Measured] = {}
    asked: list[dict[str, str]] = []
    for path in paths:
        for number, values in json_lines(path, whole_only=True):
            fields = validated(FIELDS, values, f"{place(path, number)}: not of repairs.py")
            asked.append(fields.pop("asked"))
            record = Measured(**fields)
            if record.id in records:
                raise ValueError(f"{place(path, number)}: {record.id!r} occurs twice")
            check_asked_the_same(asked[0], asked[-1], place(path, number))
            records[record.id] = record
    return list(records.values())


class Figures(NamedTuple):
    """Of one candidate and length, on the samples that exact was measured on too.

    Attributes:
        kept: the share of exact's right answers, the mean over tasks; None where exact has none right.
        interval: of it, 95%, paired bootstrap over samples.
        log_probability: mean over the samples that exact solves, with exact's; None if there are none.
        to_exact, to_star: operations against theirs.
        crossing_bytes, seconds: mean, and median.
    """

    candidate: Candidate
    num_samples: int
    kept: float | None
    interval: tuple[float, float]
    log_probability: float | None
    exact_log_probability: float | None
    pairs: float
    to_exact: float
    to_star: float
    crossing_bytes: float
    seconds: float


def figures_by_length(records: Sequence[Measured]) -> dict[int, list[Figures]]:
    """In the order in which candidates occur; those that share no sample with exact are left out."""
    by_length: dict[int, dict[str, dict[str, Measured]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        by_length[record.length][record.candidate][record.sample] = record
    found = {}
    for length, by_candidate in sorted(by_length.items()):
        exact = by_candidate.get(EXACT, {})
        shared = {
            name: [(record, exact[sample]) for sample, record in sorted(of.items()) if sample in exact]
            for name, of in by_candidate.items()
        }
        found[length] = [_figures(name, pairs) for name, pairs in shared.items() if pairs]
    return found


def _figures(candidate: str, pairs: Sequence[tuple[Measured, Measured]]) -> Figures:
    """Of records, each with exact's of the same sample."""
    solved = [(mine, exact) for mine, exact in pairs if exact.right]
    mine = [mine for mine, _ in pairs]
    return Figures(
        Candidate.parse(candidate),
        len(pairs),
        *_kept(pairs),
        fmean(m.log_probability for m, _ in solved) if solved else None,
        fmean(e.log_probability for _, e in solved) if solved else None,
        fmean(m.pairs for m in mine),
        fmean(m.operations / m.exact_operations for m in mine),
        fmean(m.operations / m.star_operations for m in mine),
        fmean(m.crossing_bytes for m in mine),
        median(m.seconds for m in mine),
    )


def _kept(pairs: Sequence[tuple[Measured, Measured]]) -> tuple[float | None, tuple[float, float]]:
    mine: dict[str, list[float]] = defaultdict(list)
    exact: dict[str, list[float]] = defaultdict(list)
    for record, of_exact in pairs:
        mine[record.task].append(float(record.right))
        exact[record.task].append(float(of_exact.right))
    num_right = fmean(map(fmean, exact.values()))
    if not num_right:
        return None, (0.0, 1.0)
    interval = bootstrap_ratio(list(mine.values()), list(exact.values()))
    return fmean(map(fmean, mine.values())) / num_right, interval


def winner(figures: Sequence[Figures], at_least: float, name: str | None = None) -> Figures | None:
    """The candidate of this name; without one, the cheapest in operations that keeps at least so much.

    None if there is no such candidate.
    """
    if name is not None:
        return next((f for f in figures if str(f.candidate) == str(Candidate.parse(name))), None)
    keeping = [f for f in figures if f.kept is not None and f.kept >= at_least]
    return min(keeping, key=lambda f: f.to_exact, default=None)


NOTES = (
    "kept: share of exact's right answers, shown the answer token by token [95%, paired bootstrap; where all "
    "is kept, it says little]. log p: of the right answer, mean over the samples that exact solves, then "
    "exact's on the same ones. pairs: of attention, against exact's. operations: linear and attention, "
    "against exact's, and against star's as published in the same blocks. MB: of KV that crosses ranks, "
    "where each block has one. seconds: of the encoding, median, one process."
)
HEADING = ["candidate", "samples", "kept of exact", "log p", "pairs", "operations", "MB", "seconds"]


def table_rows(figures: Sequence[Figures]) -> list[list[str]]:
    """Heading, and one row a candidate."""
    return [HEADING, *(_row(f) for f in figures)]


def _row(f: Figures) -> list[str]:
    low, high = (100 * value for value in f.interval)
    log_probability = "-"
    if f.log_probability is not None:
        log_probability = f"{f.log_probability:.2f} / {f.exact_log_probability:.2f}"
    return [
        str(f.candidate),
        str(f.num_samples),
        "-" if f.kept is None else f"{100 * f.kept:.0f}% [{low:.0f}-{high:.0f}]",
        log_probability,
        f"{f.pairs:.3f}",
        f"{f.to_exact:.3f} / {f.to_star:.3f}",
        f"{f.crossing_bytes / 1e6:.1f}",
        f"{f.seconds:.1f}",
    ]
