"""What a search costs: operations of encodings, by the cost model, which are known before anything runs."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_star.evaluation.search import Ask, halves


@dataclass(frozen=True)
class SearchCost:
    """Operations of encoding each question's context, on the slowest rank.

    Attributes:
        exact: by question.
        settings: the same for each setting, the cheapest first.
    """

    exact: Sequence[float]
    settings: Mapping[str, Sequence[float]]

    @classmethod
    def of(cls, exact: Sequence[float], settings: Mapping[str, Sequence[float]]) -> "SearchCost":
        """With the settings in order; of equal ones, the first given comes first."""
        return cls(exact, dict(sorted(settings.items(), key=lambda item: sum(item[1]))))

    def relative(self, setting: str) -> float:
        """A setting's operations over exact's, of all questions together."""
        return max(1.0, sum(self.settings[setting])) / max(1.0, sum(self.exact))

    def cheaper_than_exact(self) -> list[str]:
        """The settings that are worth a search, the cheapest first."""
        return [setting for setting in self.settings if self.relative(setting) < 1]

    def least(self) -> float:
        """If the cheapest setting keeps the promise: operations over those of exact encoding all contexts.

        Like `most`, 0 if there is nothing to search: no setting is cheaper than exact.
        """
        return self._all([], self.cheaper_than_exact()[:1])

    def most(self) -> float:
        """If only the dearest setting does, and no other is ruled out before its last question."""
        cheaper = self.cheaper_than_exact()
        return self._all(cheaper[:-1], cheaper[-1:])

    def asked_all(self) -> float:
        """If every setting answers every question."""
        return self._all([], self.settings)

    def _all(self, choosing_only: Sequence[str], whole: Collection[str]) -> float:
        if not whole:
            return 0.0
        chooses = halves(len(self.exact))[0]
        half = sum(self.settings[setting][question] for setting in choosing_only for question in chooses)
        return 1 + (half + sum(sum(self.settings[setting]) for setting in whole)) / max(1.0, sum(self.exact))

    def to_go(self, ask: Ask, is_open: Callable[[int, str | None], bool]) -> tuple[float, float]:
        """Operations that are still to come: if this ask's setting keeps the promise, and at most.

        Args:
            is_open: whether a question has no answer yet of a setting, or of exact, if that is None.
        """

        def of(setting: str, questions: Iterable[int]) -> float:
            return sum(self.settings[setting][q] for q in questions if is_open(q, setting))

        choosing, judging = halves(len(self.exact))
        exact = sum(cost for q, cost in enumerate(self.exact) if is_open(q, None))
        mine = of(ask.setting, judging) + (0 if ask.judges else of(ask.setting, choosing))
        names = self.cheaper_than_exact()
        later = [] if ask.judges else names[names.index(ask.setting) + 1 :]
        judged = max([of(ask.setting, judging), *(of(name, judging) for name in later)])
        others = sum(of(name, choosing) for name in later) + judged - of(ask.setting, judging)
        return exact + mine, exact + mine + others
