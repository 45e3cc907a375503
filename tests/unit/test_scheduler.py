"""The driver's bookkeeping, without ranks: sharing, memory, order, and what is freed."""

import pytest

from megatron_star.config import StarConfig
from megatron_star.engine.cached_context import token_digests
from megatron_star.engine.owner import Owner
from megatron_star.engine.scheduled_request import ScheduledRequest
from megatron_star.engine.scheduler import Scheduler
from megatron_star.planning.kv_memory import KvLayers
from megatron_star.planning.plan import TokenCosts
from megatron_star.planning.planner import MOST_LINKS, Planner

STAR, NOBODY = StarConfig(block_size=100), Owner()
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
    request_id: int,
    tokens: list[int],
    turn_edges: tuple[int, ...] = (),
    star: StarConfig = STAR,
    owner: Owner = NOBODY,
) -> ScheduledRequest:
    """One whose tail takes memory for 256 tokens."""
    planned = Planner(TokenCosts(), 2).plan(len(tokens), star, turn_edges)
    return ScheduledRequest(request_id, tokens, [1, 2], 7, planned, owner=owner)


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


EXACT = StarConfig(mode="exact")


def encoded_one(queue: Scheduler, one: ScheduledRequest) -> ScheduledRequest:
    """A request that is admitted, fed and over."""
    queue.add(one)
    assert queue.admit() == [one]
    run_until_fed(queue)
    queue.remove(one)
    return one


@pytest.mark.parametrize(
    ("common", "first", "second", "expected"),
    [
        (700, 1000, 1000, 700),
        (100, 100, 900, 0),
        (250, 1000, 500, 250),
        (249, 1000, 500, 0),
        (500, 600, 500, 500),
    ],
    ids=[
        "what is equal",
        "too little is saved",
        "a quarter is used",
        "less than a quarter is used",
        "all of it",
    ],
)
def test_a_prefix_is_used_where_it_saves_much_and_little_is_kept_for_it(common, first, second, expected):
    queue = scheduler(10_000)
    texts = [[*range(common), *range(5000 + 1000 * i, 7000 + 1000 * i)] for i in (0, 3)]
    encoded_one(queue, request(0, texts[0][:first], star=EXACT))
    later = encoded_one(queue, request(1, texts[1][:second], star=EXACT))
    assert later.num_cached_tokens == expected


@pytest.mark.parametrize(("common", "expected"), [(250, 250), (249, 0)])
def test_of_a_context_that_is_not_encoded_yet_half_must_be_wanted(common, expected):
    queue = scheduler(10_000)
    for i in range(2):
        queue.add(
            request(i, [*range(common), *range(1000 * (i + 1), 1000 * (i + 1) + 500 - common)], star=EXACT)
        )
    first, second = queue.admit()
    assert second.num_cached_tokens == expected
    queue.remove(first)
    opened = [c.open_context for c in run_until_fed(queue) if c.open_context]
    assert [len(one.token_ids) for one in opened] == [500, 500 - expected][not expected :]


def test_other_rotation_or_another_token_ends_what_is_shared():
    queue = scheduler(10_000)
    encoded_one(queue, request(0, list(range(600)), star=EXACT))
    planned = Planner(TokenCosts(), 2).plan(600, EXACT)
    long = ScheduledRequest(1, [*range(599), 0], [1, 2], 7, planned, is_long=True)
    assert encoded_one(queue, long).num_cached_tokens == 0
    for changed in (300, 511, 512, 513):
        tokens = [*range(changed), 9999, *range(changed + 1, 600)]
        assert encoded_one(queue, request(2 + changed, tokens, star=EXACT)).num_cached_tokens == changed


OWNERS = (
    Owner(),
    Owner(tenant="anna"),
    Owner(tenant="karl"),
    Owner(tenant="anna", cache_salt="x"),
    Owner(cache_salt="x"),
    Owner(tenant="annax"),
)


