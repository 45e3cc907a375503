"""Whoever else waits, runs or is cancelled: a request's context is encoded as it is alone, and each gets in.

The ranks are played (`played_ranks.py`).
"""

import random

import pytest
import torch
from played_ranks import FULL, PlayedContext, PlayedRanks

from megatron_star.config import StarConfig
from megatron_star.engine.scheduled_request import ScheduledRequest
from megatron_star.engine.scheduler import Scheduler
from megatron_star.planning.kv_memory import KvLayers
from megatron_star.planning.layer_mask import Chunk, Window
from megatron_star.planning.plan import TokenCosts
from megatron_star.planning.planner import MOST_LINKS, Planner

LAYERS = (FULL, KvLayers((Window(25), None, Chunk(40), Window(1000)), 1), KvLayers((None, Chunk(40)), 1))
TAIL_TOKENS = {layers: len(layers.masks) * 256 for layers in LAYERS}
"""For a query of one token and an answer of two."""


def planner(cp_size: int, layers: KvLayers = FULL) -> Planner:
    """One that knows of these layers."""
    return Planner(TokenCosts(500.0, 1.0, tuple((mask, 1.0) for mask in layers.num_layers if mask)), cp_size)


def random_texts(rng: random.Random) -> list[list[int]]:
    """Four, of which each goes its own way from some token on."""
    lengths = [rng.randrange(150) for _ in range(4)]
    return [[0] * length + [1 + i] * (150 - length) for i, length in enumerate(lengths)]


def random_request(
    rng: random.Random, request_id: int, cp_size: int, text: list[int], layers: KvLayers = FULL
) -> ScheduledRequest:
    """About the beginning of `text`, in any configuration, with any earlier turns."""
    length = rng.choice([0, 30, 60, 90, 120, 150, rng.randrange(150)])
    earlier = [edge for edge in (30, 60, 90, 120) if edge < length]
    edges = sorted(rng.sample(earlier, min(len(earlier), rng.randrange(3))))
    passed_keys = rng.choice([0, 0, 4, 16, 100])
    star = StarConfig(
        mode=rng.choice(["star", "star", "star", "exact"]),
        block_size=rng.choice([20, 30, 60]),
        anchor_size=rng.choice([None, None, 7, 45]),
        neighbor_blocks=rng.choice([0, 0, 0, 1]),
        passed_keys=passed_keys,
        anchor="broadcast" if passed_keys else rng.choice(["broadcast", "recompute"]),
        wave_tokens=rng.choice([5, 17, 40, 1000]),
    )
    return request_of(request_id, text[:length], star, tuple(edges), planner(cp_size, layers))


def request_of(
    request_id: int, tokens: list[int], star: StarConfig, turn_edges: tuple[int, ...], planner: Planner
) -> ScheduledRequest:
    """One with a query of one token and an answer of two."""
    planned = planner.plan(len(tokens), star, turn_edges)
    return ScheduledRequest(request_id, tokens, [1], 3, planned)


def seen_alone(request: ScheduledRequest, cp_size: int) -> PlayedContext:
    """A request's context if no other request was ever there, and it was encoded as one."""
    alone = PlayedContext(
        request.context_tokens, planner(cp_size).of_turns(request.planned.edges, request.planned.star)
    )
    for wave in range(len(alone.plan.waves)):
        alone.encode(wave)
    return alone


def assert_same(found: PlayedContext, expected: PlayedContext) -> None:
    """Each token saw the same."""
    assert torch.equal(found.mask, expected.mask) and torch.equal(found.passed, expected.passed)


def scheduler(cp_size: int, budget: int, layers: KvLayers = FULL) -> Scheduler:
    """One that counts KV in tokens of layers."""
    return Scheduler(planner(cp_size, layers), kv_layers=layers, budget_bytes_per_rank=budget, max_running=3)


def played(cp_size: int, budget: int, layers: KvLayers = FULL) -> PlayedRanks:
    """Ranks with as much memory as the scheduler knows of."""
    return PlayedRanks(planner(cp_size, layers), budget, layers, TAIL_TOKENS[layers])


