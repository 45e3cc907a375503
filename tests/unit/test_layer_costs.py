"""What layers with a mask of their own cost, token by token: operations, memory, bytes that cross ranks."""

import random
from types import SimpleNamespace

import pytest

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import crossing_tokens, encoding_bytes, kv_layers, token_costs
from megatron_star.planning.kv_memory import (
    MOST_PROPOSED_TOKENS,
    KvLayers,
    recent_tail_capacity,
    recent_tokens,
    spare_capacity,
)
from megatron_star.planning.layer_mask import Chunk, LayerMask, Window
from megatron_star.planning.mask import Range
from megatron_star.planning.plan import ContextPlan, TokenCosts
from megatron_star.planning.planner import Planner

MASKS = [Window(1), Window(2), Window(9), Window(30), Window(500), Chunk(1), Chunk(12), Chunk(500)]


def sees(mask: LayerMask, position: int, token: int) -> bool:
    """By definition."""
    if token > position:
        return False
    near = position - token < mask.size
    return near if isinstance(mask, Window) else token // mask.size == position // mask.size


def random_chains(count: int) -> list[tuple[ContextPlan, ...]]:
    """Of contexts that extend each other, by more and by fewer tokens than a window has."""
    rng = random.Random(0)
    chains = []
    for _ in range(count):
        passed_keys = rng.choice([0, 0, 1, 5, 50])
        star = StarConfig(
            mode=rng.choice(["star", "star", "exact"]),
            block_size=rng.choice([3, 10, 40]),
            anchor_size=rng.choice([None, 0, 4]),
            neighbor_blocks=rng.choice([0, 1]),
            passed_keys=passed_keys,
            anchor="broadcast" if passed_keys else rng.choice(["broadcast", "recompute"]),
            wave_tokens=rng.choice([4, 11, 1000]),
        )
        edges = sorted(rng.sample(range(1, 110), rng.choice([1, 2, 3])))
        chains.append(ContextPlan.chain(edges, rng.choice([1, 2, 3, 5]), star, TokenCosts(100.0, 1.0)))
    return chains


CHAINS = random_chains(30)


def num_passed(plan: ContextPlan, block: int, seeing: int) -> int:
    """Keys of `block` that the block `seeing` sees: half as many whenever the distance doubles."""
    mask = plan.mask
    distance = seeing - getattr(mask, "neighbor_blocks", 0) - block
    passed_keys = getattr(mask, "passed_keys", 0)
    if distance < 1 or not passed_keys:
        return 0
    while distance > 1:
        passed_keys, distance = passed_keys // 2, (distance + 1) // 2
    size = mask.block_edges[block + 1] - mask.block_edges[block]
    return min(size, passed_keys + (0 if block else mask.anchor_size))


def block_of(plan: ContextPlan, token: int) -> int:
    return max(block for block, start in enumerate(plan.mask.block_edges[:-1]) if start <= token)


def copies_after(plan: ContextPlan, end: int) -> list[int]:
    """Keys that each rank has named, of blocks whose last token it has and not all, once all before `end` is
    encoded.
    """
    copies = [0] * plan.cp_size
    for block, last in enumerate(plan.mask.block_edges[1:]):
        if plan.start < last <= end:
            owners = [source.owner for source in plan.owners_of(Range(plan.mask.block_edges[block], last))]
            if len(set(owners)) == 1:
                continue
            seeing = block + getattr(plan.mask, "neighbor_blocks", 0) + 1
            copies[owners[-1]] += num_passed(plan, block, seeing)
    return copies


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_segment_costs_the_pairs_that_are_visible_in_each_kind_of_layer(mask):
    for plan in (plan for chain in CHAINS for plan in chain):
        for segment in plan.segments():
            rows = [*range(segment.recomputed), *range(segment.start, segment.end)]
            pairs = sum(sees(mask, row, token) for row in rows for token in range(plan.num_tokens))
            plain = segment.cost(plan.mask, TokenCosts(3.0, 5.0))
            costs = TokenCosts(3.0, 5.0, ((mask, 7.0), (Window(1), 11.0)))
            assert segment.cost(plan.mask, costs) == plain + 7.0 * pairs + 11.0 * len(rows)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_rank_keeps_what_it_owns_and_later_tokens_can_see_and_no_more(mask):
    """After every wave. Of what an earlier context has, that one keeps it."""
    for plan in (plan for chain in CHAINS for plan in chain):
        held = []
        for wave in plan.waves:
            end = wave[-1].end
            owned = [(s.owner, token) for s in plan.segments() for token in range(s.start, s.end)]
            # A token that comes directly after sees as far back as any that comes later.
            kept = [rank for rank, token in owned if token < end and sees(mask, end, token)]
            held.append([kept.count(rank) for rank in range(plan.cp_size)])
            assert [recent_tokens(plan, mask, end)[rank] for rank in range(plan.cp_size)] == held[-1]


