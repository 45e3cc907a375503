"""Print what `megatron-star eval` has measured, and draw it.

megatron-star report scores.jsonl --format markdown --heat-map needles.png --speed speed.png
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from megatron_star.evaluation.results import ScoredAnswer, ScoreTable, read_answers
from megatron_star.evaluation.score_tables import NOTES, markdown, plain_text, table_rows
from megatron_star.job.argument_types import ArgumentParser
from megatron_star.job.output_file import check_not_an_input
from megatron_star.job.single_process import exit_on_user_errors

PNG = b"\x89PNG"
FORMATS = {"text": plain_text, "markdown": markdown}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of megatron-star eval")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the table")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these; default: all")
    parser.add_argument(
        "--heat-map", type=Path, metavar="PNG", help="needles: depth x length, by setting; default: not drawn"
    )
    parser.add_argument(
        "--speed", type=Path, metavar="PNG", help="accuracy against speed, by setting; default: not drawn"
    )
    args = parser.parse_args(argv)
    if args.speed and args.heat_map and args.speed.absolute() == args.heat_map.absolute():
        parser.error(f"--heat-map and --speed are both {args.speed}")
    return args


def report(answers: Sequence[ScoredAnswer], form: str) -> str:
    """The table and what its numbers mean."""
    table = ScoreTable(answers)
    return "\n\n".join([FORMATS[form](table_rows(table)), "\n".join([NOTES, *table.chosen()])])


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
    for picture in filter(None, (args.heat_map, args.speed)):
        check_picture(picture, args.files)
    answers = [a for a in read_answers(args.files) if not args.tasks or a.task in args.tasks]
    if not answers:
        raise ValueError("no answers: the files are empty, or have none of these tasks")
    print(report(answers, args.format))
    if args.heat_map:
        pictures().draw_heat_map(answers, args.heat_map)
        print(f"{args.heat_map}: depth x length", file=sys.stderr)
    if args.speed:
        pictures().draw_speed(ScoreTable(answers), args.speed)
        print(f"{args.speed}: accuracy against speed", file=sys.stderr)


def check_picture(path: Path, inputs: Sequence[Path]) -> None:
    """Raises ValueError if no picture can be put here: a folder is missing, or a file is there.

    Another picture is replaced.
    """
    for other in inputs:
        check_not_an_input(path, {"this report": other}, advice="give another name")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.exists() and (not path.is_file() or not path.read_bytes().startswith(PNG)):
        raise ValueError(f"{path}: exists, and is no PNG: give another name")


def main() -> None:
    with exit_on_user_errors():
        run(parse_arguments())


if __name__ == "__main__":
    main()