def needed(requests: list[ScheduledRequest], cp_size: int, layers: KvLayers = FULL) -> int:
    """The least budget that every one of these requests is accepted with."""
    budget = 0
    for request in requests:
        while True:
            try:
                scheduler(cp_size, budget, layers).check_fits(request)
                break
            except ValueError:
                budget += 1
    return budget


def run_with_cancels(
    rng: random.Random, queue: Scheduler, ranks: PlayedRanks, requests: list[ScheduledRequest]
) -> None:
    """Every request comes at some time, and ends by being fed or cancelled at some time."""
    open_requests = list(requests)
    coming = list(requests)
    while open_requests:
        if coming and rng.random() < 0.5:
            queue.add(coming.pop(0))
        before = (list(queue.used), dict(queue.contexts), list(queue.waiting))
        if not queue.admit():
            assert before == (queue.used, queue.contexts, list(queue.waiting)), (
                "a failed admission left a trace"
            )
        assert queue.running or not queue.waiting, "what is accepted is never let in"
        ranks.execute(queue.next_command())
        for request in [request for request in open_requests if request not in coming]:
            if rng.random() < 0.05 or (
                request.id in ranks.seen and not request.pending and rng.random() < 0.4
            ):
                queue.remove(request)
                open_requests.remove(request)
    queue.drop_unused_contexts()
    ranks.execute(queue.next_command())
    assert not ranks.contexts and not ranks.tails and set(queue.used) == {0}


@pytest.mark.parametrize("seed", range(150))
def test_random_requests_see_what_each_sees_alone_and_leave_nothing(seed):
    rng = random.Random(seed)
    cp_size, layers = rng.choice([1, 2, 3]), rng.choice(LAYERS)
    texts = random_texts(rng)
    requests = [random_request(rng, i, cp_size, rng.choice(texts), layers) for i in range(10)]
    budget = needed(requests, cp_size, layers) + rng.choice([0, 0, 40, 1000])
    ranks = played(cp_size, budget, layers)

    run_with_cancels(rng, scheduler(cp_size, budget, layers), ranks, requests)

    for request in requests:
        if request.id in ranks.seen:
            assert_same(ranks.seen[request.id], seen_alone(request, cp_size))
    assert ranks.most_links <= MOST_LINKS


def test_a_request_that_waited_with_another_ones_plan_encodes_its_own():
    star = StarConfig(block_size=100, wave_tokens=200)
    first = request_of(0, [0] * 400, star, (), planner(1))
    second = request_of(1, [0] * 400, StarConfig(block_size=100, wave_tokens=50), (), planner(1))
    second.num_tail_tokens = 301
    ranks, queue = played(1, 1000), scheduler(1, 1000)
    for request in (first, second):
        queue.add(request)
    queue.admit()
    ranks.execute(queue.next_command())
    queue.remove(first)
    assert queue.admit() == [second]
    while second.pending:
        ranks.execute(queue.next_command())
    assert_same(ranks.seen[1], seen_alone(second, 1))


@pytest.mark.parametrize("seed", range(60))
def test_what_fits_alone_is_let_in_on_top_of_a_context_in_other_waves(seed):
    rng = random.Random(seed)
    cp_size = rng.choice([2, 3, 4])
    edge, length = rng.randrange(30, 100), rng.randrange(100, 250)
    waves = rng.sample([3, 8, 20, 50, 1000], 2)
    first, second = (StarConfig(mode="exact", block_size=30, wave_tokens=wave) for wave in waves)
    requests = [
        request_of(0, [0] * edge, first, (), planner(cp_size)),
        request_of(1, [0] * length, second, (edge,), planner(cp_size)),
    ]
    budget = needed(requests, cp_size)
    ranks, queue = played(cp_size, budget), scheduler(cp_size, budget)
    for request in requests:
        queue.add(request)
        assert queue.admit() == [request]
        while request.pending:
            ranks.execute(queue.next_command())
        queue.remove(request)
