"""Scored answers: one JSON object a line, and what they say together."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

from pydantic import Field

from megatron_star.checked_input import json_lines, place, strict_fields, validated
from megatron_star.evaluation.setting_text import what_was_chosen
from megatron_star.evaluation.statistics import bootstrap_ratio, wilson_interval

EXACT = "exact"
SOLVED = 0.5
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0, lt=1 << 40)]


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """One answer of one setting to one sample.

    Attributes:
        id: setting and sample; unique in a file.
        sample: the sample's own id.
        model: the checkpoint that answered.
        score: 0 to 1.
        seconds: of the batch that it was in, divided by the answers in it.
        encoded_as: the setting with its mode and sizes decided, which may depend on the length.
        encoding_flops: of the slowest rank, for the context.
        cache_hit: the context was already there, so that `seconds` says nothing.
    """

    id: str
    sample: str
    setting: str
    model: str
    chat: bool
    task: str
    length: Positive
    seed: int
    index: int
    depth: Share | None
    references: Sequence[str]
    text: str
    tokens: Sequence[int]
    score: Share
    num_context_tokens: int
    num_query_tokens: int
    num_blocks: int
    encoded_as: str
    seconds: Annotated[float, Field(gt=0)]
    encoding_flops: Annotated[float, Field(ge=0)]
    cache_hit: bool

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON."""
        return asdict(self)


_FIELDS = strict_fields(ScoredAnswer)


def read_answers(paths: Iterable[Path]) -> list[ScoredAnswer]:
    """All answers of these files; a torn last line is left out.

    Raises:
        ValueError: a line is something else, or the same answer occurs twice.
        OSError: a file cannot be read.
    """
    answers: dict[str, ScoredAnswer] = {}
    for path in paths:
        for number, values in json_lines(path, whole_only=True):
            where = f"{place(path, number)}: not an answer of `megatron-star eval`"
            answer = ScoredAnswer(**validated(_FIELDS, values, where))
            if answer.id in answers:
                raise ValueError(f"{place(path, number)}: the answer {answer.id!r} occurs twice")
            answers[answer.id] = answer
    return list(answers.values())


Cell = tuple[str, int]
"""A task and a length."""


class ScoreTable:
    """Scores by cell and setting. Settings are compared on the samples that all of them have answered."""

    def __init__(self, answers: Iterable[ScoredAnswer]) -> None:
        by_cell: dict[Cell, dict[str, dict[str, ScoredAnswer]]] = defaultdict(lambda: defaultdict(dict))
        for answer in answers:
            by_cell[answer.task, answer.length][answer.setting][answer.sample] = answer
        self.settings = exact_first(setting for of in by_cell.values() for setting in of)
        self.cells = {cell: _shared(of) for cell, of in sorted(by_cell.items(), key=_task_then_length)}

    def chosen(self) -> list[str]:
        """Sentences on the settings whose mode or sizes were chosen."""
        encoded: dict[str, set[str]] = defaultdict(set)
        for cell in self.cells.values():
            for setting, of in cell.items():
                encoded[setting].update(answer.encoded_as for answer in of)
        return list(filter(None, (what_was_chosen(setting, encoded[setting]) for setting in self.settings)))

    def scores(self, cell: Cell, setting: str) -> list[float]:
        """In the order of the samples; none if this setting was not run on this cell."""
        return [answer.score for answer in self.cells[cell].get(setting, ())]

    def interval(self, cell: Cell, setting: str) -> tuple[float, float, float]:
        """Mean, and its 95% Wilson interval."""
        scores = self.scores(cell, setting)
        mean = fmean(scores)
        return mean, *wilson_interval(mean, len(scores))

    def solved_cells(self, setting: str) -> list[Cell]:
        """Those that exact attention solves above 50%, and that this setting was run on."""
        return [
            cell
            for cell in self.cells
            if self.scores(cell, setting) and fmean(self.scores(cell, EXACT) or [0.0]) > SOLVED
        ]

    def kept(self, setting: str) -> tuple[float, float, float] | None:
        """The share of exact's mean score over the solved cells that is kept, and its 95% bootstrap interval.

        None where exact has solved nothing, or was not run.
        """
        cells = self.solved_cells(setting)
        if not cells:
            return None
        mine = [self.scores(cell, setting) for cell in cells]
        exact = [self.scores(cell, EXACT) for cell in cells]
        ratio = fmean(map(fmean, mine)) / fmean(map(fmean, exact))
        return ratio, *bootstrap_ratio(mine, exact)

    def mean_score(self, setting: str) -> float:
        """Over the solved cells, each with the same weight."""
        return fmean(fmean(self.scores(cell, setting)) for cell in self.solved_cells(setting))

    def speedup(self, setting: str) -> tuple[float, float] | None:
        """Against exact, the median over samples: measured seconds, and operations of the encoding.

        None where there is nothing to compare. Answers from a cached context are left out.
        """
        pairs = [
            (exact, mine)
            for cell in self.cells.values()
            for exact, mine in zip(cell.get(EXACT, ()), cell.get(setting, ()), strict=False)
            if not exact.cache_hit and not mine.cache_hit
        ]
        if not pairs:
            return None
        return (
            median(exact.seconds / mine.seconds for exact, mine in pairs),
            median(exact.encoding_flops / max(1.0, mine.encoding_flops) for exact, mine in pairs),
        )


def exact_first(settings: Iterable[str]) -> list[str]:
    """Each once, in their order, but exact in front."""
    return sorted(dict.fromkeys(settings), key=lambda setting: setting != EXACT)


def _task_then_length(item: tuple[Cell, object]) -> Cell:
    return item[0]


def _shared(by_setting: dict[str, dict[str, ScoredAnswer]]) -> dict[str, list[ScoredAnswer]]:
    """Each setting's answers to the samples that all settings have answered, in one order."""
    common = set.intersection(*(set(of) for of in by_setting.values()))
    return {
        setting: [of[sample] for sample in sorted(common)] for setting, of in by_setting.items() if common
    }
