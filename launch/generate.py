"""Ask questions about long documents, on all ranks of a job started by torchrun or srun.

    torchrun --nproc-per-node 2 launch/generate.py --load CHECKPOINT --context-parallel-size 2 \\
        --context-file document.txt --query "What is this about?" --chat --top-k 1 --output answer.json
"""

import argparse
import sys
from itertools import batched
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import PreTrainedTokenizerBase

from launch.arguments import (
    ArgumentParser,
    add_model_arguments,
    add_sampling_arguments,
    add_star_arguments,
    sampling_params,
    star_config,
)
from launch.documents import (
    Document,
    append_jsonl,
    finished_ids,
    read_document,
    read_jsonl,
    write_json,
)
from launch.environment import read_environment
from launch.job import loaded_job, run_engine
from launch.progress import ConsoleProgress
from launch.session import exit_on_errors
from megatron_star.inference.end_tokens import end_tokens, stop_tokens
from megatron_star.inference.engine import StarEngine
from megatron_star.inference.prompt import split_into_tokens
from megatron_star.inference.request import StarRequest, StarResult
from megatron_star.parallel.control import from_driver
from megatron_star.parallel.groups import StarGroups


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add_star_arguments(parser)
    add_sampling_arguments(parser)
    group = parser.add_argument_group("input and output")
    documents = group.add_mutually_exclusive_group(required=True)
    documents.add_argument("--context-file", metavar="FILE", help="text of one document")
    documents.add_argument(
        "--input-jsonl", metavar="FILE", help="lines with context, query and, optionally, id"
    )
    query = group.add_mutually_exclusive_group()
    query.add_argument("--query", metavar="TEXT")
    query.add_argument("--query-file", metavar="FILE")
    group.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    group.add_argument("--output", metavar="FILE", help="answers as JSON, or JSON Lines for --input-jsonl")
    group.add_argument("--max-batch-size", type=int, default=8, metavar="N", help="documents of a batch")
    args = parser.parse_args(argv)
    if args.context_file and args.query is None and args.query_file is None:
        parser.error("--context-file needs --query or --query-file")
    if args.input_jsonl and not args.output:
        parser.error("--input-jsonl needs --output")
    if args.max_batch_size < 1:
        parser.error(f"--max-batch-size is {args.max_batch_size}: it must be at least 1")
    return args


def main() -> None:
    """Entry point of every rank."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank):
        args = parse_arguments()
        warning = star_config(args).warning()
        if warning and environment.rank == 0:
            print(f"warning: {warning}", file=sys.stderr)
        with loaded_job(args, environment) as job:
            run_engine(job, args.max_batch_size, lambda engine: answer_documents(args, engine, job.groups))


def answer_documents(args: argparse.Namespace, engine: StarEngine, groups: StarGroups) -> None:
    """Read the input, answer it batch by batch, write. Only the driver; raises on all ranks on bad input."""
    pairs: list[tuple[Document, StarRequest]] = []
    from_driver(lambda: pairs.extend(read_requests(args, engine)), groups.control)
    for batch in batched(pairs, args.max_batch_size):
        results = answer_batch(engine, [request for _, request in batch])
        if args.input_jsonl:
            append_jsonl(args.output, zip((document for document, _ in batch), results, strict=True))
            continue
        if args.output:
            write_json(args.output, results[0])
        print(results[0].text)


def answer_batch(engine: StarEngine, requests: list[StarRequest]) -> list[StarResult]:
    """The results of these requests, with progress shown; raises ValueError if one has no answer."""
    answers = [engine.submit(request) for request in requests]
    progress = ConsoleProgress(sum(len(request.context_tokens) for request in requests))
    try:
        while not all(answer.ended.is_set() for answer in answers):
            engine.step()
            progress.show(
                num_encoded=sum(answer.num_encoded_tokens for answer in answers),
                num_generated=sum(len(answer.tokens) for answer in answers),
            )
    finally:
        progress.close()
    results = [answer.result() for answer in answers]
    if failed := [result.error for result in results if result.error]:
        raise ValueError(f"{len(failed)} of {len(results)} requests have no answer: {failed[0]}")
    return results


def read_requests(args: argparse.Namespace, engine: StarEngine) -> list[tuple[Document, StarRequest]]:
    """Documents that are still to be answered, and their requests; raises ValueError or OSError."""
    documents = _unanswered(args)
    requests = [_request(document, args, engine.tokenizer) for document in documents]
    for request in requests:
        engine.check(request)
    return list(zip(documents, requests, strict=True))


def _unanswered(args: argparse.Namespace) -> list[Document]:
    if args.context_file:
        return [read_document(args.context_file, args.query, args.query_file)]
    documents = read_jsonl(args.input_jsonl)
    finished = finished_ids(args.output)
    remaining = [document for document in documents if document.id not in finished]
    if len(remaining) < len(documents):
        count = len(documents) - len(remaining)
        print(f"{count} of {len(documents)} answers are in {args.output} already", file=sys.stderr)
    return remaining


def _request(document: Document, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> StarRequest:
    context, query = split_into_tokens(tokenizer, document.context, document.query, chat=args.chat)
    return StarRequest(
        context_tokens=context,
        query_tokens=query,
        star=star_config(args),
        sampling=sampling_params(args),
        seed=args.seed,
        end_tokens=end_tokens(tokenizer) + stop_tokens(tokenizer, args.stop),
    )


if __name__ == "__main__":
    main()
