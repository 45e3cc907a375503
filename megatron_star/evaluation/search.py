"""Which setting is the cheapest that keeps a promise, found with few questions.

The promise: at most a share of `tolerance` of exact's answers change. Half of the questions choose a setting,
the other half judges it.

1. *Choosing.* Settings are taken in the order of their cost, which is known before anything runs. A setting
   is asked question by question, until all that choose are asked, or it has changed more answers than a
   setting may whose upper bound is within the tolerance. No answer could bring such a setting back, so it is
   asked no further. The first that gets through is the candidate: dearer ones need not be asked at all. It is
   the same candidate as if every setting had been asked everything.
2. *Judging.* The candidate alone is asked the other half. The promise is made if the upper bound of the share
   of changed answers (Clopper-Pearson, one-sided, 95%) is within the tolerance there, too. Once too many
   answers have changed, it can't be any more, and the rest is not asked.

Why 95% holds exactly, however the candidate was found: which setting is judged depends on answers to the
questions that choose alone. These are independent of the questions that judge, if all are drawn alike and
their order says nothing about them. So, whatever the candidate is, its changed answers among those that judge
are binomial with its true share. If that share is above the tolerance, at most `most` of them change with a
probability of at most 5%: that is how the bound is defined. One setting is judged, once, at a number of
questions that was fixed before, so nothing needs a correction. Ending early on failure makes no promise more.
Ending early on success would: it is not done.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_star.evaluation.statistics import CONFIDENCE, most_hits, samples_needed, share_upper_bound


class Ask(NamedTuple):
    """One setting is to answer one question.

    Attributes:
        question: its number, from 0.
        num_asked, num_changed: of this half, before this one.
        most: so many may change in all of this half.
    """

    setting: str
    question: int
    judges: bool
    num_asked: int
    num_changed: int
    most: int


@dataclass(frozen=True)
class Verdict:
    """What is recommended, if anything, and why.

    Attributes:
        setting: None where no promise can be made.
        bound: of the share of changed answers, with 95% confidence; None if nothing was judged to the end.
    """

    setting: str | None
    bound: float | None
    reason: str


Search = Generator[Ask, bool, Verdict]
"""Yields what to ask next, takes whether that answer is another than exact's, and returns the verdict."""


def halves(num_questions: int) -> tuple[range, range]:
    """The questions that choose, and those that judge."""
    return range(0, num_questions, 2), range(1, num_questions, 2)


def why_too_few(num_questions: int, tolerance: float) -> str | None:
    """Why so many questions cannot support any promise; None if they can."""
    num_judging, needed = len(halves(num_questions)[1]), samples_needed(tolerance)
    if num_judging >= needed:
        return None
    return (
        f"{num_questions} questions cannot support a tolerance of {tolerance:g}: even if none of the "
        f"{num_judging} that judge changes, up to {share_upper_bound(0, num_judging):.3f} of all may; "
        f"{2 * needed} are needed"
    )


def search(settings: Iterable[str], num_questions: int, tolerance: float) -> Search:
    """The search that this module describes.

    Args:
        settings: those that cost less than exact, the cheapest first.
        num_questions: in an order that says nothing about them.
        tolerance: a share of answers, between 0 and 1.
    """
    if why := why_too_few(num_questions, tolerance):
        return Verdict(None, None, why)
    choosing, judging = halves(num_questions)
    most = most_hits(len(choosing), tolerance)
    for setting in settings:
        if (yield from _changed(setting, choosing, most, judges=False)) <= most:
            return (yield from _judged(setting, judging, tolerance))
    return Verdict(
        None,
        None,
        f"no setting is cheaper than exact and changes at most {most} of the {len(choosing)} answers that "
        f"choose, as a tolerance of {tolerance:g} needs: use exact, or try larger blocks, more passed keys, "
        "more neighbors or more questions",
    )


def _changed(setting: str, questions: Sequence[int], most: int, *, judges: bool) -> Generator[Ask, bool, int]:
    """How many answers change; when there are more than `most`, it is not asked further."""
    num_changed = 0
    for num_asked, question in enumerate(questions):
        num_changed += yield Ask(setting, question, judges, num_asked, num_changed, most)
        if num_changed > most:
            break
    return num_changed


def _judged(setting: str, judging: Sequence[int], tolerance: float) -> Search:
    most = most_hits(len(judging), tolerance)
    num_changed = yield from _changed(setting, judging, most, judges=True)
    if num_changed > most:
        return Verdict(
            None,
            None,
            f"{setting!r} was the candidate, but it changed more than {most} of {len(judging)} answers that "
            f"had no part in its choice, too many for a tolerance of {tolerance:g}",
        )
    bound = share_upper_bound(num_changed, len(judging))
    return Verdict(
        setting,
        bound,
        f"it changed {num_changed} of {len(judging)} answers that had no part in its choice, so that at most "
        f"{bound:.3f} of all change, with {CONFIDENCE:.0%} confidence",
    )
