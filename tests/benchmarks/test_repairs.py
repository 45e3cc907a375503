"""Each candidate's attention is a dense masked softmax, and depends on nothing that it must not see.

The slow twin goes through candidates in words of its own: one row, one head, one key at a time.
"""

import math
import sys
from dataclasses import replace

import pytest
import torch
from random_models import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.repair_attention import Heads, ask, encode
from benchmarks.repair_candidates import Candidate
from benchmarks.repair_costs import costs, crossing_tokens
from benchmarks.repair_defaults import DEFAULT
from benchmarks.repair_model import RepairedModel, with_named_layers
from benchmarks.repair_selection import Block, named_keys
from megatron_star.attention.distinct_keys import most_distinct
from megatron_star.attention.torch_cpu import TORCH_CPU
from megatron_star.planning.cost_model import token_costs
from megatron_star.planning.deployment import ModelSize

NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, SCALE = 97, 6, 2, 16, 0.4
CANDIDATES = [
    "star blocks=5",
    "star blocks=5 neighbors=1",
    "star blocks=5 anchor=0",
    "star blocks=7 spacing=log",
    "star blocks=5 anchor=4 last_block=exact",
    "star blocks=5 anchor=6 passed=7",
    "star blocks=5 passed=30",
    "star blocks=7 anchor=6 passed=8 halving=1",
    "star blocks=7 anchor=6 passed=8 halving=2 neighbors=1",
    "star blocks=7 anchor=6 passed=8 halving=2 halving_each=block",
    "star blocks=7 anchor=3 passed=8 most=11",
    "star blocks=5 anchor=6 passed=7 select=scores rows=5 pooling=1",
    "star blocks=5 anchor=6 passed=7 select=norm",
    "star blocks=5 anchor=6 passed=7 select=last halving=1",
    "star blocks=5 anchor=6 passed=5 select=stride",
    "star blocks=5 delta=4",
]


