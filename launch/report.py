"""Print what `megatron-star eval` has measured, and draw it.

python -m launch.report scores.jsonl --format markdown --heat-map needles.png --speed speed.png
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from launch.arguments import ArgumentParser
from megatron_star.evaluation.report import NOTES, markdown, plain_text, table_rows
from megatron_star.evaluation.results import ScoredAnswer, ScoreTable, read_answers
from megatron_star.parallel.control import describe

FORMATS = {"text": plain_text, "markdown": markdown}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of megatron-star eval")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these")
    parser.add_argument("--heat-map", type=Path, metavar="PNG", help="needles: depth x length, by setting")
    parser.add_argument("--speed", type=Path, metavar="PNG", help="accuracy against speed, by setting")
    return parser.parse_args(argv)


def report(answers: Sequence[ScoredAnswer], form: str) -> str:
    """The table and what its numbers mean."""
    return f"{FORMATS[form](table_rows(ScoreTable(answers)))}\n\n{NOTES}"


def pictures() -> ModuleType:
    """The module that draws; raises ValueError where matplotlib is missing."""
    try:
        return importlib.import_module("megatron_star.evaluation.pictures")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ValueError("pictures need matplotlib: pip install 'megatron-star[eval]'") from error


def run(args: argparse.Namespace) -> None:
    """Print and draw.

    Raises:
        ValueError, OSError: a file is not of `megatron-star eval`, or holds nothing to draw.
    """
    answers = [a for a in read_answers(args.files) if not args.tasks or a.task in args.tasks]
    if not answers:
        raise ValueError("no answers: the files are empty, or have none of these tasks")
    print(report(answers, args.format))
    if args.heat_map:
        pictures().draw_heat_map(answers, args.heat_map)
    if args.speed:
        pictures().draw_speed(ScoreTable(answers), args.speed)


def main() -> None:
    try:
        run(parse_arguments())
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
