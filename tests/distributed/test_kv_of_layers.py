"""KV of layers with a mask of their own: what ranks hold and send is what the planner and the engine say."""

from collections import Counter

import pytest
from distributed import run_ranks
from kv_ranks import counted_work, encode_chain, engine_memory, question
from models import random_tokens
from small_model import SMALL

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import encoding_bytes
from megatron_star.planning.kv_memory import KvLayers, recent_tokens, spare_capacity
from megatron_star.planning.layer_mask import Chunk, Window
from megatron_star.planning.mask import Range
from megatron_star.planning.plan import ContextPlan

BYTES = 2 * 8 * 4
"""Of KV of a token in a layer: one KV head of 8, float32."""
WINDOW, CHUNK = 13, 10
KINDS = SMALL | {
    "num_layers": 5,
    "window_size": [WINDOW - 1, 0],
    "window_attn_skip_freq": [1, 0, 0, 1, 1],
    "attention_chunk_size": CHUNK,
    "chunked_layers": [0, 0, 1, 0, 0],
}
LAYERS = KvLayers((Window(WINDOW), None, Chunk(CHUNK), Window(WINDOW), Window(WINDOW)), BYTES)
TOKENS = random_tokens(120)

CHAINS = {
    "shorter than the window": ([7], StarConfig(block_size=4)),
    "star": ([60], StarConfig(block_size=9)),
    "several waves, a small anchor": ([97], StarConfig(block_size=20, anchor_size=5, wave_tokens=11)),
    "a recomputed anchor": ([61], StarConfig(block_size=31, anchor="recompute")),
    "neighbors, turns of fewer tokens than the window": (
        [30, 36, 61, 62],
        StarConfig(block_size=9, neighbor_blocks=1),
    ),
    "passed keys": ([60], StarConfig(block_size=9, anchor_size=4, passed_keys=3)),
    "passed keys of neighbors, waves and turns": (
        [7, 30, 36, 97],
        StarConfig(block_size=9, anchor_size=5, neighbor_blocks=1, passed_keys=4, wave_tokens=11),
    ),
    "all keys passed, spread blocks": ([97], StarConfig(block_size=33, passed_keys=50, wave_tokens=12)),
    "exact, turns in waves": ([39, 97], StarConfig(mode="exact", wave_tokens=17)),
}


@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("name", CHAINS)
def test_ranks_hold_and_send_the_bytes_that_are_planned(name, cp_size):
    """After each wave what later tokens see, and never more than is reserved."""
    edges, star = CHAINS[name]
    results = run_ranks(cp_size, encode_chain, KINDS, TOKENS, edges, star)
    for of_ranks in zip(*results, strict=True):
        plan = of_ranks[0].plan
        assert all(encoded.plan.waves == plan.waves for encoded in of_ranks)
        assert sum(encoded.sent for encoded in of_ranks) == encoding_bytes(plan, LAYERS)
        assert [encoded.held[-1] for encoded in of_ranks] == held_after(plan, plan.num_tokens)
        assert [max(encoded.held) for encoded in of_ranks] == LAYERS.of_context(plan)
        for index, wave in enumerate(plan.waves):
            assert [encoded.held[index] for encoded in of_ranks] == held_after(plan, wave[-1].end)


def held_after(plan: ContextPlan, end: int) -> list[int]:
    """Bytes on each rank once the tokens before `end` are encoded; a full layer's buffer comes at once."""
    begun = {segment.owner for segment in plan.segments() if segment.start < end}
    full = [n + spare_capacity(n) if rank in begun else 0 for rank, n in enumerate(plan.owned_tokens)]
    recent = [recent_tokens(plan, mask, end) for mask in LAYERS.masks if mask]
    named = named_by_rank(plan, end)
    return [
        BYTES * (full[rank] + named[rank] + sum(held[rank] for held in recent))
        for rank in range(plan.cp_size)
    ]


def named_by_rank(plan: ContextPlan, end: int) -> Counter[int]:
    """Of the one full layer: copies of what blocks name that end by there and are spread over ranks, on the
    ranks with their last tokens.
    """
    edges, named = plan.mask.block_edges, Counter()
    for block, last in enumerate(edges[1:]):
        if plan.start < last <= end:
            owners = [source.owner for source in plan.owners_of(Range(edges[block], last))]
            named[owners[-1]] += plan.mask.num_named(block) if len(set(owners)) > 1 else 0
    return named


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize(
    "star",
    [
        StarConfig(block_size=9, neighbor_blocks=1),
        StarConfig(block_size=31, anchor="recompute"),
        StarConfig(block_size=9, anchor_size=5, passed_keys=4),
        StarConfig(block_size=30, anchor_size=0, passed_keys=7, neighbor_blocks=1, wave_tokens=10),
        StarConfig(mode="exact", wave_tokens=17),
    ],
    ids=["neighbors", "recompute", "passed keys", "passed keys, spread blocks, neighbors", "exact"],
)
def test_ranks_compute_the_operations_that_are_planned(star, cp_size):
    """All pairs that are visible in each kind of layer, and no others."""
    results = run_ranks(cp_size, counted_work, KINDS, TOKENS, star)
    _, linear, attention = results[0]
    assert sum(counted.linear for counted, *_ in results) == linear
    assert sum(counted.attention for counted, *_ in results) == attention


