"""What a calibration found, as text for a person."""

from megatron_star.evaluation.calibration import Comparisons, Verdict, recommend, summarize
from megatron_star.evaluation.score_tables import plain_text

HEADING = ["setting", "same first token", "changed answers", "KL (nats)", "hidden mass", "TTFT", "operations"]


def calibration_report(comparisons: Comparisons, tolerance: float) -> str:
    """The table, and the recommendation."""
    rows = [HEADING]
    for summary in (summarize(setting, comparisons) for setting in comparisons[0]):
        rows.append(
            [
                summary.setting,
                f"{summary.same_first_tokens:.1%}",
                f"{summary.changed_answers:.1%}",
                f"{summary.kl:.4f}",
                f"{summary.hidden_mass:.3f}",
                f"{summary.ttft_ratio:.2f}x",
                f"{summary.flops_ratio:.2f}x",
            ]
        )
    legend = f"{len(comparisons)} questions. TTFT and operations: exact's over the setting's, medians."
    return f"{plain_text(rows)}\n\n{legend}\n\n{advice(recommend(comparisons, tolerance))}"


def advice(verdict: Verdict) -> str:
    """For a person: what to use, and how sure that is."""
    if verdict.setting is None:
        return f"No recommendation: {verdict.reason}."
    return f"Recommended: {verdict.setting}: {verdict.reason}."
