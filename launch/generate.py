"""Ask questions about long documents, on all ranks of a job started by torchrun or srun.

    torchrun --nproc-per-node 2 launch/generate.py --load CHECKPOINT --context-parallel-size 2 \\
        --context-file document.txt --query "What is this about?" --chat --top-k 1 --output answer.json
"""

import argparse
import sys
from itertools import batched
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
from launch.environment import RankEnvironment, read_environment
from launch.progress import ConsoleProgress
from launch.session import exit_on_errors, process_groups
from megatron_star.inference.generator import StarGenerator
from megatron_star.inference.loading import load_star_model
from megatron_star.inference.prompt import split_into_tokens
from megatron_star.inference.request import StarRequest
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.parallel.control import from_driver, on_every_rank
from megatron_star.parallel.groups import StarGroups


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(prog="generate.py", description=__doc__.splitlines()[0])
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
        with process_groups(
            environment,
            tp_size=args.tensor_model_parallel_size,
            cp_size=args.context_parallel_size,
            timeout=args.distributed_timeout_minutes,
        ) as (groups, device):
            info = on_every_rank(lambda: read_checkpoint_info(args.load), groups.control)
            tokenizer = AutoTokenizer.from_pretrained(info.tokenizer_directory)
            star_model = on_every_rank(
                lambda: load_star_model(
                    info,
                    groups,
                    device=device,
                    dtype=args.dtype or info.dtype,
                    kernel=args.star_attention_kernel,
                    transformer_impl=args.transformer_impl,
                ),
                groups.control,
            )
            limit = info.args["max_position_embeddings"]
            generator = StarGenerator(star_model, tokenizer, groups.control, limit)
            answer_documents(args, environment, groups, generator, tokenizer)


def answer_documents(
    args: argparse.Namespace,
    environment: RankEnvironment,
    groups: StarGroups,
    generator: StarGenerator,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Read the input on the driver, answer it batch by batch on all ranks, write on the driver."""
    documents, requests = _read_requests(args, groups, generator, tokenizer)
    pairs = list(zip(documents, requests, strict=True))
    for batch in batched(pairs, args.max_batch_size):
        results = _answer(environment, generator, [request for _, request in batch])
        if environment.rank:
            continue
        if args.input_jsonl:
            append_jsonl(args.output, zip((document for document, _ in batch), results, strict=True))
            continue
        if args.output:
            write_json(args.output, results[0])
        print(results[0].text)


def _answer(environment: RankEnvironment, generator: StarGenerator, requests: list[StarRequest]) -> list[Any]:
    if environment.rank:
        return generator.generate(requests)
    progress = ConsoleProgress(sum(len(request.context_tokens) for request in requests))
    try:
        return generator.generate(requests, progress)
    finally:
        progress.close()


def _read_requests(
    args: argparse.Namespace, groups: StarGroups, generator: StarGenerator, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Document], list[StarRequest]]:
    """Documents that are still to be answered, and their requests, on every rank."""

    def read() -> list[list[dict[str, Any]]]:
        documents = _unanswered(args)
        requests = [_request(document, args, tokenizer) for document in documents]
        for request in requests:
            generator.check(request)
        return [
            [vars(document) for document in documents],
            [request.to_json() for request in requests],
        ]

    documents, requests = from_driver(read, groups.control)
    return [Document(**values) for values in documents], [StarRequest.from_json(r) for r in requests]


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
        sampling=sampling_params(args, tokenizer.eos_token_id),
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