def random_heads(seed: int = 0) -> Heads:
    """Of keys with a mean, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(NUM_TOKENS, 1, heads, HEAD_SIZE, generator=generator)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    return Heads(query, key + 0.5, value, SCALE, TORCH_CPU.loaded(None))


def slow_scores(candidate: Candidate, heads: Heads, start: int, end: int, kv_head: int) -> list[float]:
    """How much each key of a block is worth passing."""
    keys = heads.key[start:end, 0, kv_head]
    match candidate.select:
        case "keydiff":
            unit = [k / k.norm() for k in keys]
            mean = sum(unit) / len(unit)
            return [-float(k @ mean / mean.norm()) for k in unit]
        case "norm":
            return [-float(k.norm()) for k in keys]
        case "last":
            return [float(position) for position in range(start, end)]
        case "scores":
            found = [0.0] * len(keys)
            group = NUM_HEADS // NUM_KV_HEADS
            for row in range(max(start, end - candidate.rows), end):
                for head in range(kv_head * group, (kv_head + 1) * group):
                    seen = heads.key[start : row + 1, 0, kv_head]
                    weights = (seen @ heads.query[row, 0, head] * SCALE).softmax(0).tolist()
                    found = [a + b for a, b in zip(found, weights + [0.0] * len(found), strict=False)]
            return found


def slow_named(candidate: Candidate, heads: Heads, edges: list[int], block: int, kv_head: int):
    """Positions and scores, the best first."""
    start, end = edges[block], edges[block + 1]
    first = (
        min(candidate.anchor if candidate.anchor is not None else edges[1], edges[1]) if block == 0 else start
    )
    if candidate.select == "stride":
        num = min(candidate.passed, end - first)
        return [(first + round(i * (end - 1 - first) / (num - 1)), 0.0) for i in range(num)]
    scores = slow_scores(candidate, heads, start, end, kv_head)
    order = sorted(range(first, end), key=lambda position: -scores[position - start])
    return [(position, scores[position - start]) for position in order[: candidate.passed]]


def slow_seen(candidate: Candidate, heads: Heads, position: int, kv_head: int) -> set[int]:
    """What a token sees in one KV head, itself included."""
    num = heads.key.size(0)
    edges = [num * i // candidate.blocks for i in range(candidate.blocks + 1)]
    block = max(i for i in range(candidate.blocks) if edges[i] <= position)
    anchor = edges[1] if candidate.anchor is None else candidate.anchor
    seen = set(range(edges[block], position + 1)) | set(range(min(anchor, edges[1], position + 1)))
    offered = []
    for earlier in range(block):
        distance = block - earlier
        whole = distance <= candidate.neighbors
        whole |= candidate.spacing == "log" and distance in (1, 2, 4, 8)
        whole |= candidate.last_block == "exact" and block == candidate.blocks - 1
        if whole:
            seen |= set(range(edges[earlier], edges[earlier + 1]))
        elif candidate.passed:
            share, reach = candidate.passed, candidate.halving
            while candidate.halving and distance - candidate.neighbors > reach:
                share, reach = share // 2, reach + (2 if candidate.halving_each == "block" else reach)
            offered += slow_named(candidate, heads, edges, earlier, kv_head)[:share]
    best = sorted(offered, key=lambda key: -key[1])[: candidate.most or None]
    return seen | {key for key, _ in best}


def slow_mask(candidate: Candidate, heads: Heads) -> Tensor:
    """[ng, n, n], true where a token sees another."""
    num = heads.key.size(0)
    mask = torch.zeros(NUM_KV_HEADS, num, num, dtype=torch.bool)
    for kv_head in range(NUM_KV_HEADS):
        for position in range(num):
            mask[kv_head, position, list(slow_seen(candidate, heads, position, kv_head))] = True
    return mask


def masked_softmax(heads: Heads, mask: Tensor) -> Tensor:
    """[sq, 1, np, hn], of a mask [ng, sq, sk] of truths or of what is added."""
    group = heads.query.size(2) // heads.key.size(2)
    query = heads.query[:, 0].transpose(0, 1)
    key, value = (t[:, 0].repeat_interleave(group, 1).transpose(0, 1) for t in (heads.key, heads.value))
    added = mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    logits = query @ key.mT * heads.softmax_scale + added.repeat_interleave(query.size(0) // len(added), 0)
    return (logits.softmax(-1) @ value).transpose(0, 1)[:, None]


def slow_encoding(candidate: Candidate, heads: Heads) -> Tensor:
    out = masked_softmax(heads, slow_mask(candidate, heads))
    if candidate.delta:
        dense = masked_softmax(heads, torch.ones(1, NUM_TOKENS, NUM_TOKENS).tril().bool())
        sparse = out.clone()
        for row in range(NUM_TOKENS):
            last = row - row % candidate.delta
            out[row] += dense[last] - sparse[last]
    return out


@pytest.mark.parametrize("text", CANDIDATES)
def test_a_layer_is_a_dense_softmax_with_the_candidates_mask(text):
    candidate, heads = Candidate.parse(text), random_heads()
    torch.testing.assert_close(encode(candidate, heads), slow_encoding(candidate, heads), atol=2e-5, rtol=0)


@pytest.mark.parametrize("text", CANDIDATES)
def test_a_token_depends_on_none_that_comes_after_it(text):
    candidate, heads, cut = Candidate.parse(text), random_heads(), 58
    others = random_heads(seed=1)
    changed = replace(
        heads,
        **{
            name: torch.cat([getattr(heads, name)[:cut], getattr(others, name)[cut:]])
            for name in ("query", "key", "value")
        },
    )
    before, after = encode(candidate, heads), encode(candidate, changed)
    torch.testing.assert_close(after[:cut], before[:cut], atol=1e-6, rtol=0)
    assert not torch.allclose(after[cut:], before[cut:])


@pytest.mark.parametrize("text", CANDIDATES)
def test_a_kv_head_depends_on_no_other(text):
    candidate, heads, others = Candidate.parse(text), random_heads(), random_heads(seed=1)
    group = NUM_HEADS // NUM_KV_HEADS
    query = torch.cat([heads.query[:, :, :group], others.query[:, :, group:]], 2)
    key, value = (
        torch.cat([mine[:, :, :1], other[:, :, 1:]], 2)
        for mine, other in ((heads.key, others.key), (heads.value, others.value))
    )
    before = encode(candidate, heads)
    after = encode(candidate, replace(heads, query=query, key=key, value=value))
    torch.testing.assert_close(after[:, :, :group], before[:, :, :group], atol=1e-6, rtol=0)
    assert not torch.allclose(after[:, :, group:], before[:, :, group:])


def test_the_most_distinct_keys_are_those_that_the_product_passes():
    heads, start, end = random_heads(), 20, 60
    block = Block(start, heads.query[start:end, 0], heads.key[start:end, 0], 6, SCALE)
    named = named_keys(Candidate(blocks=2, passed=9), block)
    assert torch.equal(named.positions.T - start, most_distinct(heads.key[start:end], 9, first=6))


@pytest.mark.parametrize(
    ("text", "seen"), [("asked_blocks=2", 2), ("asked_bias=-0.7", 4), ("asked_blocks=9", 4), ("", 4)]
)
def test_the_question_sees_the_best_blocks_and_scales_them(text, seen):
    candidate, heads, num_context = Candidate.parse(f"star blocks=5 {text}"), random_heads(), 90
    asked = replace(heads, query=heads.query[num_context:])
    rows, edges = NUM_TOKENS - num_context, [num_context * i // 5 for i in range(6)]
    added = torch.zeros(NUM_HEADS, rows, NUM_TOKENS)
    for head in range(NUM_HEADS):
        for row in range(rows):
            added[head, row, num_context + row + 1 :] = -math.inf
            added[head, row, edges[1] : num_context] = candidate.asked_bias
            logits = heads.key[:, 0, head // 3] @ asked.query[row, 0, head] * SCALE
            mass = {i: float(logits[edges[i] : edges[i + 1]].logsumexp(0)) for i in range(1, 5)}
            for block in sorted(mass, key=mass.get)[: 4 - seen]:
                added[head, row, edges[block] : edges[block + 1]] = -math.inf
    expected = masked_softmax(asked, added)
    torch.testing.assert_close(ask(candidate, asked, num_context), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("text", [text for text in CANDIDATES if "delta" not in text])
def test_pairs_and_bytes_are_those_of_the_mask(text):
    candidate, heads = Candidate.parse(text), random_heads()
    mask = slow_mask(candidate, heads)[0]
    assert sum(view.pairs for view in candidate.views(NUM_TOKENS)) == mask.sum()
    edges = candidate.edges(NUM_TOKENS)
    of_others = [mask[end:, start:end].any(0).sum() for start, end in zip(edges, edges[1:], strict=False)]
    if not candidate.most:
        assert crossing_tokens(candidate, NUM_TOKENS) == sum(of_others)


@pytest.fixture(scope="module")
def tiny(checkpoints) -> RepairedModel:
    """Three layers, the last of which does not attend; 9 and 3 heads."""
    return RepairedModel.load(checkpoints("llama").hf, torch.float32)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(257, (NUM_TOKENS + 8,), generator=torch.Generator().manual_seed(3)).tolist()


def unmodified(checkpoints, attention: str = "sdpa"):
    return AutoModelForCausalLM.from_pretrained(checkpoints("llama").hf, attn_implementation=attention).eval()


def test_exact_is_the_unmodified_model(tiny, checkpoints, tokens):
    query, answer = tokens[NUM_TOKENS:-3], tokens[-3:]
    with torch.inference_mode():
        logits = unmodified(checkpoints)(torch.tensor([tokens])).logits[0]
    encoded = tiny.encode(tokens[:NUM_TOKENS], Candidate())
    for _ in range(2):  # the cache is left as it was
        outcome = tiny.outcome(encoded, Candidate(), query, answer)
        expected = logits[-4:-1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        assert outcome.log_probability == pytest.approx(float(expected), abs=1e-4)
    likely = logits[-4:-1].argmax(-1).tolist()
    assert tiny.outcome(encoded, Candidate(), query, likely[:1]).right
    assert not outcome.right


@pytest.mark.parametrize(("layers", "blocks_in"), [("", (1, 2)), ("1", (2,)), ("2", (1,)), ("1+2", ())])
def test_layers_that_stay_exact_are_those_that_are_named(tiny, tokens, monkeypatch, layers, blocks_in):
    seen = []

    def noted(candidate: Candidate, heads: Heads) -> Tensor:
        seen.append(heads)
        return encode(candidate, heads)

    monkeypatch.setattr(sys.modules[RepairedModel.__module__], "encode", noted)
    candidate = Candidate(blocks=4, exact_layers=layers)
    encoded = tiny.encode(tokens[:NUM_TOKENS], candidate)
    keys = [encoded.cache.layers[layer - 1].keys for layer in blocks_in]
    assert len(seen) == len(blocks_in)
    for heads, key in zip(seen, keys, strict=True):
        torch.testing.assert_close(heads.key.permute(1, 2, 0, 3), key)
    exact = tiny.encode(tokens[:NUM_TOKENS], Candidate()).cache.layers[2].keys
    assert torch.allclose(encoded.cache.layers[2].keys, exact, atol=1e-5) == (not blocks_in)


def test_hidden_layers_are_those_whose_attention_star_hides_most(tiny, checkpoints, tokens):
    candidate, context = Candidate(blocks=4, exact_layers="hidden:1"), tokens[:NUM_TOKENS]
    with torch.inference_mode():
        weights = unmodified(checkpoints, "eager")(torch.tensor([context]), output_attentions=True).attentions
    hidden = ~slow_mask(Candidate(blocks=4), random_heads())[0]
    probes = [NUM_TOKENS * i // 64 - 1 for i in range(1, 65)]
    expected = [float((w[0, :, probes] * hidden[probes]).sum(-1).mean()) for w in weights]
    assert tiny.hidden_masses(context, candidate) == pytest.approx(expected, abs=1e-5)
    best = max((0, 1), key=lambda layer: expected[layer]) + 1
    assert with_named_layers(candidate, tiny, [context]).exact_layers == str(best)


def test_the_default_candidates_are_read_and_written_and_all_different():
    candidates = [Candidate.parse(text) for text in DEFAULT]
    assert len(set(candidates)) == len(candidates)
    assert [Candidate.parse(str(candidate)) for candidate in candidates] == candidates


@pytest.mark.parametrize(
    "text",
    ["", "star", "ring", "exact blocks=2", "star blocks=0", "star blocks=4 blocks=4", "star blocks=4 size=3"]
    + ["star blocks=4 passed=x", "star blocks=4 halving=1", "star blocks=4 passed=4 rows=3"]
    + [
        "star blocks=4 passed=4 halving_each=block",
        "star blocks=4 passed=4 pooling=2",
        "star blocks=4 passed=4 select=stride halving=1",
    ]
    + ["star blocks=4 exact_layers=0", "star blocks=4 exact_layers=1,2", "star blocks=4 select=best"],
)
def test_a_wrong_candidate_is_refused(text):
    with pytest.raises(ValueError, match="candidate"):
        Candidate.parse(text)


SHAPE = ModelSize(
    num_layers=3,
    hidden_size=10,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    gated_linear_unit=True,
    vocab_size=100,
    tied_embeddings=True,
)


def test_operations_are_those_of_the_cost_model_for_the_pairs_of_each_layer():
    """Of the last layer, only its keys and values are wanted."""
    half = costs(Candidate(blocks=4, exact_layers="2+3"), 97, SHAPE, bytes_per_value=2)
    star, exact = (costs(Candidate(blocks=blocks), 97, SHAPE, bytes_per_value=2) for blocks in (4, 1))
    assert exact.pairs == 1.0 and half.pairs == (1 + star.pairs) / 2
    assert exact.operations == token_costs(SHAPE).linear_per_token * 97 + 2 * 4 * 4 * 8 * 97 * 98 / 2
    assert half.operations == pytest.approx((exact.operations + star.operations) / 2)
    assert exact.crossing_bytes == 2 * 97 * 2 * 2 * 8 * 2 and star.crossing_bytes == 2 * 24 * 64
    assert half.crossing_bytes == 97 * 64 + 24 * 64


def test_scoring_keys_costs_half_a_pair_for_each_row_and_key_and_distinct_keys_nothing():
    plain, scored = (
        costs(Candidate(blocks=2, anchor=4, passed=5, select=select), 96, SHAPE, bytes_per_value=2)
        for select in ("keydiff", "scores")
    )
    assert plain.pairs == scored.pairs
    assert scored.operations - plain.operations == 2 * 4 * 4 * 8 * (32 * 48 / 2)


def test_a_model_with_windows_is_refused():
    model = RepairedModel(AutoModelForCausalLM.from_config(CONFIGS["mistral_window"]))
    with pytest.raises(ValueError, match="sliding_window"):
        model.encode([1, 2, 3, 4], Candidate(blocks=2))