def test_a_context_takes_the_memory_of_the_wave_after_which_a_rank_holds_most():
    """In all layers together: not each of them after the same wave."""
    layers = KvLayers((Window(9), None, None, Window(9), Chunk(12)), bytes_per_token=10)
    for plan in (plan for chain in CHAINS for plan in chain):
        ends = [wave[-1].end for wave in plan.waves]
        for rank, owned in enumerate(plan.owned_tokens):
            windows, chunks = (
                [recent_tokens(plan, m, e)[rank] for e in ends] for m in (Window(9), Chunk(12))
            )
            copies = [2 * copies_after(plan, end)[rank] for end in ends]
            recent = max(2 * w + c + k for w, c, k in zip(windows, chunks, copies, strict=True))
            assert layers.of_context(plan)[rank] == 10 * (2 * (owned + spare_capacity(owned)) + recent)
            assert layers.of_context(plan, spare=False)[rank] == 10 * (2 * owned + recent)


def test_of_the_last_layer_no_keys_are_named_and_no_query_reads_named_keys():
    plan = ContextPlan.build(90, 2, StarConfig(block_size=30, anchor_size=3, passed_keys=4))
    full, more = (KvLayers(masks, 1) for masks in ((None,), (None, Window(9), None)))
    assert full.of_context(plan, spare=False) == list(plan.owned_tokens)
    copies = sum(more.of_context(plan, spare=False)) - 2 * 90 - 8
    assert copies == sum(copies_after(plan, 90)) > 0 and more.by_kind([plan], 0)["passed keys"] == copies
    assert sum(more.of_context(plan, spare=False, named=False)) == 2 * 90 + 8


def test_the_bytes_of_passed_keys_are_those_that_some_block_sees_padded_to_the_rank_that_sends_most():
    """Once for each wave, from the rank that has the block's last token; none in the last layer."""
    found = 0
    for plan in (plan for chain in CHAINS for plan in chain):
        num_gathered = 0
        for wave in plan.waves:
            seeing = {block_of(plan, segment.start) for segment in wave}
            of_rank = [0] * plan.cp_size
            for block, last in enumerate(plan.mask.block_edges[1:]):
                (source,) = plan.owners_of(Range(last - 1, last))
                of_rank[source.owner] += max(num_passed(plan, block, one) for one in seeing)
            num_gathered += plan.cp_size * max(of_rank) if plan.cp_size > 1 else 0
        found += num_gathered > 0
        broadcast, halo = crossing_tokens(plan), crossing_tokens(plan, Window(9))
        for masks, expected in (
            ((None, None), broadcast + num_gathered),
            ((None, Window(9), None, None), 2 * (broadcast + num_gathered) + halo),
            ((Window(9), None), halo),
        ):
            assert encoding_bytes(plan, KvLayers(masks, 10)) == 10 * expected
    assert found >= 10


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_tail_keeps_at_most_what_later_tokens_can_see_of_it(mask):
    for num_tokens in (1, 2, 9, 31, 300, 5000):
        most = max(
            sum(sees(mask, start + num_tokens, start + token) for token in range(num_tokens))
            for start in range(0, 1000, 7)
        )
        full = KvLayers((None,), 10).of_tail(num_tokens)
        both = KvLayers((mask, None, mask), 10).of_tail(num_tokens)
        assert most <= mask.most_kept(num_tokens)
        assert both - full == 2 * 10 * recent_tail_capacity(num_tokens, mask)
        assert both - full >= 2 * 10 * most
        assert both - full <= 2 * (
            full if num_tokens < mask.size else 10 * (mask.size + MOST_PROPOSED_TOKENS + 510)
        )


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_bytes_that_cross_ranks_are_those_that_another_rank_sees(mask):
    """Once for each wave, and none in the last layer, of which only the KV is wanted."""
    for plan in (plan for chain in CHAINS for plan in chain):
        owners = {token: source.owner for source in plan.stored for token in range(*source[:2])}
        crossing = sum(
            any(
                segment.owner != owner and any(sees(mask, row, token) for row in range(*segment[:2]))
                for segment in wave
                if segment.start > token
            )
            for wave in plan.waves
            for token, owner in owners.items()
        )
        of_full = encoding_bytes(plan, KvLayers((None, None), 10))
        assert encoding_bytes(plan, KvLayers((mask, None, mask, mask), 10)) == of_full + 2 * 10 * crossing
        assert encoding_bytes(plan, KvLayers((None, mask), 10)) == of_full


