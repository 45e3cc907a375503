"""From comparisons on a user's own questions to the cheapest setting that keeps a promise.

Half of the questions choose: the cheapest setting whose upper confidence bound (Clopper-Pearson, 95%) of the
share of changed answers is within the tolerance. That says nothing certain, since the best of several was
taken. The other half, which had no part in the choice, judges it by the same bound: the promise is made only
if it holds there too. One setting is judged, once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from megatron_star.config import StarConfig
from megatron_star.evaluation.comparison import Comparison
from megatron_star.evaluation.setting_text import setting_name
from megatron_star.evaluation.statistics import CONFIDENCE, samples_needed, share_upper_bound

BLOCKS_PER_CONTEXT = (4, 8, 16)
Comparisons = Sequence[Mapping[str, Comparison]]
"""By question: each setting's comparison."""


def default_settings(num_context_tokens: int) -> dict[str, StarConfig]:
    """Block sizes, neighbors and anchors worth trying on contexts of up to so many tokens."""
    settings = []
    for count in BLOCKS_PER_CONTEXT:
        block = max(1, -(-num_context_tokens // count))
        changes: list[Mapping[str, Any]] = [{}, {"neighbor_blocks": 1}, {"anchor_size": block // 2}]
        settings += [StarConfig(block_size=block, **change) for change in changes]
    return {setting_name(star): star for star in settings}


@dataclass(frozen=True)
class Summary:
    """One setting over all questions; see `Comparison`. Ratios are exact's over the setting's."""

    setting: str
    same_first_tokens: float
    changed_answers: float
    kl: float
    hidden_mass: float
    ttft_ratio: float
    flops_ratio: float


def summarize(setting: str, comparisons: Comparisons) -> Summary:
    """Means over the questions; medians of the ratios."""
    of = [by_setting[setting] for by_setting in comparisons]
    return Summary(
        setting=setting,
        same_first_tokens=fmean(c.same_first_token for c in of),
        changed_answers=fmean(c.changed for c in of),
        kl=fmean(c.kl for c in of),
        hidden_mass=fmean(c.hidden_mass for c in of),
        ttft_ratio=median(c.exact_ttft_s / c.ttft_s for c in of),
        flops_ratio=median(c.exact_flops / max(1.0, c.flops) for c in of),
    )


@dataclass(frozen=True)
class Verdict:
    """What is recommended, if anything, and why.

    Attributes:
        setting: None where no promise can be made.
        bound: of the share of changed answers, with 95% confidence; None if nothing was judged.
    """

    setting: str | None
    bound: float | None
    reason: str


def recommend(comparisons: Comparisons, tolerance: float) -> Verdict:
    """The cheapest setting, in operations, that changes at most `tolerance` of exact's answers.

    Args:
        comparisons: in an order that says nothing about the questions; every other one chooses.
        tolerance: a share of answers, between 0 and 1.
    """
    choosing, judging = comparisons[::2], comparisons[1::2]
    needed = samples_needed(tolerance)
    if len(judging) < needed:
        best = share_upper_bound(0, len(judging))
        return Verdict(
            None,
            None,
            f"{len(comparisons)} questions cannot support a tolerance of {tolerance:g}: even if none of the "
            f"{len(judging)} that judge changes, up to {best:.3f} of all may; {2 * needed} are needed",
        )
    most = _most_changes(len(choosing), tolerance)
    within = [
        summary
        for summary in (summarize(setting, choosing) for setting in comparisons[0])
        if summary.changed_answers <= most / len(choosing) and summary.flops_ratio > 1
    ]
    if not within:
        return Verdict(
            None,
            None,
            f"no setting is cheaper than exact and changes at most {most} of the {len(choosing)} answers "
            f"that choose, as a tolerance of {tolerance:g} needs: use exact, or try larger blocks, a larger "
            "anchor, more neighbors or more questions",
        )
    return _judge(max(within, key=lambda summary: summary.flops_ratio).setting, judging, tolerance)


def _most_changes(count: int, tolerance: float) -> int:
    """The most changed answers of `count` whose bound is within the tolerance, as that of none is."""
    return next(changed for changed in range(count) if share_upper_bound(changed + 1, count) > tolerance)


def _judge(setting: str, judging: Comparisons, tolerance: float) -> Verdict:
    changed = sum(by_setting[setting].changed for by_setting in judging)
    bound = share_upper_bound(changed, len(judging))
    seen = (
        f"it changed {changed} of {len(judging)} answers that had no part in its choice, so that at most "
        f"{bound:.3f} of all change, with {CONFIDENCE:.0%} confidence"
    )
    if bound <= tolerance:
        return Verdict(setting, bound, seen)
    return Verdict(None, bound, f"{setting!r} was the candidate, but {seen}: more than {tolerance:g}")
