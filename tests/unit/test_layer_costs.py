"""What layers with a mask of their own cost, token by token: operations, memory, bytes that cross ranks."""

import random
from types import SimpleNamespace

import pytest

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import encoding_bytes, kv_layers, token_costs
from megatron_star.planning.kv_memory import KvLayers, recent_tail_capacity, recent_tokens, spare_capacity
from megatron_star.planning.layer_mask import Chunk, LayerMask, Window
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
        star = StarConfig(
            mode=rng.choice(["star", "star", "exact"]),
            block_size=rng.choice([3, 10, 40]),
            anchor_size=rng.choice([None, 0, 4]),
            neighbor_blocks=rng.choice([0, 1]),
            anchor=rng.choice(["broadcast", "recompute"]),
            wave_tokens=rng.choice([4, 11, 1000]),
        )
        edges = sorted(rng.sample(range(1, 110), rng.choice([1, 2, 3])))
        chains.append(ContextPlan.chain(edges, rng.choice([1, 2, 3, 5]), star, TokenCosts(100.0, 1.0)))
    return chains


CHAINS = random_chains(25)


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
    layers = KvLayers((Window(9), None, Window(9), Chunk(12)), bytes_per_token=10)
    for plan in (plan for chain in CHAINS for plan in chain):
        ends = [wave[-1].end for wave in plan.waves]
        for rank, owned in enumerate(plan.owned_tokens):
            windows, chunks = (
                [recent_tokens(plan, m, e)[rank] for e in ends] for m in (Window(9), Chunk(12))
            )
            recent = max(2 * w + c for w, c in zip(windows, chunks, strict=True))
            assert layers.of_context(plan)[rank] == 10 * (owned + spare_capacity(owned) + recent)
            assert layers.of_context(plan, spare=False)[rank] == 10 * (owned + recent)


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
        assert both - full <= 2 * (full if num_tokens < mask.size else 10 * (mask.size + 510))


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
