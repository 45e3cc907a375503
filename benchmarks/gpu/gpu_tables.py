"""Lines of the GPU check as the tables of docs/gpu.md."""

import json
from pathlib import Path
from typing import Any

COLUMNS: dict[str, dict[str, str]] = {
    "kernels": {"cases": "cases", "failed": "failed", "first": "first failures"},
    "merge": {"us": "µs", "gb_per_s": "GB/s", "difference": "largest difference"},
    "load": {"s": "s", "params": "parameters", "kernel": "kernel"},
    "parity": {"relative_error": "relative error", "same_tokens": "same tokens", "finite": "finite"},
    "encode": {"s": "s", "tflops": "TFLOP/s", "of_peak": "of peak", "peak_gb": "peak GB", "kv_gb": "KV GB"},
    "ranks": {
        "s": "s",
        "of_peak": "of peak",
        "peak_gb": "peak GB",
        "received_mb": "received MB",
        "sent_mb": "sent MB",
    },
    "experts": {
        "s": "s",
        "tflops": "TFLOP/s",
        "peak_gb": "peak GB",
        "tpot_ms": "TPOT ms",
        "host_ms": "host ms",
    },
    "decode": {"tpot_ms": "TPOT ms", "host_ms": "host ms", "floor_ms": "floor ms", "gb_per_s": "GB/s"},
    "graph": {
        "plain_ms": "plain TPOT ms",
        "tpot_ms": "replayed TPOT ms",
        "replayed": "steps replayed",
        "difference": "difference",
    },
    "compiled": {"s": "s", "tpot_ms": "TPOT ms", "host_ms": "host ms", "floor_ms": "floor ms"},
    "attention": {"ms": "ms", "tflops": "TFLOP/s", "kv_gb_per_s": "KV GB/s"},
    "profile": {"ms": "ms", "busy_ms": "busy ms", "calls": "calls", "share": "share"},
    "hf": {"s": "s", "tpot_ms": "TPOT ms"},
    "memory": {"max_gb": "most GB", "reserved_gb": "reserved GB"},
}
"""Of each stage, what its table shows: at most five beside the name."""


def tables(path: Path) -> str:
    """All tables of a file of figures, and then what failed or was left out.

    Raises:
        ValueError: a line that is no figure; the last one may be torn.
    """
    rows = read_figures(path)
    parts = [_machine(row) for row in rows if row["stage"] == "machine" and row["name"] == "machine"][-1:]
    for stage, columns in COLUMNS.items():
        found = {row["name"]: row for row in rows if row["stage"] == stage and columns.keys() & row.keys()}
        found.pop("done", None)
        if found:
            parts.append(_table(stage, columns, found))
    lost = [row for row in rows if row.keys() & {"error", "left_out"}]
    if lost:
        parts.append("\n".join(["Failed or left out:", "", *(_lost(row) for row in lost)]))
    return "\n\n".join(parts)


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The lines of the check; a last line without its end is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for number, line in enumerate(whole.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append(row | {"stage": row["stage"], "name": row["name"]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no figure of gpu_check.py") from error
    return rows


def _machine(row: dict[str, Any]) -> str:
    facts = (f"{key} {_cell(value)}" for key, value in row.items() if key not in ("t", "stage", "name"))
    return ", ".join(facts) + "."


def _table(stage: str, columns: dict[str, str], rows: dict[str, dict[str, Any]]) -> str:
    shown = {key: title for key, title in columns.items() if any(key in row for row in rows.values())}
    lines = [f"| {stage} | " + " | ".join(shown.values()) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(key, "")) for key in shown) + " |")
    return "\n".join(lines)


def _lost(row: dict[str, Any]) -> str:
    reason = " ".join(str(row.get("error") or row["left_out"]).split())
    return f"- {row['stage']}, {row['name']}: {reason}"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)).replace("|", "/")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
