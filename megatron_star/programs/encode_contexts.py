"""Encode documents ahead of time, into a context store, on all ranks of a job started by torchrun or srun.

    torchrun --no-python --nproc-per-node 2 megatron-star contexts encode --load CHECKPOINT \\
        --context-parallel-size 2 --context-store DIR --context-file document.txt --chat

What is asked later about such a document finds it encoded, if its context is the same tokens, and the options
of the model and of Star Attention are the same: `generate` with this document, or a server.
"""

import argparse
from collections.abc import Sequence

from megatron.core.inference.sampling_params import SamplingParams
from transformers import PreTrainedTokenizerBase

from megatron_star.checked_input import read_text
from megatron_star.engine.answer import Answer
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.request import StarRequest
from megatron_star.job.argument_types import ArgumentParser, text_argument
from megatron_star.job.environment import read_environment
from megatron_star.job.job import loaded_job
from megatron_star.job.model_arguments import add_model_arguments
from megatron_star.job.running import answer_batch, run_engine
from megatron_star.job.session import exit_on_errors
from megatron_star.job.star_arguments import add_star_arguments, star_config
from megatron_star.text.prompt import split_into_tokens

ANY_QUESTION = "What is this about?"
"""A context is what comes before a question, and depends on none."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add_star_arguments(parser)
    group = parser.add_argument_group("input")
    group.add_argument(
        "--context-file",
        nargs="+",
        type=text_argument,
        required=True,
        dest="context_files",
        metavar="FILE",
        help="texts, one document each",
    )
    group.add_argument(
        "--chat", action="store_true", help="apply the tokenizer's chat template; default: plain text"
    )
    args = parser.parse_args(argv)
    if args.context_store is None:
        parser.error("--context-store is missing: the folder to put contexts into")
    return args


def main() -> None:
    """Entry point of every rank."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank):
        args = parse_arguments()
        with loaded_job(args, environment, lambda: [read_text(path) for path in args.context_files]) as (
            job,
            texts,
        ):
            run_engine(
                job,
                lambda engine: [engine.prepare(request_of(text, args, job.tokenizer)) for text in texts],
                encode,
                max_running=1,
            )


def request_of(text: str, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> StarRequest:
    """A question about a document, of which only the context matters."""
    context, query = split_into_tokens(tokenizer, text, ANY_QUESTION, chat=args.chat)
    no_tokens = SamplingParams(num_tokens_to_generate=0)
    return StarRequest(context_tokens=context, query_tokens=query, star=star_config(args), sampling=no_tokens)


def encode(engine: StarEngine, answers: Sequence[Answer]) -> None:
    """Encode one document after the other, wait until all are in the store, and say what came of it."""
    for answer in answers:
        answer_batch(engine, [answer])
    engine.finish_storing()
    counts = engine.store.counts
    print(
        f"{len(answers)} documents: {counts.written} contexts written ({counts.bytes_written:,} bytes), "
        f"{counts.restored} were there"
    )


if __name__ == "__main__":
    main()
