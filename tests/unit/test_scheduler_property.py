"""Whoever else waits, runs or is cancelled: a request's context is encoded as it is alone, and each gets in.

The ranks are played here: they make plans of commands as `RankExecutor` does, and know for each token of a
context what it has seen.
"""

import random

import pytest
import torch

from megatron_star.config import StarConfig
from megatron_star.engine.command import Command
from megatron_star.engine.scheduled_request import ScheduledRequest
from megatron_star.engine.scheduler import Scheduler
from megatron_star.planning.kv_memory import KvLayers, spare_capacity
from megatron_star.planning.layer_mask import Chunk, LayerMask, Window
from megatron_star.planning.mask import Range
from megatron_star.planning.passing import Named, wave_passing
from megatron_star.planning.plan import ContextPlan, TokenCosts
from megatron_star.planning.planner import Planner

COSTS = TokenCosts(linear_per_token=500.0, attention_per_pair=1.0)
FULL = KvLayers((None,), 1)
LAYERS = (FULL, KvLayers((Window(25), None, Chunk(40), Window(1000)), 1))
TAIL_TOKENS = {FULL: 256, LAYERS[1]: 4 * 256}
"""For a query of one token and an answer of two."""


class PlayedContext:
    """One context on the ranks, with a row for each token that is encoded: what it has seen.

    Attributes:
        mask: [n, n] bool, of tokens that its plan knows.
        passed: [n, blocks], how many of the keys that each block names; where they are, only a model knows.
        named: of each block that has named keys by now, here or in a context that this one extends.
    """

    def __init__(self, tokens: list[int], star: StarConfig, cp_size: int, parent: "PlayedContext | None"):
        self.tokens, self.parent, self.num_waves = tokens, parent, 0
        base = parent.plan if parent else None
        self.plan = ContextPlan.build(len(tokens), cp_size, star, COSTS, base)
        self.mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        self.passed = torch.zeros(len(tokens), self.plan.num_blocks, dtype=torch.int64)
        self.named: dict[int, int] = {}
        if parent:
            assert parent.tokens == tokens[: len(parent.tokens)] and parent.encoded
            self.mask[: len(parent.tokens), : len(parent.tokens)] = parent.mask
            self.passed[: len(parent.tokens), : parent.plan.num_blocks] = parent.passed
            self.named |= parent.named

    @property
    def encoded(self) -> bool:
        return self.num_waves == len(self.plan.waves)

    def encode(self, wave: int) -> None:
        assert wave == self.num_waves
        self.named |= {named.block: named.num_keys for named in self._named_in(wave)}
        for segment in self.plan.waves[wave]:
            rows = slice(segment.start, segment.end)
            self.mask[rows, : segment.recomputed] = True
            self.mask[rows, rows] |= torch.ones(
                segment.num_tokens, segment.num_tokens, dtype=torch.bool
            ).tril()
            for source in segment.sources(self.plan.mask):
                assert not self.mask[rows, source.start : source.end].any(), "a key would count twice"
                self.mask[rows, source.start : source.end] = True
            for block, num_keys in self.plan.mask.passed(segment.start):
                assert 0 < num_keys <= self.named[block], "a key is seen before it is named"
                self.passed[rows, block] = num_keys
        self.num_waves += 1

    def _named_in(self, wave: int) -> tuple[Named, ...]:
        return wave_passing(self.plan, self.plan.waves[wave]).named

    def num_bytes(self, rank: int, layers: KvLayers) -> int:
        """What a rank holds by now of what this context's own plan encodes."""
        named = [named for wave in range(self.num_waves) for named in self._named_in(wave)]
        num_copies = sum(one.num_keys for one in named if one.owner == rank and self._is_spread(one.tokens))
        copies = num_copies * sum(mask is None for mask in layers.masks[:-1])
        return copies + sum(self._num_tokens(rank, mask) for mask in layers.masks)

    def _is_spread(self, tokens: Range) -> bool:
        """Whether several ranks have tokens of this block: then who names its keys keeps copies of them."""
        return (
            len({s.owner for s in self.plan.segments() if s.start < tokens.end and tokens.start < s.end}) > 1
        )

    def _num_tokens(self, rank: int, mask: LayerMask | None) -> int:
        if not mask:
            owned = self.plan.num_owned_tokens(rank)
            return owned + spare_capacity(owned)
        waves = self.plan.waves[: self.num_waves]
        segments = [segment for wave in waves for segment in wave if segment.owner == rank]
        first = mask.first_seen(waves[-1][-1].end) if waves else 0
        return sum(token >= first for segment in segments for token in range(*segment[:2]))


