"""Ask questions about long documents, on all ranks of a job started by torchrun or srun.

    torchrun --nproc-per-node 2 launch/generate.py --load CHECKPOINT --context-parallel-size 2 \\
        --context-file document.txt --query "What is this about?" --chat --top-k 1 --output answer.json
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import batched
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_star.checked_input import strict_fields
from megatron_star.engine.answer import Answer
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.request import StarRequest
from megatron_star.job.answer_files import AnswerFile, AnswerLines
from megatron_star.job.argument_types import ArgumentParser, positive, text_argument
from megatron_star.job.asked import of_model, of_text
from megatron_star.job.documents import Document, read_document, read_jsonl
from megatron_star.job.environment import read_environment
from megatron_star.job.job import loaded_job
from megatron_star.job.model_arguments import add_model_arguments
from megatron_star.job.progress import heartbeat
from megatron_star.job.running import answer_batch, run_engine
from megatron_star.job.sampling_arguments import add_sampling_arguments, sampling_params
from megatron_star.job.session import exit_on_errors
from megatron_star.job.star_arguments import add_star_arguments, star_config
from megatron_star.text.end_tokens import end_tokens, stop_tokens
from megatron_star.text.prompt import split_into_tokens

PROGRAM = "generate"


class _GeneratedRecord:
    """What a line must have to be of this program."""

    id: Any
    asked: dict[str, Any]
    text: str
    tokens: list[int]


_RECORD = strict_fields(_GeneratedRecord)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add_star_arguments(parser)
    add_sampling_arguments(parser)
    group = parser.add_argument_group("input and output")
    documents = group.add_mutually_exclusive_group(required=True)
    documents.add_argument("--context-file", type=text_argument, metavar="FILE", help="text of one document")
    documents.add_argument(
        "--input-jsonl",
        type=text_argument,
        metavar="FILE",
        help="lines with context, query and, optionally, id",
    )
    query = group.add_mutually_exclusive_group()
    query.add_argument("--query", type=text_argument, metavar="TEXT", help="about --context-file")
    query.add_argument("--query-file", type=text_argument, metavar="FILE", help="about --context-file")
    group.add_argument(
        "--chat", action="store_true", help="apply the tokenizer's chat template; default: plain text"
    )
    group.add_argument(
        "--output",
        type=text_argument,
        metavar="FILE",
        help="the answer as JSON, in the place of an earlier one; with --input-jsonl JSON Lines, to which "
        "what is missing is added; default: none, the answer is printed",
    )
    group.add_argument("--max-batch-size", type=positive, default=8, metavar="N", help="documents of a batch")
    args = parser.parse_args(argv)
    if args.context_file and args.query is None and args.query_file is None:
        parser.error("--context-file needs --query or --query-file")
    if args.input_jsonl and not args.output:
        parser.error("--input-jsonl needs --output")
    if args.input_jsonl and (args.query is not None or args.query_file is not None):
        parser.error("--input-jsonl has a query in every line: leave out --query and --query-file")
    return args


def main() -> None:
    """Entry point of every rank."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank), ExitStack() as held:
        args = parse_arguments()
        if sys.stdout:  # an answer is not lost to an encoding; there may be no stdout
            sys.stdout.reconfigure(errors="backslashreplace")
        warning = star_config(args).warning()
        if warning and environment.is_driver:
            print(f"warning: {warning}", file=sys.stderr)
        with loaded_job(args, environment, lambda: open_work(args, held)) as (job, work):
            run_engine(
                job,
                lambda engine: prepare_documents(args, work.documents, engine),
                lambda engine, answers: answer_documents(args, work, engine, answers),
                max_running=args.max_batch_size,
            )