@pytest.mark.parametrize(("common", "turn_edges"), [(600, ()), (600, (300,)), (200, ()), (590, ())])
def test_contexts_of_other_tenants_and_salts_are_neither_used_nor_seen(common, turn_edges):
    queue, num_tokens = scheduler(100_000), 600 if common > 256 else 240
    for i, owner in enumerate(OWNERS):
        for again in (0, 1):
            tokens = [*range(common), *range(9000 + again, 9000 + again + num_tokens - common)]
            one = encoded_one(queue, request(2 * i + again, tokens, turn_edges, EXACT, owner))
            assert (one.num_cached_tokens >= common) == bool(again)
            assert one.num_cached_tokens * (1 - again) == 0
    digests = {token_digests(list(range(600)), owner.salt) for owner in OWNERS}
    assert len(digests) == len(OWNERS)


def test_the_default_key_has_what_was_encoded_without_keys():
    queue = scheduler(10_000)
    encoded_one(queue, request(0, list(range(600)), star=EXACT))
    again = request(1, list(range(600)), star=EXACT, owner=Owner(tenant="default"))
    assert encoded_one(queue, again).num_cached_tokens == 600


def test_a_history_that_grows_has_few_links_and_is_seldom_encoded_again():
    queue, num_encoded = scheduler(100_000), 0
    for turn in range(60):
        history = request(turn, list(range(10_000 + 100 * turn)), star=EXACT)
        encoded_one(queue, history)
        num_encoded += history.plan.num_tokens - history.num_cached_tokens
        last = queue.contexts[history.key]
        assert last.num_links <= MOST_LINKS
        assert last.plan.start == history.num_cached_tokens
    assert num_encoded < 10_000 + 60 * 100 * 5


def test_what_a_prefix_of_is_in_use_stays_and_goes_after_what_is_on_it():
    queue = scheduler(900)
    base = encoded_one(queue, request(0, list(range(800)), star=EXACT))
    on_it = request(1, [*range(700), *range(2000, 2100)], star=EXACT)
    queue.add(on_it)
    assert queue.admit() == [on_it] and on_it.num_cached_tokens == 700
    large = request(2, list(range(5000, 5900)), star=EXACT)
    queue.add(large)
    assert not queue.admit() and list(queue.contexts) == [base.key, on_it.key]
    run_until_fed(queue)
    queue.remove(on_it)
    assert queue.admit() == [large] and list(queue.contexts) == [large.key]
    ids = next(command.drop_contexts for command in run_until_fed(queue) if command.drop_contexts)
    assert len(ids) == 2


def test_what_was_deleted_goes_as_soon_as_nobody_uses_it_with_all_that_extends_it():
    queue = scheduler(10_000)
    base = encoded_one(queue, request(0, list(range(800)), star=EXACT))
    encoded_one(queue, request(1, [*range(800), *range(2000, 2200)], star=EXACT))
    other = encoded_one(queue, request(2, list(range(5000, 5400)), star=EXACT))
    again = request(3, list(range(800)), star=EXACT)
    queue.add(again)
    queue.admit()
    queue.forget(base.key)
    assert list(queue.contexts) == [base.key, other.key]
    run_until_fed(queue)
    queue.remove(again)
    assert list(queue.contexts) == [other.key]
    assert queue.used == queue.contexts[other.key].bytes_per_rank
    queue.forget(base.key)
    assert list(queue.contexts) == [other.key]


def test_what_begins_to_extend_a_deleted_context_goes_with_it():
    queue = scheduler(10_000)
    first = request(0, list(range(800)), star=EXACT)
    queue.add(first)
    queue.admit()
    run_until_fed(queue)
    queue.forget(first.key)
    later = request(1, list(range(1000)), star=EXACT)
    queue.add(later)
    assert queue.admit() == [later] and later.num_cached_tokens == 800
    queue.remove(first)
    run_until_fed(queue)
    queue.remove(later)
    assert not queue.contexts and not any(queue.used)
