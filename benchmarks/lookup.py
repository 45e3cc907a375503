"""Prompt lookup: answers that quote a document of 4K tokens, with and without it; free text; transformers.

    OMP_NUM_THREADS=2 python benchmarks/lookup.py --load .demo/megatron --hf .demo/hf \\
        --compile-decode 1,2,4,8,16

Thirty questions whose answers copy a part of a document, greedily; and free text, drawn at temperature 1.
Contexts are encoded, exactly, before anything is measured: seconds are those of query and answer. Each
question is asked without and with lookup, one after the other; ratios of free text are medians of pairs. With
`--hf` (one rank) transformers answers some of the questions by its own prompt lookup: what it takes after its
first step is compared with what we take after the first token.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from megatron.core.inference.sampling_params import SamplingParams
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from benchmarks.lookup_questions import FREE_TEXTS, documents, questions
from benchmarks.measuring import run_on_ranks, write_result
from benchmarks.models import hugging_face_model
from megatron_star.config import SPECULATE, StarConfig
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.job.argument_types import ArgumentParser, positive, token_count
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.parallel.groups import StarGroups
from megatron_star.speed.attach import with_compiled_layers
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.text.tokenizer import load_tokenizer

LIMITS = {"max_sequence_length": 8192, "budget_bytes_per_rank": 4 << 30}
Figures = dict[str, float]


def quoting_requests(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> list[StarRequest]:
    """As many for each document, greedy; those on one document follow each other."""
    asked = [
        question
        for document in documents(tokenizer, args.num_tokens)
        for question in questions(document, args.questions // 3)
    ]
    sampling = SamplingParams(top_k=1, num_tokens_to_generate=args.answer_tokens)
    return [_request(tokenizer, question.context, question.query, sampling) for question in asked]


def free_requests(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> list[StarRequest]:
    """Without a context, drawn."""
    sampling = SamplingParams(temperature=1.0, num_tokens_to_generate=args.free_tokens)
    return [_request(tokenizer, "", text, sampling) for text in FREE_TEXTS]


def _request(
    tokenizer: PreTrainedTokenizerBase, context: str, query: str, sampling: SamplingParams
) -> StarRequest:
    context_tokens, query_tokens = (
        tokenizer.encode(text, add_special_tokens=False) for text in (context, query)
    )
    star = StarConfig(mode="exact")
    return StarRequest(context_tokens=context_tokens, query_tokens=query_tokens, star=star, sampling=sampling)


def encode_first(engine: StarEngine, requests: Iterable[StarRequest]) -> None:
    """Every context, so that it is there when a question is asked."""
    engine.generate(
        replace(request, sampling=SamplingParams(top_k=1, num_tokens_to_generate=1)) for request in requests
    )


def ask(engine: StarEngine, request: StarRequest, speculate: str) -> tuple[StarResult, float]:
    """A result, and the seconds of its query and answer."""
    start = perf_counter()
    (result,) = engine.generate([replace(request, speculate=speculate)])
    return result, perf_counter() - start


def measure(engine: StarEngine, requests: list[StarRequest], repeats: int) -> Figures:
    """Tokens a second without and with lookup, over all; and the median of their ratio."""
    seconds: dict[str, list[float]] = {name: [] for name in SPECULATE}
    num_tokens, proposed, accepted = 0, 0, 0
    encode_first(engine, requests)
    for request, _ in product(requests, range(repeats)):
        results = {}
        for name in SPECULATE:
            results[name], took = ask(engine, request, name)
            seconds[name].append(took)
        assert results["lookup"].tokens == results["off"].tokens
        num_tokens += len(results["lookup"].tokens)
        proposed += results["lookup"].num_proposed_tokens
        accepted += results["lookup"].num_accepted_tokens
    ratios = [off / lookup for off, lookup in zip(seconds["off"], seconds["lookup"], strict=True)]
    return {
        "tokens_per_s_without": num_tokens / sum(seconds["off"]),
        "tokens_per_s": num_tokens / sum(seconds["lookup"]),
        "times": sum(seconds["off"]) / sum(seconds["lookup"]),
        "median_times": statistics.median(ratios),
        "accepted_share": accepted / max(1, proposed),
        "accepted_per_token": accepted / num_tokens,
    }


class Clock(BaseStreamer):
    """When transformers has new tokens: the prompt comes first, then those of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Tokens."""
        self.times.append(perf_counter())

    def end(self) -> None:
        """Nothing more comes."""


@torch.inference_mode()
def transformers_answer(
    model: PreTrainedModel, request: StarRequest, lookup_tokens: int
) -> tuple[list[int], float]:
    """The answer of transformers' own prompt lookup, and its seconds after the first step."""
    prompt, clock = request.context_tokens + request.query_tokens, Clock()
    tokens = model.generate(
        torch.tensor([prompt]),
        prompt_lookup_num_tokens=lookup_tokens,
        max_new_tokens=request.sampling.num_tokens_to_generate,
        do_sample=False,
        eos_token_id=None,
        streamer=clock,
    )
    return tokens[0, len(prompt) :].tolist(), clock.times[-1] - clock.times[1]


