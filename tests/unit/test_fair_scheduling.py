"""Shares of tenants, short contexts beside long ones, priorities: nobody is starved, and nothing stands idle.

The ranks are played (`played_ranks.py`).
"""

import random
from collections import Counter
from itertools import count

import pytest
from played_ranks import PlayedRanks

from megatron_star.config import StarConfig
from megatron_star.engine.admission import RESERVED_PARTS
from megatron_star.engine.cached_context import CachedContext
from megatron_star.engine.fair_queue import FairShares, shares_of_queries
from megatron_star.engine.owner import Owner
from megatron_star.engine.scheduled_request import ScheduledRequest
from megatron_star.engine.scheduler import Scheduler
from megatron_star.planning.kv_memory import KvLayers
from megatron_star.planning.plan import TokenCosts
from megatron_star.planning.planner import Planner

WAVE_TOKENS, TAIL_BYTES = 128, 256
STAR = StarConfig(mode="exact", wave_tokens=WAVE_TOKENS)
ANNA, KARL, NOBODY = Owner(tenant="anna"), Owner(tenant="karl"), Owner()
PLANNER = Planner(TokenCosts(), 1)
_ids = count()


def scheduler(budget: int = 1_000_000, max_running: int = 64) -> Scheduler:
    """Of one rank, which counts KV in tokens."""
    return Scheduler(
        PLANNER, kv_layers=KvLayers((None,), 1), budget_bytes_per_rank=budget, max_running=max_running
    )


def request(num_context: int, owner: Owner = NOBODY, num_query: int = 4, num_tail: int = 8):
    """One about a context of its own."""
    number = next(_ids)
    planned = PLANNER.plan(num_context, STAR)
    return ScheduledRequest(number, [number] * num_context, [1] * num_query, num_tail, planned, owner=owner)


def added(queue: Scheduler, *requests: ScheduledRequest) -> list[ScheduledRequest]:
    """Those that are admitted when these have come."""
    for one in requests:
        queue.add(one)
    return queue.admit()


def next_waves(queue: Scheduler, num_commands: int) -> list[CachedContext]:
    """The contexts whose waves the next commands have."""
    waves = []
    for _ in range(num_commands):
        waves.append(queue.next_to_encode)
        queue.next_command()
    return waves


def test_a_short_context_passes_between_two_waves_of_a_long_one():
    queue = scheduler()
    long = request(5500)
    added(queue, long)
    next_waves(queue, 3)
    short = request(2 * WAVE_TOKENS)
    added(queue, short)
    waves = next_waves(queue, 4)
    assert sum(context is short.context for context in waves) == 2 and long.context in waves


def test_a_long_context_goes_on_while_short_ones_keep_coming():
    queue, long = scheduler(), request(5500)
    added(queue, long)
    num_waves = len(long.context.plan.waves)
    num_commands = 0
    while not long.context.encoded:
        while len(queue.running) < 4:
            added(queue, request(2 * WAVE_TOKENS))
        queue.next_command()
        for one in [one for one in queue.running.values() if not one.pending]:
            queue.remove(one)
        num_commands += 1
        assert num_commands <= 4 * num_waves + 4


def test_contexts_of_one_size_are_encoded_one_after_the_other():
    queue, requests = scheduler(), [request(5000) for _ in range(3)]
    added(queue, *requests)
    num_waves = len(requests[0].context.plan.waves)
    waves = next_waves(queue, 3 * num_waves)
    assert waves == [one.context for one in requests for _ in range(num_waves)]


def test_what_extends_a_context_waits_for_it_however_short_it_is():
    queue, long = scheduler(), request(5000)
    added(queue, long)
    tokens = [*long.context_tokens, *[0] * WAVE_TOKENS]
    longer = ScheduledRequest(next(_ids), tokens, [1], 2, PLANNER.plan(len(tokens), STAR))
    added(queue, longer)
    assert longer.num_cached_tokens == 5000
    ranks = PlayedRanks(PLANNER, 1_000_000)
    while longer.pending:
        ranks.execute(queue.next_command())


