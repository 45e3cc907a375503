"""PNG reports; needs matplotlib (the extra `eval`). Colours: viridis and Okabe-Ito, safe for colour-blind."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure

from megatron_star.evaluation.results import EXACT, ScoredAnswer, ScoreTable, exact_first

# Okabe and Ito's colours but yellow, which is too light for points on white; repeated with other markers.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
DEPTH_BINS, PANELS_IN_A_ROW = 5, 3
DPI = 150


def draw_heat_map(answers: Iterable[ScoredAnswer], path: Path) -> None:
    """How well needles are found: depth against length, one panel a setting.

    Raises:
        ValueError: no answer has a depth.
    """
    by_setting: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    tasks = set()
    for answer in answers:
        if answer.depth is not None:
            depth_bin = min(int(answer.depth * DEPTH_BINS), DEPTH_BINS - 1)
            by_setting[answer.setting][depth_bin, answer.length].append(answer.score)
            tasks.add(answer.task)
    if not by_setting:
        raise ValueError("no answer has a depth: the heat map is for needle tasks (niah_*)")
    settings = exact_first(by_setting)
    lengths = sorted({length for cells in by_setting.values() for _, length in cells})
    columns = min(len(settings), PANELS_IN_A_ROW)
    rows = -(-len(settings) // columns)
    width = 1.6 + columns * max(2.3, 0.8 * len(lengths) + 0.5)
    figure = Figure(figsize=(width, 0.9 + 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, setting in zip(panels, settings, strict=False):
        image = _heat_panel(panel, by_setting[setting], lengths)
        panel.set_title(_wrapped(setting), fontsize=9)
    for panel in panels[len(settings) :]:
        panel.set_axis_off()
    figure.supylabel("depth of the needle in the context", fontsize=10)
    figure.supxlabel("length in tokens", fontsize=10)
    figure.colorbar(image, ax=panels.tolist(), label="mean score")
    figure.suptitle(_wrapped(", ".join(sorted(tasks)), 20 * columns + 15), fontsize=10)
    figure.savefig(path, dpi=DPI, format="png")


def _heat_panel(panel, cells: dict[tuple[int, int], list[float]], lengths: list[int]):
    """One setting's grid, with the mean and the number of samples written into each field."""
    grid = [
        [fmean(cells[depth, length]) if (depth, length) in cells else float("nan") for length in lengths]
        for depth in range(DEPTH_BINS)
    ]
    colormap = matplotlib.colormaps["viridis"].with_extremes(bad="#dddddd")
    image = panel.imshow(grid, vmin=0, vmax=1, cmap=colormap, aspect="auto")
    for (depth, length), scores in cells.items():
        mean = fmean(scores)
        text = f"{100 * mean:.0f}%\nn={len(scores)}"
        color = "black" if mean > 0.55 else "white"
        panel.text(lengths.index(length), depth, text, ha="center", va="center", color=color, fontsize=8)
    panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    shares = [f"{100 * i // DEPTH_BINS}-{100 * (i + 1) // DEPTH_BINS}%" for i in range(DEPTH_BINS)]
    panel.set_yticks(range(DEPTH_BINS), shares)
    return image


def draw_speed(table: ScoreTable, path: Path) -> None:
    """Accuracy against measured speed, one point a setting.

    Raises:
        ValueError: exact was not run, or solved nothing.
    """
    points = {s: (table.speedup(s), table.mean_score(s)) for s in table.settings if table.solved_cells(s)}
    points = {setting: point for setting, point in points.items() if point[0] is not None}
    if EXACT not in points:
        raise ValueError("there is no setting `exact` that solves a task above 50%: nothing to compare with")
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    panel = figure.subplots()
    for number, (setting, ((measured, _), score)) in enumerate(points.items()):
        panel.plot(
            measured,
            100 * score,
            linestyle="",
            marker=MARKERS[number % len(MARKERS)],
            color=COLORS[number % len(COLORS)],
            markersize=9,
            label=_wrapped(setting, 34),
        )
    panel.axhline(100 * points[EXACT][1], color="#999999", linewidth=1, linestyle="--", zorder=0)
    panel.margins(0.12)
    panel.grid(alpha=0.3)
    panel.set_xlabel("speedup against exact (measured seconds per answer)")
    panel.set_ylabel("mean score in %\n(cells that exact solves above 50%)")
    figure.legend(loc="outside right upper", fontsize=8, title="setting")
    figure.savefig(path, dpi=DPI, format="png")


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _wrapped(text: str, width: int = 24) -> str:
    """At spaces, into lines of at most so many characters where that can be."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