def compare_with_transformers(
    args: Namespace, engine: StarEngine, model: PreTrainedModel, requests: Iterable[StarRequest]
) -> Figures:
    """Seconds after the first step, of both, of the same answers."""
    ours, theirs, num_same, count = 0.0, 0.0, 0, 0
    for request in requests:
        result, _ = ask(engine, request, "lookup")
        answer, seconds = transformers_answer(model, request, args.hf_lookup_tokens)
        ours += result.timings.tpot_s * (len(result.tokens) - 1)
        theirs += seconds
        num_same += answer == result.tokens
        count += 1
    return {"seconds": ours, "transformers_seconds": theirs, "times": theirs / ours, "same": num_same / count}


def drive(args: Namespace, star_model: FastStarModel, groups: StarGroups) -> dict[str, Figures]:
    """All figures, on the driver."""
    tokenizer = load_tokenizer(read_checkpoint_info(args.load).tokenizer_directory)
    engine = StarEngine(star_model, tokenizer, groups.control, **LIMITS)
    quoting = quoting_requests(args, tokenizer)
    ask(engine, quoting[0], "lookup")  # what is done only once
    summary = {}
    summary["quoting"] = measure(engine, quoting, 1)
    summary["free text"] = measure(engine, free_requests(args, tokenizer), args.repeats)
    if args.hf:
        some = quoting[:: max(1, len(quoting) // args.hf_questions)]
        model = hugging_face_model(args, star_model.device)
        summary["transformers"] = compare_with_transformers(args, engine, model, some)
    engine.stop()
    return summary


def run(args: Namespace, star_model: FastStarModel, groups: StarGroups) -> None:
    """On every rank."""
    star_model = with_compiled_layers(star_model, args.compile_decode)
    if dist.get_rank():
        run_worker(star_model, groups.control)
        return
    summary = drive(args, star_model, groups)
    for title, figures in summary.items():
        print(title)
        for name, value in figures.items():
            print(f"    {name:<28} {value:>10.3f}")
    write_result(args.output, summary, [])


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--num-tokens", type=token_count, default=4096, help="of a document")
    parser.add_argument("--questions", type=positive, default=30, metavar="N", help="a multiple of 3")
    parser.add_argument("--answer-tokens", type=positive, default=64, metavar="N")
    parser.add_argument("--free-tokens", type=positive, default=64, metavar="N")
    parser.add_argument("--repeats", type=positive, default=2, metavar="N", help="of free text")
    parser.add_argument("--hf", metavar="DIR", help="the same model for transformers; one rank")
    parser.add_argument("--hf-questions", type=positive, default=6, metavar="N", help="that it answers")
    parser.add_argument("--hf-lookup-tokens", type=positive, default=10, metavar="N")


if __name__ == "__main__":
    run_on_ranks("lookup.py", __doc__.splitlines()[0], add_arguments, run)