@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 3.0), (0.5, 1.0)])
def test_tenants_encode_in_proportion_to_their_shares_whatever_their_contexts_sizes(shares):
    queue = scheduler()
    anna, karl = (
        Owner(tenant=name, share=share) for name, share in zip(("anna", "karl"), shares, strict=True)
    )
    added(queue, request(60_000, anna), request(60_000, anna), *[request(768, karl) for _ in range(50)])
    num_tokens = Counter[str]()
    for context in next_waves(queue, 200):
        num_tokens[context.owner.tenant] += context.plan.num_tokens / len(context.plan.waves)
    assert num_tokens["karl"] / num_tokens["anna"] == pytest.approx(shares[1] / shares[0], rel=0.1)


def test_of_a_tenant_the_more_urgent_is_encoded_and_admitted_first():
    queue = scheduler(max_running=1)
    late, early = request(500, Owner(priority=1)), request(5000, Owner(priority=-1))
    usual = [request(500, Owner()) for _ in range(2)]
    order = []
    for one in (late, usual[0], early, usual[1]):
        queue.add(one)
    for _ in range(4):
        (one,) = queue.admit()
        order.append(one)
        queue.remove(one)
    assert order == [early, *usual, late]
    queue = scheduler()
    added(queue, late := request(500, Owner(priority=1)), early := request(5000, Owner()))
    assert set(next_waves(queue, len(early.context.plan.waves))) == {early.context}


def test_a_context_is_as_urgent_as_the_most_urgent_request_that_waits_for_it():
    queue = scheduler()
    first, other = request(5000, Owner(priority=5)), request(5000, Owner(priority=3))
    again = ScheduledRequest(next(_ids), first.context_tokens, [1], 2, first.planned, owner=Owner(priority=1))
    added(queue, first, other)
    assert queue.next_to_encode is other.context
    added(queue, again)
    assert again.context is first.context and queue.next_to_encode is first.context


def test_another_tenant_is_admitted_at_once_although_one_asks_for_all_places():
    queue = scheduler(max_running=16)
    added(queue, request(10, KARL))
    admitted = added(queue, *[request(10, ANNA) for _ in range(40)])
    assert len(admitted) == 16 - 16 // RESERVED_PARTS - 1
    others = [request(10, Owner(tenant="eve")), request(10, KARL)]
    assert added(queue, *others) == others[:1]


def test_another_tenant_is_admitted_at_once_although_one_asks_for_all_memory():
    queue = scheduler(budget=20_000)
    added(queue, request(10, KARL, num_tail=1))
    assert added(queue, *[request(500, ANNA) for _ in range(40)])
    eve = request(500, Owner(tenant="eve"))
    assert added(queue, eve) == [eve]


def test_without_tenants_all_places_and_all_memory_are_for_whoever_comes():
    assert len(added(scheduler(max_running=16), *[request(10) for _ in range(40)])) == 16
    queue = scheduler(budget=10_000)
    assert len(added(queue, *[request(4000, ANNA) for _ in range(3)])) == 2


def admitted_work(queue: Scheduler, rounds: int, lasting: int = 1) -> Counter[str]:
    """Tokens of what is admitted, by tenant, if each request runs for so many rounds."""
    work, ends = Counter[str](), []
    for now in range(rounds):
        for one in queue.admit():
            work[one.owner.tenant] += len(one.context_tokens) + one.num_tail_tokens
            one.num_fed = one.num_tail_tokens
            ends.append((now + lasting, one))
        for end, one in list(ends):
            if end <= now + 1:
                ends.remove((end, one))
                queue.remove(one)
    return work


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_places_go_to_tenants_by_tokens_of_work_and_not_by_requests(share):
    queue = scheduler(max_running=1)
    for _ in range(40):
        queue.add(request(5000, ANNA))
    for _ in range(1000):
        queue.add(request(100, Owner(tenant="karl", share=share)))
    work = admitted_work(queue, 800)
    assert work["karl"] / work["anna"] == pytest.approx(share, rel=0.25)


