"""What the engine saves: second questions, questions asked together, and no long wait for a long context.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/engine.py --load .demo/megatron

All figures come from one process group in one run; ratios are between runs that stand next to each other.
"""

import copy
import statistics
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.measuring import write_result
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.request import SamplingParams, StarRequest
from megatron_star.engine.thread import EngineThread
from megatron_star.job.argument_types import ArgumentParser, token_count
from megatron_star.job.environment import read_environment
from megatron_star.job.grid import Grid
from megatron_star.job.loading import load_star_model
from megatron_star.job.model_arguments import add_model_arguments
from megatron_star.job.session import end_process, exit_on_errors, process_groups
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.text.tokenizer import load_tokenizer


def random_tokens(count: int, star_model: StarModel) -> list[int]:
    """Token ids that are the same on every rank."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(star_model.vocab_size, (count,), generator=generator).tolist()


def decode_rate(star_model: StarModel, contexts: list[EncodedContext], steps: int) -> float:
    """Tokens a second of one sequence on each of these contexts, decoding together."""
    cp_size = star_model.exchange.cp_size
    sequences = [Sequence(context, tail_rank=i % cp_size) for i, context in enumerate(contexts)]
    generate_step(star_model, [(sequence, [1] * 8) for sequence in sequences])
    dist.barrier()
    start = perf_counter()
    for _ in range(steps):
        generate_step(star_model, [(sequence, [1]) for sequence in sequences])
    return steps * len(sequences) / (perf_counter() - start)


def measure_decoding(args: Namespace, star_model: StarModel) -> dict[str, float]:
    """Eight sequences on one context against one; stacked in one attention call against eight calls."""
    config = StarConfig(block_size=args.block_size)
    tokens = random_tokens(args.num_tokens, star_model)
    costs = token_costs(star_model.model.config)
    _, plan = choose_plan(len(tokens), star_model.exchange.cp_size, config, costs)
    context = encode_context(star_model, tokens, plan)
    variants = {
        "one": [context],
        "stacked": [context] * 8,
        "separate": [copy.copy(context) for _ in range(8)],  # the same KV, but not known to be the same
    }
    rounds = [
        {name: decode_rate(star_model, contexts, 10) for name, contexts in variants.items()}
        for _ in range(args.repeats)
    ]
    return {
        "one_sequence_tokens_per_s": statistics.median(r["one"] for r in rounds),
        "eight_sequences_tokens_per_s": statistics.median(r["stacked"] for r in rounds),
        "eight_against_one": statistics.median(r["stacked"] / r["one"] for r in rounds),
        "stacked_against_separate": statistics.median(r["stacked"] / r["separate"] for r in rounds),
    }


def ask(engine: EngineThread, tokens: list[int], block_size: int, num_tokens: int, query: int) -> StarRequest:
    """A greedy request."""
    return StarRequest(
        context_tokens=tokens,
        query_tokens=[query] * 16,
        star=StarConfig(block_size=block_size),
        sampling=SamplingParams(top_k=1, num_tokens_to_generate=num_tokens),
    )


def measure_second_question(args: Namespace, engine: EngineThread) -> dict[str, float]:
    """Seconds to the first token of two questions about one document, one after the other."""
    tokens = random_tokens(args.num_tokens + 1, engine.engine.star_model)
    first, second = (
        engine.submit(ask(engine, tokens, args.block_size, 2, query)).result().timings.ttft_s
        for query in (5, 6)
    )
    return {"first_ttft_s": first, "second_ttft_s": second, "first_against_second": first / second}


def measure_waiting(args: Namespace, engine: EngineThread) -> dict[str, float]:
    """The longest time between two tokens of a sequence while a long context is encoded beside it."""
    short, long = (random_tokens(n, engine.engine.star_model) for n in (500, args.long_tokens))
    running = engine.submit(ask(engine, short, args.block_size, 100_000, 5))
    stream = iter(running)
    next(stream)
    encoding = engine.submit(ask(engine, long, args.block_size, 1, 6))
    gaps, last = [], monotonic()
    while not encoding.ended.is_set():
        next(stream)
        gaps.append(monotonic() - last)
        last = monotonic()
    running.cancel()
    waits = {"bound_s": args.max_wait_seconds, "longest_wait_s": max(gaps), "tokens_meanwhile": len(gaps)}
    return waits | {"encoding_s": encoding.result().timings.context_encoding_s}


def drive(args: Namespace, engine: EngineThread) -> dict[str, dict[str, float]]:
    """The measurements that need the engine, on the driver."""
    engine.start(lambda error: end_process(0, error))
    results = {
        "second question": measure_second_question(args, engine),
        "waiting while a context is encoded": measure_waiting(args, engine),
    }
    engine.stop()
    engine.engine.stop()
    return results


def report(args: Namespace, results: dict[str, dict[str, float]]) -> None:
    """For people, and as JSON."""
    for title, figures in results.items():
        print(title)
        for name, value in figures.items():
            print(f"    {name:<30} {value:>10.3f}")
    write_result(args.output, results, [])


def main() -> None:
    """Entry point of every rank."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank):
        parser = ArgumentParser(prog="engine.py", description=__doc__.splitlines()[0])
        add_model_arguments(parser)
        parser.add_argument("--num-tokens", type=token_count, default=6144, metavar="TOKENS")
        parser.add_argument("--long-tokens", type=token_count, default=16384, metavar="TOKENS")
        parser.add_argument("--block-size", type=token_count, default=1024, metavar="TOKENS")
        parser.add_argument("--max-wait-seconds", type=float, default=3.0, metavar="S")
        parser.add_argument("--repeats", type=int, default=3, metavar="N")
        parser.add_argument("--output", metavar="FILE")
        args = parser.parse_args()
        grid = replace(Grid.of_arguments(args), tp_size=1, cp_size=environment.world_size)
        timeout = args.distributed_timeout_minutes
        with process_groups(environment, grid, timeout=timeout, backend=args.distributed_backend) as (
            groups,
            device,
        ):
            info = read_checkpoint_info(args.load)
            star_model = load_star_model(info, groups, device=device, dtype=args.dtype or info.dtype)
            results = {"decoding": measure_decoding(args, star_model)}
            if not environment.is_driver:
                run_worker(star_model, groups.control)
            else:
                limits = {"max_sequence_length": 1 << 20, "budget_bytes_per_rank": 8 << 30}
                tokenizer = load_tokenizer(info.tokenizer_directory)
                wait = args.max_wait_seconds
                engine = StarEngine(star_model, tokenizer, groups.control, max_wait_seconds=wait, **limits)
                report(args, results | drive(args, EngineThread(engine)))


if __name__ == "__main__":
    main()