class PlayedRanks:
    """Apply commands; `seen` is the context of each sequence that was fed."""

    def __init__(self, cp_size: int, budget: int, layers: KvLayers = FULL) -> None:
        self.cp_size, self.budget, self.layers = cp_size, budget, layers
        self.contexts: dict[int, PlayedContext] = {}
        self.tails: dict[int, int] = {}
        self.seen: dict[int, PlayedContext] = {}

    def execute(self, command: Command) -> None:
        for sequence in command.drop_sequences:
            del self.tails[sequence]
        for context in command.drop_contexts:
            del self.contexts[context]
        if command.open_context:
            context, tokens, star, parent = command.open_context
            base = None if parent is None else self.contexts[parent]
            self.contexts[context] = PlayedContext(tokens, star, self.cp_size, base)
        if command.encode_wave:
            context, wave = command.encode_wave
            self.contexts[context].encode(wave)
        for sequence, context, tail_rank in command.open_sequences:
            assert self.contexts[context].encoded
            self.seen[sequence], self.tails[sequence] = self.contexts[context], tail_rank
        for rank in range(self.cp_size):
            tails = TAIL_TOKENS[self.layers] * list(self.tails.values()).count(rank)
            held = sum(context.num_bytes(rank, self.layers) for context in self.contexts.values())
            assert held + tails <= self.budget


def random_request(rng: random.Random, request_id: int, cp_size: int, text: list[int]) -> ScheduledRequest:
    """About the beginning of `text`, in any configuration, with any earlier turns."""
    length = rng.choice([0, 30, 60, 90, 120, 150])
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
    return request_of(request_id, text[:length], star, tuple(edges), cp_size)


def request_of(
    request_id: int, tokens: list[int], star: StarConfig, turn_edges: tuple[int, ...], cp_size: int
) -> ScheduledRequest:
    """One with a query of one token and an answer of two."""
    planned = Planner(COSTS, cp_size).plan(len(tokens), star, turn_edges)
    return ScheduledRequest(request_id, tokens, [1], 3, planned)


def seen_alone(request: ScheduledRequest, cp_size: int) -> PlayedContext:
    """A request's context if no other request was ever there."""
    ranks, queue = PlayedRanks(cp_size, 10**9), scheduler(cp_size, 10**9)
    turn_edges = tuple(plan.num_tokens for plan in request.planned.plans[:-1])
    alone = request_of(0, request.context_tokens, request.planned.star, turn_edges, cp_size)
    queue.add(alone)
    queue.admit()
    while alone.pending:
        ranks.execute(queue.next_command())
    return ranks.seen[0]


def assert_same(found: PlayedContext, expected: PlayedContext) -> None:
    """Each token saw the same."""
    assert torch.equal(found.mask, expected.mask) and torch.equal(found.passed, expected.passed)


def scheduler(cp_size: int, budget: int, layers: KvLayers = FULL) -> Scheduler:
    """One that counts KV in tokens of layers."""
    return Scheduler(Planner(COSTS, cp_size), kv_layers=layers, budget_bytes_per_rank=budget, max_running=3)


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
    texts = [[text] * 150 for text in range(2)]
    requests = [random_request(rng, i, cp_size, rng.choice(texts)) for i in range(10)]
    budget = needed(requests, cp_size, layers) + rng.choice([0, 0, 40, 1000])
    ranks = PlayedRanks(cp_size, budget, layers)

    run_with_cancels(rng, scheduler(cp_size, budget, layers), ranks, requests)

    for request in requests:
        if request.id in ranks.seen:
            assert_same(ranks.seen[request.id], seen_alone(request, cp_size))


def test_a_request_that_waited_with_another_ones_plan_encodes_its_own():
    star = StarConfig(block_size=100, wave_tokens=200)
    first = request_of(0, [0] * 400, star, (), 1)
    second = request_of(1, [0] * 400, StarConfig(block_size=100, wave_tokens=50), (), 1)
    second.num_tail_tokens = 301
    ranks, queue = PlayedRanks(1, 1000), scheduler(1, 1000)
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
        request_of(0, [0] * edge, first, (), cp_size),
        request_of(1, [0] * length, second, (edge,), cp_size),
    ]
    budget = needed(requests, cp_size)
    ranks, queue = PlayedRanks(cp_size, budget), scheduler(cp_size, budget)
    for request in requests:
        queue.add(request)
        assert queue.admit() == [request]
        while request.pending:
            ranks.execute(queue.next_command())
        queue.remove(request)