def test_a_tenant_pays_for_what_it_generated_and_not_for_what_it_might_have():
    queue = scheduler(max_running=1)
    for _ in range(50):
        queue.add(request(0, ANNA, num_tail=10_000))
        queue.add(request(0, KARL, num_tail=100))
    order = []
    for _ in range(40):
        (one,) = queue.admit()
        order.append(one.owner.tenant)
        one.num_fed = 100
        queue.remove(one)
    assert Counter(order) == pytest.approx({"anna": 20, "karl": 20}, abs=2)


def test_a_tenant_that_comes_anew_has_saved_nothing_up():
    queue = scheduler(max_running=1)
    for _ in range(100):
        queue.add(request(1000, ANNA))
    admitted_work(queue, 50)
    for _ in range(100):
        queue.add(request(1000, KARL))
    work = admitted_work(queue, 20)
    assert abs(work["anna"] - work["karl"]) <= 2 * 1008


def test_a_request_that_does_not_fit_is_passed_by_no_more_work_than_its_own():
    queue = scheduler(budget=6000, max_running=8)
    large = request(5000, ANNA)
    running = added(queue, *[request(1000, KARL) for _ in range(3)])
    queue.add(large)
    passed_by = 0
    while not large.context:
        queue.add(request(1000, KARL))
        for one in queue.admit():
            running.append(one)
            passed_by += len(one.context_tokens) * (one is not large)
        if running:
            queue.remove(running.pop(0))
        assert passed_by <= 2 * 5000


def test_what_one_tenant_encodes_does_not_push_out_what_another_has():
    queue = scheduler(budget=10_000)
    kept = request(2000, KARL)
    for one in (kept, *[request(1500, ANNA) for _ in range(30)]):
        added(queue, one)
        while one.pending:
            queue.next_command()
        queue.remove(one)
    assert kept.key in queue.contexts


def test_queries_share_a_step_evenly_and_short_ones_leave_some_to_others():
    queries = [request(0, num_query=size) for size in (500, 10, 300)]
    assert list(shares_of_queries(queries, 250).values()) == [10, 120, 120]
    assert list(shares_of_queries(queries, 10_000).values()) == [10, 300, 500]
    assert sum(shares_of_queries([request(0, num_query=9) for _ in range(40)], 16).values()) == 16


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 5)])
def test_flows_that_always_want_something_get_work_by_their_weights(weights):
    rng, shares, got = random.Random(0), FairShares[int](), Counter[int]()
    for _ in range(5000):
        flow, *_ = shares.in_order(range(3))
        work = rng.choice([1, 10, 100])
        shares.charge(flow, work / weights[flow], range(3))
        got[flow] += work
    parts = [got[flow] / weights[flow] for flow in range(3)]
    assert max(parts) - min(parts) <= 100


@pytest.mark.parametrize("seed", range(40))
def test_random_arrivals_all_end_within_memory_and_nothing_stands_idle(seed):
    rng = random.Random(seed)
    owners = [
        Owner(tenant=name, share=rng.choice([0.5, 1, 4]), priority=rng.randrange(-1, 2))
        for name in rng.sample(["", "anna", "karl", "eve"], rng.randrange(1, 5))
    ]
    sizes = [0, 100, 700, 3000]
    coming = [request(rng.choice(sizes), rng.choice(owners)) for _ in range(60)]
    budget = 3000 + 3000 // 8 + 2 * TAIL_BYTES + rng.choice([0, 1000, 5000])
    queue, ranks = scheduler(budget, rng.choice([1, 3, 16])), PlayedRanks(PLANNER, budget)
    unended = set(coming)
    for _ in range(20_000):
        while coming and rng.random() < 0.3:
            queue.check_fits(coming[-1])
            queue.add(coming.pop())
        queue.admit()
        assert queue.running or not queue.waiting, "something waits, and nothing runs"
        could_encode = any(not one.context.encoded for one in queue.running.values())
        command = queue.next_command()
        assert bool(command.encode_wave or command.open_context) == could_encode
        ranks.execute(command)
        for one in list(queue.running.values()):
            if not one.pending and rng.random() < 0.2:
                queue.remove(one)
                unended.discard(one)
        if not unended:
            break
    assert not unended
