"""The frontier of repairs as a picture: what candidates keep of exact, against the operations they take."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from benchmarks.repair_candidates import Candidate
from benchmarks.repair_report import Figures
from megatron_star.evaluation.pictures import DPI

COLORS = {
    "exact": "#000000",
    "star as published": "#D55E00",
    "neighbors, another anchor": "#E69F00",
    "most distinct keys passed (KeyDiff)": "#0072B2",
    "the same, fewer with distance": "#009E73",
    "keys passed by scores": "#CC79A7",
    "keys passed by norm or place": "#8B5A2B",
    "layers, blocks or rows that see more": "#7F7F7F",
    "the question sees blocks otherwise": "#56B4E9",
}
"""Okabe and Ito's, with a brown and a grey, by family."""
EMPHASISED = ("star as published", "neighbors, another anchor")
PLACES = [
    (r * x, r * y)
    for r in (9, 15, 22, 30)
    for x, y in ((1, 0.6), (-1, 0.6), (1, -0.6), (-1, -0.6), (0, 1), (0, -1))
]


def family(candidate: Candidate) -> str:
    """One of COLORS, of a candidate with blocks."""
    if candidate.asked_blocks or candidate.asked_bias:
        return "the question sees blocks otherwise"
    wider = candidate.exact_layers or candidate.delta or candidate.spacing == "log"
    if wider or candidate.last_block == "exact":
        return "layers, blocks or rows that see more"
    if not candidate.passed:
        published = candidate == candidate.as_published
        return "star as published" if published else "neighbors, another anchor"
    if candidate.select == "scores":
        return "keys passed by scores"
    if candidate.select != "keydiff":
        return "keys passed by norm or place"
    halved = candidate.halving or candidate.most
    return "the same, fewer with distance" if halved else "most distinct keys passed (KeyDiff)"


def draw_frontier(figures: Sequence[Figures], best: Figures, path: Path, *, title: str) -> None:
    """Every candidate a number: what it keeps, and how likely the right answer is, against its operations.

    Emphasised are star as published, neighbors, and the best one.

    Raises:
        ValueError: exact solved none of the samples.
    """
    by_operations = sorted(figures, key=lambda f: f.to_exact)
    drawn = [f for f in by_operations if f.kept is not None and f.candidate.blocks > 1]
    if not drawn:
        raise ValueError("there is no candidate but exact, or exact solved none of these samples")
    figure = Figure(figsize=(12.5, 9.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 0.62))
    panels = [figure.add_subplot(grid[row, 0]) for row in (0, 1)]
    panels[1].sharex(panels[0])
    _draw_points(panels[0], drawn, best, [100 * f.kept for f in drawn], intervals=True)
    _draw_points(panels[1], drawn, best, [f.log_probability - f.exact_log_probability for f in drawn])
    for panel, of_exact in zip(panels, (100.0, 0.0), strict=True):
        _draw_exact(panel, of_exact)
    panels[0].set_ylabel("kept of exact's right answers, %")
    panels[1].set_ylabel("log p of the right answer, minus exact's")
    panels[1].set_xlabel("operations of encoding (linear and attention) against exact's")
    figure.suptitle(f"Repairs of star's loss: {title}, 95% intervals", fontsize=12)
    _list_candidates(figure.add_subplot(grid[:, 1]), drawn, best)
    figure.draw_without_rendering()  # places become known
    figure.set_layout_engine("none")
    for panel in panels:
        _number_points(panel, canvas)
    figure.savefig(path, dpi=DPI, format="png")


def _draw_points(
    panel: Axes,
    drawn: Sequence[Figures],
    best: Figures,
    heights: Sequence[float],
    *,
    intervals: bool = False,
) -> None:
    reached = float("-inf")
    frontier: list[tuple[float, float]] = []
    for number, (f, height) in enumerate(zip(drawn, heights, strict=True), 1):
        name = family(f.candidate)
        large = name in EMPHASISED or f is best
        if intervals:
            low, high = (100 * value for value in f.interval)
            panel.plot([f.to_exact] * 2, [low, high], color=COLORS[name], linewidth=1, alpha=0.35, zorder=1)
        panel.plot(
            f.to_exact,
            height,
            marker="*" if f is best else "o",
            markersize=19 if f is best else 9 if large else 6,
            color=COLORS[name],
            markeredgecolor="black" if large else "white",
            markeredgewidth=1.2 if large else 0.5,
            zorder=3 if large else 2,
            gid=str(number),
        )
        if height > reached:
            reached = height
            frontier.append((f.to_exact, height))
    panel.plot(*zip(*frontier, strict=True), color="#444444", linewidth=0.8, drawstyle="steps-post", zorder=0)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_exact(panel: Axes, height: float) -> None:
    """A line: its place, at operations of 1, would leave the others half of the picture."""
    panel.axhline(height, color=COLORS["exact"], linewidth=1.5, zorder=0)
    panel.annotate(
        "exact, at 1.0 \u2192",
        (0.9, height),
        (0, -5),
        xycoords=panel.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        fontweight="bold",
        zorder=0,
    )


def _number_points(panel: Axes, canvas: FigureCanvasAgg) -> None:
    """Each point's number beside it, at the first place where it covers neither a point nor a number."""
    points = [line for line in panel.lines if line.get_gid()]
    taken = [_around(panel, point) for point in points]
    for point in points:
        texts = [_number(panel, point, place) for place in PLACES]
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
        covered = [sum(box.overlaps(other) for other in taken) for box in boxes]
        chosen = covered.index(min(covered))
        for place, text in enumerate(texts):
            if place != chosen:
                text.remove()
        taken.append(boxes[chosen])


def _around(panel: Axes, point: Line2D) -> Bbox:
    x, y = panel.transData.transform(point.get_xydata()[0])
    radius = 0.4 * point.get_markersize() * panel.figure.dpi / 72
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _number(panel: Axes, point: Line2D, place: tuple[float, float]) -> Text:
    far = abs(place[0]) + abs(place[1]) > 20
    return panel.annotate(
        point.get_gid(),
        point.get_xydata()[0],
        place,
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=7.5,
        color=point.get_color(),
        arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#999999"} if far else None,
    )


def _list_candidates(panel: Axes, drawn: Sequence[Figures], best: Figures) -> None:
    """Numbers, names and samples, by family."""
    panel.set_axis_off()
    lines: list[tuple[str, str, str]] = []
    for name, color in COLORS.items():
        of_family = [(i, f) for i, f in enumerate(drawn, 1) if family(f.candidate) == name]
        if of_family:
            lines.append((name, color, "bold"))
        for number, f in of_family:
            text = f"{number:>3}  {str(f.candidate).removeprefix('star ')}  (n={f.num_samples})"
            lines.append((text, color, "bold" if f is best else "normal"))
    height = 1 / max(40, len(lines))
    for row, (text, color, weight) in enumerate(lines):
        panel.text(0, 1 - row * height, text, color=color, fontweight=weight, fontsize=8, va="top")
