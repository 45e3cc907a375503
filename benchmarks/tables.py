"""What the benchmarks found: a table of aims and figures, and pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.encoding_variants import BROADCAST, CONTIGUOUS, EXACT, PASSED, RECOMPUTE

Summaries = dict[str, dict[str, Any]]
COLOURS = {
    EXACT: "#0072b2",
    CONTIGUOUS: "#56b4e9",
    RECOMPUTE: "#e69f00",
    BROADCAST: "#009e73",
    PASSED: "#cc79a7",
}


class Aim(NamedTuple):
    """A figure that is aimed at: at least so much."""

    what: str
    part: str
    figure: Callable[[dict[str, Any]], float]
    at_least: float


def _to_one_rank(variant: str) -> Callable[[dict[str, Any]], float]:
    """How many times as fast as one rank a variant generates a token."""
    return lambda summary: summary[variant]["faster_than_one_rank"]


def _to_base(variant: str) -> Callable[[dict[str, Any]], float]:
    """How many times as fast a variant is as what it is compared with."""
    return lambda summary: summary[variant]["faster"]


def _to_transformers(summary: dict[str, Any]) -> float:
    """How many times as fast as transformers one rank generates a token, without compiled layers."""
    return 1 / summary["hugging face"]["faster_than_one_rank"]


def _first_token_to_transformers(summary: dict[str, Any]) -> float:
    return summary["transformers, SDPA"]["to_ours"]


def _full_to_windows(summary: dict[str, Any]) -> float:
    """How many times as long exact encoding takes where all layers have full attention."""
    return summary[f"full, {EXACT}"]["to_windows"]


def _transformers_to_windows(summary: dict[str, Any]) -> float:
    return summary["transformers"]["to_windows"]


def _lookup_to_transformers(summary: dict[str, Any]) -> float:
    """How many times as fast as by transformers' own prompt lookup tokens come after the first."""
    return summary["transformers"]["times"]


def _broadcast_to_passed(summary: dict[str, Any]) -> float:
    return 1 / summary[PASSED]["to_broadcast"]


AIMS = (
    Aim("16K in 16 blocks: exact / star", "encoding-16k", lambda s: s[EXACT]["to_broadcast"], 2.4),
    Aim("32K in 32 blocks: exact / star", "encoding-32k", lambda s: s[EXACT]["to_broadcast"], 3.6),
    *(
        Aim(f"{n}K in {n} blocks: star / passed keys", f"encoding-{n}k", _broadcast_to_passed, at_least)
        for n, at_least in ((16, 1.15), (32, 1.2))
    ),
    Aim("6K: first token encoded / from a store", "context-store", lambda s: s["restored"]["sooner"], 20),
    Aim("8K: decoding with int8 contexts / as computed", "kv-8-bits", lambda s: s["int8"]["faster"], 1.25),
    Aim("needles at 4K kept by int8 contexts", "kv-8-bits", lambda s: s["int8"]["kept"], 0.99),
    Aim("16K: anchor recomputed / broadcast", "encoding-16k", lambda s: s[RECOMPUTE]["to_broadcast"], 1.6),
    *(
        Aim(f"{n}K, star: floor / encoding", f"encoding-{n}k", lambda s: s[BROADCAST]["of_floor"], 0.85)
        for n in (8, 16, 32)
    ),
    *(
        Aim(f"TTFT at {n}K: transformers / one rank", f"one-rank-{n}k", _first_token_to_transformers, 1.0)
        for n in (4, 8)
    ),
    Aim("TPOT at 8K, SmolLM2-135M: transformers / one rank", "decode", _to_transformers, 1.5),
    Aim("TPOT at 8K, 1.2B in bf16: transformers / one rank", "decode-1b", _to_transformers, 1.0),
    *(
        Aim(f"TPOT at 8K, {model}: one rank / two, {variant}", part, _to_one_rank(variant), at_least)
        for model, part in (
            ("SmolLM2-135M", "decode"),
            ("1.2B in fp32", "decode-1b-fp32"),
            ("1.2B in bf16", "decode-1b"),
        )
        for variant, at_least in (("sliced, compiled", 1.5), ("sliced", 1.5), ("whole", 1.0))
    ),
    Aim("8K, 5 of 6 layers windows: full / windows, exact", "windows-8k", _full_to_windows, 1.0),
    Aim(
        "8K, 5 of 6 layers windows: transformers / one rank",
        "windows-8k-one-rank",
        _transformers_to_windows,
        1.0,
    ),
    *(
        Aim(
            f"TPOT, 1B of experts, slices{suffix}: EP 1 / EP 2",
            "experts",
            _to_base(f"EP, sliced{suffix}"),
            1.5,
        )
        for suffix in (", compiled", "")
    ),
    Aim("encoding 2K, 1B of experts: EP 1 / EP 2", "experts", _to_base("encoding, EP"), 0.95),
    *(
        Aim(
            f"sampling of 64 rows at 128K words, {kind}: before / after", "sampling", _to_base(kind), at_least
        )
        for kind, at_least in (("greedy", 1.0), ("top-k", 2.0), ("top-p", 10.0), ("mixed", 5.0))
    ),
    *(
        Aim(f"{what}{ranks}", part, figure, at_least)
        for part, ranks in (("lookup", ""), ("lookup-two-ranks", ", two ranks"))
        for what, figure, at_least in (
            ("answers that quote 4K: lookup / none", lambda s: s["quoting"]["times"], 2.0),
            ("free text: lookup / none", lambda s: s["free text"]["median_times"], 0.97),
        )
    ),
    Aim("answers that quote 4K: ours / transformers' lookup", "lookup", _lookup_to_transformers, 1.3),
    Aim("broadcast hidden at 1 GB/s", "overlap", lambda s: s["overlapped"]["hidden"], 0.8),
    Aim("passed keys hidden at 1 GB/s", "overlap", lambda s: s["passed, overlapped"]["hidden"], 0.8),
)


