"""Tables for people: scores of each task, length and setting."""

from megatron_star.evaluation.results import Cell, ScoreTable

NOTES = (
    "Scores in percent [95% Wilson interval; for fractional scores, if anything, too wide]. kept: share of "
    "exact's mean on the cells that exact solves above 50% [95% paired bootstrap]. speedup: exact's "
    "time over this setting's, median over samples: measured (per answer of a batch), and by operations "
    "of the encoding on the slowest rank."
)


def table_rows(table: ScoreTable) -> list[list[str]]:
    """Heading, one row a cell, and the summary."""
    rows = [["task", "length", "samples", *table.settings]]
    for cell in table.cells:
        rows.append([*_cell_name(table, cell), *(_score(table, cell, s) for s in table.settings)])
    rows.append(["kept of exact", "", "", *(_kept(table, setting) for setting in table.settings)])
    rows.append(["speedup", "", "", *(_speedup(table, setting) for setting in table.settings)])
    return rows


def _cell_name(table: ScoreTable, cell: Cell) -> tuple[str, str, str]:
    counts = {len(table.scores(cell, setting)) for setting in table.settings}
    return cell[0], f"{cell[1]:,}", str(max(counts))


def _score(table: ScoreTable, cell: Cell, setting: str) -> str:
    if not table.scores(cell, setting):
        return "-"
    mean, low, high = (100 * value for value in table.interval(cell, setting))
    return f"{mean:.1f} [{low:.0f}-{high:.0f}]"


def _kept(table: ScoreTable, setting: str) -> str:
    kept = table.kept(setting)
    if kept is None:
        return "-"
    ratio, low, high = (100 * value for value in kept)
    return f"{ratio:.1f}% [{low:.0f}-{high:.0f}]"


def _speedup(table: ScoreTable, setting: str) -> str:
    speedup = table.speedup(setting)
    return "-" if speedup is None else f"{speedup[0]:.2f}x / {speedup[1]:.2f}x"


def plain_text(rows: list[list[str]]) -> str:
    """Columns aligned by spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    return "\n".join(lines)


def markdown(rows: list[list[str]]) -> str:
    """A table of Markdown."""
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *others])
