"""A user's questions, settings and the answers so far: what to ask next, and what they say together."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from megatron_star.config import StarConfig
from megatron_star.evaluation.comparison import Comparison
from megatron_star.evaluation.comparison_file import ComparisonFile
from megatron_star.evaluation.search import Ask, Verdict, search
from megatron_star.evaluation.search_cost import SearchCost
from megatron_star.evaluation.setting_text import setting_name

BLOCKS_PER_CONTEXT = (4, 8, 16, 32)
SMALLEST_BLOCK = 128
ANCHOR_SIZE = 64
KEYS_OF_A_BLOCK = (8, 4)
"""One key of so many is passed."""


def default_settings(num_context_tokens: int) -> dict[str, StarConfig]:
    """What is worth trying on contexts of up to so many tokens.

    The recommended setting; and in blocks of four sizes, few and many passed keys behind a small anchor, and
    a neighbor with a whole anchor. Star as published is tried where `--setting` names it.
    """
    settings = [StarConfig()]
    sizes = {-(-num_context_tokens // count) for count in BLOCKS_PER_CONTEXT}
    for block in sorted(size for size in sizes if size >= min(SMALLEST_BLOCK, max(sizes))):
        settings += [
            StarConfig(block_size=block, anchor_size=min(ANCHOR_SIZE, block), passed_keys=-(-block // share))
            for share in KEYS_OF_A_BLOCK
        ]
        settings.append(StarConfig(block_size=block, neighbor_blocks=1))
    return {setting_name(star): star for star in settings}


class OpenAsk(NamedTuple):
    """What to ask next: exact, if `setting` is None.

    Attributes:
        ask: of the search, for which this is needed; None where the search is over.
    """

    question: int
    setting: str | None
    ask: Ask | None


@dataclass(frozen=True)
class Calibration:
    """On the driver: what is asked of whom, and the answers that there are.

    Attributes:
        questions: their ids, in an order that says nothing about them.
        cost: of all settings.
        answers: of these questions and settings.
    """

    questions: Sequence[str]
    cost: SearchCost
    tolerance: float
    answers: ComparisonFile

    def open_asks(self, *, ask_all: bool) -> Iterator[OpenAsk]:
        """What there is no answer to; each has to be answered before the next one is asked for.

        Args:
            ask_all: go on behind the search, until every setting has answered every question.
        """
        for ask in self._asks():
            yield from self._open(ask.question, ask.setting, ask)
        if ask_all:
            for question in range(len(self.questions)):
                for setting in self.cost.settings:
                    yield from self._open(question, setting, None)

    def verdict(self) -> Verdict:
        """What the answers say, once the search is over."""
        asks = self._asks()
        while True:
            try:
                next(asks)
            except StopIteration as ended:
                return ended.value

    def is_open(self, question: int, setting: str | None) -> bool:
        """Whether a question has no answer yet of a setting, or of exact, if that is None."""
        of = self.answers.comparisons.get(setting, {}) if setting else self.answers.exact
        return self.questions[question] not in of

    def _asks(self) -> Generator[Ask, None, Verdict]:
        """All that the search asks; each has to be answered when the next one is asked for."""
        asking = search(self.cost.cheaper_than_exact(), len(self.questions), self.tolerance)
        try:
            ask = next(asking)
            while True:
                yield ask
                ask = asking.send(self.comparison(ask).changed)
        except StopIteration as ended:
            return ended.value

    def comparison(self, ask: Ask) -> Comparison:
        """The answer to what the search has asked."""
        return self.answers.comparisons[ask.setting][self.questions[ask.question]]

    def _open(self, question: int, setting: str, ask: Ask | None) -> Iterator[OpenAsk]:
        for name in (None, setting):
            if self.is_open(question, name):
                yield OpenAsk(question, name, ask)


@dataclass(frozen=True)
class Summary:
    """One setting over all questions that it was asked; see `Comparison`.

    Attributes:
        num_asked: if 0, only the hidden mass and the ratio of the operations are known; others are NaN.
        ttft_ratio, flops_ratio: exact's over the setting's.
        encoded_as: the setting with its sizes decided, for each length that they were decided for.
    """

    setting: str
    num_asked: int
    num_changed: int
    same_first_tokens: float
    kl: float
    hidden_mass: float
    ttft_ratio: float
    flops_ratio: float
    encoded_as: Sequence[str]


def summarize(setting: str, calibration: Calibration) -> Summary:
    """Means over the questions; the median of TTFT's ratios; the ratio of all operations."""
    exact = calibration.answers.exact
    of = calibration.answers.comparisons.get(setting, {})
    return Summary(
        setting=setting,
        num_asked=len(of),
        num_changed=sum(c.changed for c in of.values()),
        same_first_tokens=_mean([c.same_first_token for c in of.values()]),
        kl=_mean([c.kl for c in of.values()]),
        hidden_mass=_mean([answer.hidden_masses[setting] for answer in exact.values()]),
        ttft_ratio=median(exact[name].ttft_s / c.ttft_s for name, c in of.items()) if of else NOT_ASKED,
        flops_ratio=1 / calibration.cost.relative(setting),
        encoded_as=sorted({c.encoded_as for c in of.values()}),
    )


NOT_ASKED = float("nan")


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else NOT_ASKED
