"""What a calibration costs, how far it is, and what it found, as text for a person."""

from collections.abc import Iterator

from megatron_star.evaluation.calibration import Calibration, OpenAsk, Summary, summarize
from megatron_star.evaluation.score_tables import plain_text
from megatron_star.evaluation.search import Ask, Verdict, halves
from megatron_star.evaluation.setting_text import what_was_chosen

HEADING = [
    "setting",
    "operations",
    "changed answers",
    "same first token",
    "KL (nats)",
    "hidden mass",
    "TTFT",
]
NOTES = (
    "Cheapest first. operations, TTFT: exact's over the setting's. A setting is asked no further when it is "
    "ruled out, or when a cheaper one has become the candidate."
)


def announcement(calibration: Calibration) -> str:
    """What will be asked, and what it costs, before anything runs."""
    cost, num_questions = calibration.cost, len(calibration.questions)
    num_choosing, num_judging = map(len, halves(num_questions))
    lines = [
        f"{num_questions} questions, {num_choosing} that choose and {num_judging} that judge. Settings, "
        "cheapest first, with their operations of context encoding over exact's:"
    ]
    for setting in cost.settings:
        relative = cost.relative(setting)
        lines.append(f"  {relative:.2f}  {setting}{'' if relative < 1 else ' (not cheaper: left out)'}")
    lines.append(
        f"In encodings of all contexts by exact attention, this costs from {cost.least():.1f} to "
        f"{cost.most():.1f}. To ask every setting everything would cost {cost.asked_all():.1f}."
    )
    return "\n".join(lines)


class Progress:
    """Lines on what has been asked, and how long the rest takes."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self._seconds = self._operations = 0.0
        self._before: Ask | None = None

    def line(self, asked: OpenAsk, seconds: float) -> str:
        """One that has just been answered, in so many seconds."""
        cost = self.calibration.cost
        self._seconds += seconds
        self._operations += (cost.settings[asked.setting] if asked.setting else cost.exact)[asked.question]
        lines = [*self._turn(asked.ask), f"{self._place(asked)}{self._left(asked.ask)}"]
        return "\n".join(lines)

    def _turn(self, ask: Ask | None) -> Iterator[str]:
        """What has become of the setting that was asked before, if now another is, or the same is judged."""
        before, self._before = self._before, ask
        if before and ask and before.setting != ask.setting:
            yield f"ruled out: {before.setting}: more than {before.most} answers changed"
        if before and ask and ask.judges and not before.judges:
            yield f"candidate: {ask.setting}: the other half judges it"

    def _place(self, asked: OpenAsk) -> str:
        if asked.ask is None:
            return f"question {asked.question + 1}, for the table: {asked.setting or 'exact'}"
        ask = asked.ask
        half = halves(len(self.calibration.questions))[ask.judges]
        part = "judge" if ask.judges else "choose"
        place = f"question {ask.num_asked + 1} of {len(half)} that {part}"
        if asked.setting is None:
            return f"{place}: exact"
        num_changed = ask.num_changed + self.calibration.comparison(ask).changed
        return f"{place}: {ask.setting}: {num_changed} changed, {ask.most} may"

    def _left(self, ask: Ask | None) -> str:
        if ask is None:
            return ""
        per_operation = self._seconds / max(1.0, self._operations) / 60
        if_kept, at_most = (
            operations * per_operation
            for operations in self.calibration.cost.to_go(ask, self.calibration.is_open)
        )
        return f"; {if_kept:.0f} min to go if it is the one, {at_most:.0f} at most"


def calibration_report(calibration: Calibration) -> str:
    """The table, and the recommendation."""
    summaries = [summarize(setting, calibration) for setting in calibration.cost.settings]
    table = plain_text([HEADING, *map(_row, summaries)])
    chosen = filter(None, (what_was_chosen(summary.setting, summary.encoded_as) for summary in summaries))
    return "\n\n".join([table, "\n".join([NOTES, *chosen]), advice(calibration.verdict())])


def _row(summary: Summary) -> list[str]:
    ratios = [summary.setting, f"{summary.flops_ratio:.2f}x"]
    hidden = f"{summary.hidden_mass:.3f}"
    if not summary.num_asked:
        return [*ratios, "not asked", "-", "-", hidden, "-"]
    share = summary.num_changed / summary.num_asked
    return [
        *ratios,
        f"{summary.num_changed} of {summary.num_asked} ({share:.1%})",
        f"{summary.same_first_tokens:.1%}",
        f"{summary.kl:.4f}",
        hidden,
        f"{summary.ttft_ratio:.2f}x",
    ]


def advice(verdict: Verdict) -> str:
    """For a person: what to use, and how sure that is."""
    if verdict.setting is None:
        return f"No recommendation: {verdict.reason}."
    return f"Recommended: {verdict.setting}: {verdict.reason}."
