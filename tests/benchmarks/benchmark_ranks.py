"""What the ranks of the benchmarks' tests run; importable by their processes."""

from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any
from unittest.mock import patch

from benchmarks.gpu import check
from benchmarks.measuring import measure_rounds


def gpu_check(output: Path, arguments: Sequence[str], merge: str = "as it is") -> int:
    """The exit status of the check on a CPU with a tiny model; the stage `merge` may raise or hang."""
    stages = check.STAGES | {"raises": {"merge": _raises}, "hangs": {"merge": _hangs}}.get(merge, {})
    with patch.object(check, "STAGES", stages):
        return check.main(["--device", "cpu", "--model", "tiny", "--output", str(output), *arguments])


def _hangs(bench: Any) -> None:
    with bench.figure("merge", "hangs"):
        sleep(60)


def _raises(bench: Any) -> None:
    bench.figures.write("merge", "before", us=1.0)
    with bench.figure("merge", "raises"):
        raise RuntimeError("planted in a figure")
    raise RuntimeError("planted in a stage")


def rounds_until_it_breaks(output: Path) -> None:
    """Two rounds, and a third that raises."""
    values = iter([1.0, 3.0])
    with suppress(StopIteration):
        measure_rounds(Namespace(repeats=5, output=str(output)), lambda: next(values), sum)