def write_figures(results: Summaries, path: Path) -> None:
    """A Markdown table of the aims whose part has run."""
    lines = ["| figure | at least | measured | |", "|---|---|---|---|"]
    for aim in AIMS:
        if aim.part in results:
            measured = aim.figure(results[aim.part])
            verdict = "reached" if measured >= aim.at_least else "**missed**"
            lines.append(f"| {aim.what} | {aim.at_least} | {measured:.3f} | {verdict} |")
    path.write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


def draw(results: Summaries, directory: Path) -> None:
    """Pictures of what has run."""
    encodings = {name: s for name, s in results.items() if name.startswith("encoding-")}
    if encodings:
        _draw_encodings(encodings, directory / "encoding.png")
    memory = [s for name, s in results.items() if name.startswith("memory-")]
    if memory:
        _draw_memory(memory, directory / "memory.png")


def _draw_encodings(encodings: Summaries, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = sorted(encodings, key=lambda name: int(name.split("-")[1].rstrip("k")))
    width = 0.8 / len(COLOURS)
    for place, (variant, colour) in enumerate(COLOURS.items()):
        at = [i for i, name in enumerate(names) if variant in encodings[name]]
        ratios = [encodings[names[i]][variant]["to_broadcast"] for i in at]
        offset = (place - (len(COLOURS) - 1) / 2) * width
        bars = axes.bar([i + offset for i in at], ratios, width, color=colour, label=variant)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(names)), [f"{n.split('-')[1].upper()} tokens\nblocks of 1K" for n in names])
    axes.set_ylabel("time / time of star, broadcast")
    axes.set_title("Context encoding, 2 ranks: ratios within a round")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_memory(memory: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    memory = sorted(memory, key=lambda s: (s["num_tokens"] / s["num_ranks"], s["most_tokens_in_a_wave"]))
    labels = [
        f"{s['num_tokens'] // 1024}K / {s['num_ranks']}\nwave {s['most_tokens_in_a_wave'] / 1024:g}K"
        for s in memory
    ]
    kv = [s["kv_mb"] for s in memory]
    axes.bar(labels, kv, color=COLOURS[EXACT], label="KV")
    axes.bar(
        labels,
        [s["activations_mb"] for s in memory],
        bottom=kv,
        color=COLOURS[RECOMPUTE],
        label="activations",
    )
    axes.set_xlabel("tokens / ranks, and tokens of a rank in one wave")
    axes.set_ylabel("MB on a rank at most")
    axes.set_title("Memory of context encoding, star, blocks of 512")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
