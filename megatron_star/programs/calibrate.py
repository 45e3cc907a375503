"""Find the cheapest setting of Star Attention for your own questions, on all ranks of a job.

    torchrun --nproc-per-node 2 launch/calibrate.py --load CHECKPOINT --context-parallel-size 2 --chat \\
        --input-jsonl yours.jsonl --tolerance 0.05 --output comparisons.jsonl

Each line of the input has a context and a query. Run again, it goes on where it was interrupted.
"""

import argparse
import random
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest
from megatron_star.evaluation.calibration import Comparisons, default_settings
from megatron_star.evaluation.calibration_report import calibration_report
from megatron_star.evaluation.comparison import ComparedPrompt, compare
from megatron_star.evaluation.comparison_file import ComparisonFile, read_comparisons
from megatron_star.evaluation.setting_text import parse_settings
from megatron_star.job.argument_types import ArgumentParser, positive, real_number, text_argument
from megatron_star.job.asked import of_model, of_ranks, of_text
from megatron_star.job.documents import Document, read_jsonl
from megatron_star.job.environment import read_environment
from megatron_star.job.job import Job, loaded_job
from megatron_star.job.model_arguments import add_model_arguments
from megatron_star.job.progress import heartbeat
from megatron_star.job.session import exit_on_errors
from megatron_star.model.longrope import needs_long_factors
from megatron_star.parallel.control import from_driver
from megatron_star.planning.cost_model import kv_layers
from megatron_star.planning.mask import MASKS
from megatron_star.text.end_tokens import end_tokens
from megatron_star.text.prompt import split_into_tokens


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
        help='"star block_size=8K anchor_size=2K neighbor_blocks=1", ..; may be repeated; default: the '
        "longest context in 4, 8 and 16 blocks, each also with a neighbor, and with half the anchor",
    )
    group.add_argument(
        "--tolerance",
        type=real_number(1e-4, 0.9999, what="a share"),
        default=0.05,
        metavar="T",
        help="share of answers that may change",
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
            comparisons = calibrate(args, job, given)
        if environment.is_driver:
            print(calibration_report(comparisons, args.tolerance))
            print(f"{args.output}: the comparisons, question by question", file=sys.stderr)


@dataclass(frozen=True)
class CalibrationInput:
    """The driver's part: all questions, and where comparisons go."""

    documents: list[Document]
    output: ComparisonFile


def read_input(args: argparse.Namespace, held: ExitStack) -> CalibrationInput:
    """Read the questions and take the output, which is let go with `held`, before anything is loaded.

    Raises:
        ValueError, OSError: there are none; or the output is no file for these questions.
    """
    same = of_model(args) | of_ranks(args) | {"chat": args.chat}
    same["num_tokens_to_generate"] = args.num_tokens_to_generate
    documents = read_jsonl(args.input_jsonl)
    if not documents:
        raise ValueError(f"{args.input_jsonl} has no questions")
    asked = {
        str(document.id): same | {"context": of_text(document.context), "query": document.query}
        for document in documents
    }
    output = held.enter_context(ComparisonFile(args.output, args.input_jsonl, asked))
    return CalibrationInput(documents, output)


def calibrate(args: argparse.Namespace, job: Job, given: CalibrationInput | None) -> Comparisons:
    """Compare on every question that `--output` lacks; on the driver, all comparisons of that file.

    Args:
        given: on the driver.

    Raises:
        SharedError: on all ranks, if the input is wrong.
    """
    control = job.groups.control
    with heartbeat("turning the questions into tokens", on=job.is_driver):
        work = from_driver(partial(_work, args, job, given), control)
    settings = {name: StarConfig.from_dict(values) for name, values in work["settings"].items()}
    for number, question in enumerate(work["questions"], 1):
        ends = tuple(work["end_tokens"])
        prompt = ComparedPrompt(
            question["context"], question["query"], None, args.num_tokens_to_generate, ends
        )
        place_of = f"question {number} of {len(work['questions'])}"
        with heartbeat(place_of, on=job.is_driver):
            tokens, comparisons = compare(job.star_model, prompt, settings, control)
        if given:
            given.output.add(question["id"], tokens, comparisons)
            print(f"{place_of}: compared", file=sys.stderr, flush=True)
    return read_comparisons(args.output) if given else []


def _work(args: argparse.Namespace, job: Job, given: CalibrationInput) -> dict[str, Any]:
    """The driver's part: which questions, as tokens, and which settings; in a form that survives JSON."""
    # The order decides which half a question is in: it must have nothing to do with the file's.
    documents = list(given.documents)
    random.Random(0).shuffle(documents)
    questions = [_question(document, job.tokenizer, args.chat) for document in documents]
    settings = args.settings or default_settings(max(len(question["context"]) for question in questions))
    for question in questions:
        _check(question, args, job)
    given.output.check_same_settings(settings)
    finished = given.output.lines.records
    return {
        "questions": [question for question in questions if str(question["id"]) not in finished],
        "settings": {name: asdict(star) for name, star in settings.items()},
        "end_tokens": end_tokens(job.tokenizer),
    }


def _question(document: Document, tokenizer: PreTrainedTokenizerBase, chat: bool) -> dict[str, Any]:
    context, query = split_into_tokens(tokenizer, document.context, document.query, chat=chat)
    if not context:
        raise ValueError(f"the question {document.id!r} has no context: there is nothing to compare")
    return {"id": document.id, "context": context, "query": query}


def _check(question: dict[str, Any], args: argparse.Namespace, job: Job) -> None:
    request = StarRequest(context_tokens=question["context"], query_tokens=question["query"])
    request.sampling.num_tokens_to_generate = args.num_tokens_to_generate
    try:
        request.check(vocab_size=job.star_model.vocab_size, max_sequence_length=job.max_sequence_length)
        num_prompt = len(request.context_tokens) + len(request.query_tokens)
        needs_long_factors(job.star_model.model.config, num_prompt, args.num_tokens_to_generate)
        _check_fits(len(question["context"]), job)
    except ValueError as error:
        raise ValueError(f"the question {question['id']!r}: {error}") from error


def _check_fits(num_context_tokens: int, job: Job) -> None:
    """One context is held at a time; whatever the setting, the ranks share it about evenly.

    Exact attention's keeps the KV of all layers: what a setting would hide is looked for there.
    """
    config = job.star_model.model.config
    layers = kv_layers(
        config, tp_size=config.tensor_model_parallel_size, bytes_per_value=config.params_dtype.itemsize
    )
    needed = layers.of_all(-(-num_context_tokens // job.star_model.exchange.cp_size))
    if needed > job.budget:
        raise ValueError(
            f"{num_context_tokens} context tokens need {needed:,} bytes of KV on a rank, but the budget is "
            f"{job.budget:,} bytes a rank: use more context-parallel ranks"
        )


if __name__ == "__main__":
    main()