@pytest.mark.parametrize("cp_size", [1, 3])
def test_the_engine_reserves_what_the_ranks_come_to_hold(cp_size):
    """Contexts exactly, whoever shares and extends them; tails, at most what is reserved on their rank."""
    star = StarConfig(block_size=9, wave_tokens=11)
    turns = (30, 36)
    requests = [
        question(TOKENS[:61], TOKENS[:5], star, 20, turns),
        question(TOKENS[:36], TOKENS[:40], star, 3),
        question(TOKENS[:62], TOKENS * 3, star, 10, (61,)),
        question(TOKENS[:61], [1], star, 3, turns),
        question(TOKENS[5:9], TOKENS[:2], star, 20),
        question([], TOKENS[:20], star, 20),
    ]
    results = run_ranks(cp_size, engine_memory, KINDS, requests)
    _, reserved, reported = results[0]
    steps = [[of_rank[0][i] for of_rank in results] for i in range(len(reserved))]
    most_held: dict[int, list[int]] = {}
    for memory, (contexts, tails, _) in zip(steps, reserved, strict=True):
        for number, bytes_per_rank in contexts.items():
            held = [of_rank.contexts.get(number, 0) for of_rank in memory]
            assert all(one <= most for one, most in zip(held, bytes_per_rank, strict=True))
            most_held[number] = [max(p) for p in zip(held, most_held.get(number, held), strict=True)]
        for rank, of_rank in enumerate(memory):
            for number, held in of_rank.tails.items():
                tail_rank, tail_bytes = tails[number]
                assert held <= (tail_bytes if rank == tail_rank else 0)
    assert most_held == reserved[-1].contexts and len(most_held) == 8
    assert reserved[-1].used == [sum(of_rank) for of_rank in zip(*most_held.values(), strict=True)]
    in_chain = sum(of_rank.contexts[number] for of_rank in steps[-1] for number in (0, 1, 2))
    assert sum(reported[0].values()) == in_chain + reserved[-1].tails[0][1]
    # Of 30, 36 and 61 tokens, and of the tail a chunk of 256.
    assert reported[0]["window 13"] == 3 * BYTES * (12 + 6 + 12 + 256)
    assert reported[0]["chunk 10"] == BYTES * (0 + 6 + 1 + 256)


@pytest.mark.parametrize("cp_size", [1, 3])
def test_of_a_context_on_a_prefix_of_another_one_only_what_is_new_is_reserved_and_held(cp_size):
    """Also where it begins within a block, of which the ranks that name its keys do not store all."""
    star = StarConfig(block_size=9, anchor_size=4, passed_keys=3, wave_tokens=11)
    requests = [
        question(TOKENS[:61], TOKENS[:5], star, 12, (30,)),
        question(TOKENS[:41] + TOKENS[:30], TOKENS[:5], star, 12, (30,)),
        question(TOKENS[:41], TOKENS[:5], StarConfig(mode="exact"), 12),
        question(TOKENS[:26] + TOKENS[:24], TOKENS[:5], StarConfig(mode="exact"), 12),
        question(TOKENS[:26], TOKENS[:5], StarConfig(mode="exact"), 12),
    ]
    results = run_ranks(cp_size, engine_memory, SMALL | {"num_layers": 2}, requests)
    _, reserved, _ = results[0]
    contexts = reserved[-1].contexts
    assert contexts == {
        number: [of_rank[0][-1].contexts[number] for of_rank in results] for number in contexts
    }
    tokens = [sum(sizes) // (2 * BYTES) for sizes in contexts.values()]
    assert len(contexts) == 5 and tokens[1] < 60 and tokens[4] == 0
    assert reserved[-1].used == [sum(of_rank) for of_rank in zip(*contexts.values(), strict=True)]


@pytest.mark.parametrize("cp_size", [1, 2])
def test_a_model_of_gemma_3s_proportions_holds_at_most_three_tenths_of_the_kv_of_full_layers(cp_size):
    """Of six layers, five have windows; a window is to the context as 1,024 tokens are to 64K."""
    windows = {"window_size": [15, 0], "window_attn_skip_freq": [1, 1, 1, 1, 1, 0]}
    held = []
    for kinds in (windows, {}):
        model, star = SMALL | {"num_layers": 6} | kinds, StarConfig(block_size=128)
        results = run_ranks(cp_size, encode_chain, model, random_tokens(1024), [1024], star)
        held.append([of_rank[0].held[-1] for of_rank in results])
    assert max(held[0]) <= 0.3 * max(held[1])
    assert sum(held[0]) <= 0.2 * sum(held[1])
