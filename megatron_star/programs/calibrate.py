"""Find the cheapest setting of Star Attention for your own questions, on all ranks of a job.

    torchrun --nproc-per-node 2 launch/calibrate.py --load CHECKPOINT --context-parallel-size 2 --chat \\
        --input-jsonl yours.jsonl --tolerance 0.05 --output comparisons.jsonl

Each line of the input has a context and a query. What it costs is said before it starts. Run again, it goes
on where it was interrupted.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from time import monotonic
from typing import Any

from megatron_star.config import StarConfig
from megatron_star.engine.executor import planner_of
from megatron_star.evaluation.calibration import Calibration, default_settings
from megatron_star.evaluation.calibration_report import Progress, announcement, calibration_report
from megatron_star.evaluation.comparison import (
    EXACT,
    ComparedPrompt,
    Comparison,
    ExactAnswer,
    answer_exactly,
    compare,
)
from megatron_star.evaluation.search_cost import SearchCost
from megatron_star.evaluation.setting_text import parse_settings
from megatron_star.job.argument_types import ArgumentParser, positive, real_number, text_argument
from megatron_star.job.environment import read_environment
from megatron_star.job.job import Job, loaded_job
from megatron_star.job.model_arguments import add_model_arguments
from megatron_star.job.progress import heartbeat
from megatron_star.job.session import exit_on_errors
from megatron_star.parallel.control import from_driver
from megatron_star.planning.mask import MASKS
from megatron_star.programs.calibration_input import CalibrationInput, check, read_input, tokenized
from megatron_star.text.end_tokens import end_tokens


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    _add_calibration(parser)
    args = parser.parse_args(argv)
    args.settings = parse_settings(args.settings)
    compared = [mode for mode in MASKS if mode != "exact"]
    if any(star.mode not in compared for star in args.settings.values()):
        begin = " or ".join(compared)
        parser.error(f"--setting: everything is compared with exact, so each must begin with {begin}")
    return args


def _add_calibration(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--input-jsonl",
        type=text_argument,
        required=True,
        metavar="FILE",
        help="lines with context and query",
    )
    group.add_argument(
        "--chat", action="store_true", help="apply the tokenizer's chat template; default: plain text"
    )
    group.add_argument(
        "--setting",
        type=text_argument,
        action="append",
        default=[],
        dest="settings",
        metavar="TEXT",
        help='"star", "star block_size=8K anchor_size=64 passed_keys=1K", ..; may be repeated; default: '
        "star, and the longest context in 4 to 32 blocks, with few and many passed keys, and with a neighbor",
    )
    group.add_argument(
        "--tolerance",
        type=real_number(1e-4, 0.9999, what="a share"),
        default=0.05,
        metavar="T",
        help="share of answers that may change",
    )
    group.add_argument(
        "--ask-all",
        action="store_true",
        help="go on behind the search, until every setting has answered every question: for the table",
    )
    group.add_argument(
        "--num-tokens-to-generate", type=positive, default=32, metavar="N", help="of each answer, at most"
    )
    group.add_argument(
        "--output",
        type=text_argument,
        required=True,
        metavar="FILE",
        help="JSON Lines; what is there is kept",
    )


def main() -> None:
    """Entry point of every rank."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank), ExitStack() as held:
        args = parse_arguments()
        with loaded_job(args, environment, lambda: read_input(args, held)) as (job, given):
            calibration = calibrate(args, job, given)
        if calibration:
            print(calibration_report(calibration))
            print(f"{args.output}: the answers, question by question", file=sys.stderr)


def calibrate(args: argparse.Namespace, job: Job, given: CalibrationInput | None) -> Calibration | None:
    """Ask what `--output` has no answer to, until the search is over; on the driver, all that is known.

    Args:
        given: on the driver.

    Raises:
        SharedError: on all ranks, if the input is wrong.
    """
    control = job.groups.control
    with heartbeat("turning the questions into tokens", on=job.is_driver):
        work = from_driver(partial(_work, args, job, given), control)
    calibration = _calibration(args, job, given, work) if given else None
    asks = _asks(calibration, ask_all=args.ask_all) if calibration else None
    while asked := from_driver(lambda: next(asks, None), control):
        place = f"question {asked['question'] + 1}, {asked['setting'] or 'exact'}"
        with heartbeat(place, on=job.is_driver):
            answer = _answer(job, work, asked)
        if given:
            name = calibration.questions[asked["question"]]
            if asked["setting"]:
                given.output.add(name, asked["setting"], answer)
            else:
                given.output.add_exact(name, answer)
    return calibration


def _asks(calibration: Calibration, *, ask_all: bool) -> Iterator[dict[str, Any]]:
    """The driver's part: what to ask next, in a form that survives JSON. Says what has been asked."""
    print(announcement(calibration), file=sys.stderr, flush=True)
    progress = Progress(calibration)
    for open_ask in calibration.open_asks(ask_all=ask_all):
        exact = calibration.answers.exact.get(calibration.questions[open_ask.question])
        start = monotonic()
        yield {
            "question": open_ask.question,
            "setting": open_ask.setting,
            "exact": asdict(exact) if exact else None,
        }
        print(progress.line(open_ask, monotonic() - start), file=sys.stderr, flush=True)


def _answer(job: Job, work: dict[str, Any], asked: dict[str, Any]) -> ExactAnswer | Comparison:
    """On all ranks."""
    question = work["questions"][asked["question"]]
    prompt = ComparedPrompt(
        question["context"], question["query"], None, work["num_tokens"], tuple(work["end_tokens"])
    )
    settings = {name: StarConfig.from_dict(values) for name, values in work["settings"].items()}
    control = job.groups.control
    if not asked["setting"]:
        return answer_exactly(job.star_model, prompt, settings, control)
    exact = ExactAnswer(**asked["exact"])
    return compare(job.star_model, prompt, exact, settings[asked["setting"]], control)


def _work(args: argparse.Namespace, job: Job, given: CalibrationInput) -> dict[str, Any]:
    """The driver's part: the questions, as tokens, and the settings; in a form that survives JSON."""
    questions = [tokenized(document, job.tokenizer, args.chat) for document in given.documents]
    settings = args.settings or default_settings(max(len(question["context"]) for question in questions))
    for question in questions:
        check(question, args, job)
    given.output.check_same_settings(settings)
    return {
        "questions": questions,
        "settings": {name: asdict(star) for name, star in settings.items()},
        "end_tokens": end_tokens(job.tokenizer),
        "num_tokens": args.num_tokens_to_generate,
    }


def _calibration(
    args: argparse.Namespace, job: Job, given: CalibrationInput, work: dict[str, Any]
) -> Calibration:
    """The driver's part: what is to be asked, with what it costs."""
    planner = planner_of(job.star_model)
    lengths = [len(question["context"]) for question in work["questions"]]

    def costs(star: StarConfig) -> list[float]:
        of_length = {n: planner.plan(n, star).plan.cost(planner.costs) for n in set(lengths)}
        return [of_length[n] for n in lengths]

    with heartbeat("planning"):
        settings = {name: costs(StarConfig.from_dict(star)) for name, star in work["settings"].items()}
        cost = SearchCost.of(costs(EXACT), settings)
    questions = [str(document.id) for document in given.documents]
    return Calibration(questions, cost, args.tolerance, given.output)


if __name__ == "__main__":
    main()