GEMMA_3 = {
    "1B": {"num_layers": 26, "hidden_size": 1152, "ffn_hidden_size": 6912, "window": 512},
    "4B": {"num_layers": 34, "hidden_size": 2560, "ffn_hidden_size": 10240, "window": 1024},
}


def gemma_3(name: str, *, windows: bool = True) -> SimpleNamespace:
    """Of six layers, five have windows, as https://huggingface.co/google/gemma-3-4b-it says."""
    values = dict(GEMMA_3[name])
    window, num_layers = values.pop("window"), values["num_layers"]
    masks = {
        "window_size": [window - 1, 0],
        "window_attn_skip_freq": [int(number % 6 != 0) for number in range(1, num_layers + 1)],
    }
    return SimpleNamespace(
        **values,
        **(masks if windows else {}),
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=256,
        gated_linear_unit=True,
        num_moe_experts=None,
        moe_router_topk=0,
        moe_ffn_hidden_size=None,
        moe_shared_expert_intermediate_size=None,
    )


def test_gemma_3_costs_the_operations_that_were_counted_by_hand():
    """4B: of the 33 layers whose attention is run, five are full; all heads together 8 x 256."""
    costs, full = token_costs(gemma_3("4B")), token_costs(gemma_3("4B", windows=False))
    assert costs.linear_per_token == full.linear_per_token
    assert full.attention_per_pair == 4 * 33 * 2048 and not full.attention_of_masks
    assert costs.attention_per_pair == 4 * 5 * 2048
    assert costs.attention_of_masks == ((Window(1024), 4 * 28 * 2048),)


@pytest.mark.parametrize("cp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", GEMMA_3)
def test_at_64k_gemma_3_takes_at_most_three_tenths_of_the_kv_of_full_layers(name, cp_size):
    """The fullest rank, with what it has for an answer of 256 tokens; of all ranks together, a fifth."""
    star = StarConfig(block_size=8 << 10)
    sizes = {}
    for windows in (True, False):
        shape = gemma_3(name, windows=windows)
        kv = kv_layers(shape, tp_size=1, bytes_per_value=2)
        plan = Planner(token_costs(shape), cp_size).plan(64 << 10, star).plan
        sizes[windows] = kv.of_context(plan), kv.of_tail(256)
    (context, tail), (full_context, full_tail) = sizes[True], sizes[False]
    assert max(context) + tail <= 0.3 * (max(full_context) + full_tail)
    assert sum(context) + tail <= 0.2 * (sum(full_context) + full_tail)


def test_a_query_token_sees_its_share_of_a_context_and_all_of_a_window():
    planner = Planner(TokenCosts(1000.0, 1.0, ((Window(9), 3.0), (Chunk(500), 5.0))), cp_size=4)
    assert planner.query_token_cost(100) == 1000 + 25 + 3 * 8 + 5 * 100