@dataclass(frozen=True)
class Work:
    """What the driver has to do, before anything is loaded: documents that are to be answered, and where to.

    Attributes:
        asked: what is asked about every document, by its id.
        num_finished: documents whose answers are in the output already.
    """

    documents: list[Document]
    asked: Mapping[str, Mapping[str, Any]]
    lines: AnswerLines | None = None
    file: AnswerFile | None = None
    num_finished: int = 0


def open_work(args: argparse.Namespace, held: ExitStack) -> Work:
    """Read the input and take the output, which is let go with `held`; raises ValueError or OSError."""
    model = of_model(args)
    names = ("context_file", "query_file", "input_jsonl")
    inputs = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    if args.context_file:
        documents = [read_document(args.context_file, args.query, args.query_file)]
        file = held.enter_context(AnswerFile(args.output, PROGRAM, inputs)) if args.output else None
        return Work(documents, _asked(documents, args, model), file=file)
    documents = read_jsonl(args.input_jsonl)
    lines = held.enter_context(AnswerLines(args.output, PROGRAM, _RECORD, inputs))
    asked = _asked(documents, args, model)
    finished = lines.finished(asked)
    if finished:
        print(f"{len(finished)} of {len(documents)} answers are in {args.output} already", file=sys.stderr)
    remaining = [document for document in documents if str(document.id) not in finished]
    return Work(remaining, asked, lines=lines, num_finished=len(finished))


def _asked(
    documents: Sequence[Document], args: argparse.Namespace, model: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    names = ("num_tokens_to_generate", "temperature", "top_k", "top_p", "seed", "stop")
    same = {**model, "chat": args.chat, "star": asdict(star_config(args))}
    same |= {name: getattr(args, name) for name in names}
    return {
        str(document.id): same | {"context": of_text(document.context), "query": document.query}
        for document in documents
    }


def answer_documents(
    args: argparse.Namespace, work: Work, engine: StarEngine, answers: Sequence[Answer]
) -> None:
    """Answer the documents, which were prepared as these, batch by batch; write, and say where to."""
    for batch in batched(zip(work.documents, answers, strict=True), args.max_batch_size):
        results = answer_batch(engine, [answer for _, answer in batch])
        records = [
            {"id": document.id, "asked": work.asked[str(document.id)], **asdict(result)}
            for (document, _), result in zip(batch, results, strict=True)
        ]
        if work.lines:
            work.lines.append(records)
        else:
            _show(records[0], work.file)
    engine.finish_storing()
    if work.lines:
        count = len(work.documents)
        print(f"{args.output}: {count + work.num_finished} answers, {count} of them new", file=sys.stderr)


def _show(record: Mapping[str, Any], file: AnswerFile | None) -> None:
    """Print an answer, and write it: what cannot be written is printed all the same."""
    try:
        if file:
            file.write(record)
            print(f"{file.path}: the answer, and how it was found", file=sys.stderr)
    finally:
        print(record["text"])


def prepare_documents(
    args: argparse.Namespace, documents: Sequence[Document], engine: StarEngine
) -> list[Answer]:
    """The documents as requests; raises ValueError, naming the document, if one cannot be answered."""
    with heartbeat(f"turning {len(documents)} documents into tokens"):
        return [_prepared(document, args, engine) for document in documents]


def _prepared(document: Document, args: argparse.Namespace, engine: StarEngine) -> Answer:
    try:
        return engine.prepare(_request(document, args, engine.tokenizer))
    except ValueError as error:
        where = args.context_file or f"{args.input_jsonl}, the document {document.id!r}"
        raise ValueError(f"{where}: {error}") from error


def _request(document: Document, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> StarRequest:
    context, query = split_into_tokens(tokenizer, document.context, document.query, chat=args.chat)
    return StarRequest(
        context_tokens=context,
        query_tokens=query,
        star=star_config(args),
        sampling=sampling_params(args),
        seed=args.seed,
        end_tokens=end_tokens(tokenizer) + stop_tokens(tokenizer, args.stop),
        speculate=args.speculate,
    )


if __name__ == "__main__":
    main()
