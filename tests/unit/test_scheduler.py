"""The driver's bookkeeping, without ranks: sharing, memory, order, and what is freed."""

import pytest

from megatron_star.config import StarConfig
from megatron_star.engine.scheduled_request import ScheduledRequest
from megatron_star.engine.scheduler import Scheduler
from megatron_star.planning.kv_memory import KvLayers
from megatron_star.planning.plan import TokenCosts
from megatron_star.planning.planner import Planner

STAR = StarConfig(block_size=100)
BYTES = 10  # of KV per token


def scheduler(budget_tokens: int, cp_size: int = 2, max_running: int = 8) -> Scheduler:
    """One with memory for so many tokens a rank."""
    return Scheduler(
        Planner(TokenCosts(), cp_size),
        kv_layers=KvLayers((None,), BYTES),
        budget_bytes_per_rank=budget_tokens * BYTES,
        max_running=max_running,
    )


def request(
    request_id: int, tokens: list[int], turn_edges: tuple[int, ...] = (), star: StarConfig = STAR
) -> ScheduledRequest:
    """One whose tail takes memory for 256 tokens."""
    planned = Planner(TokenCosts(), 2).plan(len(tokens), star, turn_edges)
    return ScheduledRequest(request_id, tokens, [1, 2], 7, planned)


def run_until_fed(queue: Scheduler) -> list:
    """Commands until every running request has been fed its query."""
    commands = []
    while any(running.pending for running in queue.running.values()):
        commands.append(queue.next_command())
    return commands


def test_two_requests_with_one_context_encode_it_once():
    queue = scheduler(10_000)
    for i in range(2):
        queue.add(request(i, list(range(400))))
    assert [r.num_cached_tokens for r in queue.admit()] == [0, 400]
    commands = run_until_fed(queue)
    assert sum(command.open_context is not None for command in commands) == 1
    assert [i for command in commands for i, *_ in command.feed] == [0, 1]


def test_the_wave_size_does_not_keep_a_context_from_being_shared():
    queue = scheduler(10_000)
    queue.add(request(0, list(range(400))))
    queue.add(request(1, list(range(400)), star=StarConfig(block_size=100, wave_tokens=7)))
    assert [r.num_cached_tokens for r in queue.admit()] == [0, 400]


def test_another_mask_is_another_context():
    queue = scheduler(10_000)
    queue.add(request(0, list(range(400))))
    queue.add(request(1, list(range(400)), star=StarConfig(block_size=100, neighbor_blocks=1)))
    assert [r.num_cached_tokens for r in queue.admit()] == [0, 0]


def test_what_does_not_fit_waits_in_its_order_and_later_ones_do_not_overtake():
    queue = scheduler(600)
    requests = [request(0, list(range(600))), request(1, list(range(1, 601))), request(2, [])]
    for waiting in requests:
        queue.add(waiting)
    assert queue.admit() == [requests[0]]
    run_until_fed(queue)
    queue.remove(requests[0])
    assert queue.admit() == [requests[1], requests[2]]


def test_the_least_recently_used_context_goes_first():
    queue = scheduler(650)
    first, second, third = (request(i, list(range(i, 200 + i))) for i in range(3))
    for one in (first, second):
        queue.add(one)
        queue.admit()
        run_until_fed(queue)
        queue.remove(one)
    again = request(3, list(range(200)))
    queue.add(again)
    queue.admit()
    run_until_fed(queue)
    assert again.num_cached_tokens == 200
    queue.remove(again)
    large = request(4, list(range(500, 1000)))
    queue.add(large)
    assert queue.admit() == [large]
    assert list(queue.contexts) == [first.key, large.key]


@pytest.mark.parametrize("star", [STAR, StarConfig(mode="exact")])
def test_a_context_that_extends_a_cached_one_encodes_only_what_is_new(star):
    queue = scheduler(10_000)
    earlier, later = request(0, list(range(300)), star=star), request(1, list(range(450)), (300,), star)
    queue.add(earlier)
    queue.admit()
    run_until_fed(queue)
    queue.add(later)
    queue.admit()
    assert later.num_cached_tokens == 300
    (opened,) = [c.open_context for c in run_until_fed(queue) if c.open_context]
    assert opened.parent == (earlier.context.id, 300) and opened.token_ids == list(range(300, 450))
    num_bytes = [c.bytes_per_rank for c in queue.contexts.values()]
    assert num_bytes == [[(150 + 18) * BYTES] * 2, [(75 + 9) * BYTES] * 2]  # an eighth is spare


def test_the_base_of_an_extension_stays_while_the_extension_is_cached():
    queue = scheduler(710)
    for later in (request(0, list(range(300))), request(2, list(range(450)), (300,))):
        queue.add(later)
        queue.admit()
        run_until_fed(queue)
        queue.remove(later)
    base, extension = queue.contexts.values()
    assert (base.users, extension.users) == (1, 0)
    large = request(1, list(range(500, 1300)))
    queue.add(large)
    assert queue.admit() == [large]
    assert list(queue.contexts) == [large.key]


@pytest.mark.parametrize("when", ["waiting", "admitted", "encoding", "running"])
def test_everything_is_freed_whenever_a_request_ends(when):
    queue = scheduler(10_000)
    star = StarConfig(block_size=100, wave_tokens=100)
    earlier, one = request(1, list(range(300)), (), star), request(0, list(range(450)), (300,), star)
    for each in (earlier, one):
        queue.add(each)
    if when != "waiting":
        queue.admit()
    if when == "encoding":
        queue.next_command()
    if when == "running":
        run_until_fed(queue)
    for each in (earlier, one):
        queue.remove(each)
    queue.drop_unused_contexts()
    assert queue.used == [0, 0] and not queue.contexts
    dropped = queue.next_command()
    assert dropped.encode_wave is None and dropped.open_context is None
    assert queue.idle
    assert len(dropped.drop_contexts) == {"running": 2, "encoding": 1}.get(when, 0)


def test_no_more_run_at_once_than_allowed():
    queue = scheduler(10_000, max_running=3)
    for i in range(5):
        queue.add(request(i, []))
    assert len(queue.admit()) == 3 and len(queue.waiting) == 2


def test_what_never_fits_is_refused_with_what_it_needs_and_what_there_is():
    with pytest.raises(ValueError, match=r"2000 context tokens.*need 13,810 bytes.*budget is 5,000 bytes"):
        scheduler(500).check_fits(request(0, list(range(2000))))
