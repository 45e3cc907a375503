"""What the ranks of test_kv_of_layers.py run: contexts wave by wave, and an engine of such ranks."""

from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core.inference.sampling_params import SamplingParams
from ranks import NumbersAsText, random_star_model

from benchmarks.counted_work import CountedWork, count_work
from megatron_star.algorithm.context_encoding import encode_wave
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.config import StarConfig
from megatron_star.engine.command import Command
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.executor import RankExecutor, planner_of
from megatron_star.engine.request import StarRequest
from megatron_star.parallel.control import broadcast_json
from megatron_star.planning.cost_model import encoding_operations
from megatron_star.planning.plan import ContextPlan


class Encoded(NamedTuple):
    """One context of a chain, on one rank.

    Attributes:
        held: bytes of KV after each wave.
        sent: bytes that this rank sent as an owner, and contributed to all-gathers.
    """

    plan: ContextPlan
    held: list[int]
    sent: int


def encode_chain(
    args: dict[str, Any], token_ids: list[int], edges: list[int], star: StarConfig
) -> list[Encoded]:
    """Contexts that end at these edges, each extending the one before."""
    star_model, _ = random_star_model(args, 1)
    counts, contexts, found = star_model.exchange.counts, [None], []
    for plan in planner_of(star_model).chain(edges, star):
        counts.clear()
        contexts.append(EncodedContext(plan, star_model.exchange.cp_rank, contexts[-1]))
        held = []
        for wave in plan.waves:
            encode_wave(star_model, token_ids[: plan.num_tokens], wave, contexts[-1])
            held.append(contexts[-1].num_bytes)
        found.append(Encoded(plan, held, counts["broadcast_bytes"] + counts["pass_bytes"]))
    return found


def counted_work(
    args: dict[str, Any], token_ids: list[int], star: StarConfig
) -> tuple[CountedWork, float, float]:
    """What this rank computes for a context; and of the whole plan, what the cost model says it is.

    Returns:
        The first; then operations of products with weights, and of attention.
    """
    star_model, _ = random_star_model(args, 1)
    planner = planner_of(star_model)
    plan = planner.plan(len(token_ids), star).plan
    counted = count_work(star_model, token_ids, plan)
    return counted, *encoding_operations(plan, star_model.model.config)


class Memory(NamedTuple):
    """KV on one rank after a command: of each context and of each sequence's tail, in bytes."""

    contexts: dict[int, int]
    tails: dict[int, int]


class Reserved(NamedTuple):
    """What the engine has taken after a command, in bytes: contexts on each rank, tails with their rank."""

    contexts: dict[int, list[int]]
    tails: dict[int, tuple[int, int]]
    used: list[int]


def engine_memory(
    args: dict[str, Any], requests: list[StarRequest]
) -> tuple[list[Memory], list[Reserved], list[dict[str, int]]]:
    """What a rank holds, and on the driver what is reserved, after each command until all is answered.

    The last are the bytes by kind of layer that the results report.
    """
    star_model, groups = random_star_model(args, 1)
    if dist.get_rank():
        return _worker_memory(RankExecutor(star_model), groups.control), [], []
    limits = {"max_sequence_length": 4096, "budget_bytes_per_rank": 1 << 30}
    engine = StarEngine(star_model, NumbersAsText(), groups.control, **limits)
    answers = [engine.submit(request) for request in requests]
    held, reserved = [], []
    while not all(answer.ended.is_set() for answer in answers):
        engine.step()
        held.append(_memory(engine.executor))
        contexts = {context.id: context.bytes_per_rank for context in engine.scheduler.contexts.values()}
        tails = {answer.id: (answer.tail_rank, answer.tail_bytes) for answer in answers}
        reserved.append(Reserved(contexts, tails, list(engine.scheduler.used)))
    engine.stop()
    return held, reserved, [answer.result().kv_bytes_by_kind for answer in answers]


def _worker_memory(executor: RankExecutor, control: dist.ProcessGroup) -> list[Memory]:
    held = []
    while not (command := Command.from_json(broadcast_json(None, control))).stop:
        executor.execute(command)
        held.append(_memory(executor))
    return held


def _memory(executor: RankExecutor) -> Memory:
    return Memory(
        {number: context.num_bytes for number, context in executor.contexts.items()},
        {number: sequence.tail.num_bytes for number, sequence in executor.sequences.items()},
    )


def question(
    context: list[int], query: list[int], star: StarConfig, num_answer: int, turns: tuple[int, ...] = ()
) -> StarRequest:
    """A greedy request."""
    sampling = SamplingParams(num_tokens_to_generate=num_answer, top_k=1)
    return StarRequest(
        context_tokens=context, query_tokens=query, star=star, sampling=sampling, turn_edges=turns
    )
