"""What a plan costs: operations, bytes and, on given hardware, seconds, from the model's configuration.

Feeds the balance of a plan, the choice between star and exact, and `megatron-star plan`. Knows no tensor and
no process group.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from megatron_star.config import StarConfig
from megatron_star.planning.expert_layers import expert_layers
from megatron_star.planning.kv_memory import SCALE_BYTES, KvLayers
from megatron_star.planning.layer_mask import LayerMask, layer_masks
from megatron_star.planning.mask import possible_modes
from megatron_star.planning.model_shape import (
    ModelShape,
    attention_inputs,
    latent_attention,
    weights_but_experts,
    weights_of_an_expert,
)
from megatron_star.planning.passing import wave_passing
from megatron_star.planning.plan import ContextPlan, TokenCosts
from megatron_star.planning.reads import wave_reads
from megatron_star.planning.segment import Source, Wave


def token_costs(shape: ModelShape) -> TokenCosts:
    """Floating-point operations of encoding, of all TP ranks together: per token, and per visible pair.

    A multiplication by a weight counts 2 (one multiply, one add). Of a mixture of experts, those that a token
    uses count: the router's choice and the shared ones. Of the last layer only keys and values are wanted, so
    nothing is run behind its product with the QKV weights, nor is the output layer.

    Latent attention is counted expanded, each token's keys and values once: where another rank, or a later
    wave, makes them again, see `sources_up`.
    """
    masks = Counter(layer_masks(shape)[:-1])
    per_pair = _per_pair(shape)
    weights = attention_inputs(shape)
    for has_experts in expert_layers(shape)[:-1]:
        weights += weights_but_experts(shape, has_experts)
        weights += shape.moe_router_topk * weights_of_an_expert(shape) if has_experts else 0
    return TokenCosts(
        linear_per_token=2.0 * weights,
        attention_per_pair=per_pair * masks[None],
        attention_of_masks=tuple((mask, per_pair * count) for mask, count in masks.items() if mask),
    )


def _per_pair(shape: ModelShape) -> float:
    """Operations of a visible pair in one layer: a product with the key, and one with the value."""
    if latent := latent_attention(shape):
        return latent.per_pair("expanded")
    return 4.0 * shape.num_attention_heads * shape.kv_channels


def encoding_operations(plan: ContextPlan, shape: ModelShape) -> tuple[float, float]:
    """What all ranks compute for a plan: products with weights, and attention.

    Of latent attention in the form that each part of it really has.
    """
    costs, segments = token_costs(shape), list(plan.segments())
    of_pairs = costs._replace(linear_per_token=0.0)
    linear = costs.linear_per_token * sum(segment.num_rows for segment in segments)
    attention = sum(segment.cost(plan.mask, of_pairs) for segment in segments)
    ranks = ((wave, rank) for wave in plan.waves for rank in {segment.owner for segment in wave})
    if latent_attention(shape):
        extra = [_latent_extra(plan, wave, rank, shape) for wave, rank in ranks]
        linear += (shape.num_layers - 1) * sum(of_linear for of_linear, _ in extra)
        attention += (shape.num_layers - 1) * sum(of_pairs for _, of_pairs in extra)
    return linear, attention


def sources_up(plan: ContextPlan, wave: Wave, cp_rank: int, shape: ModelShape) -> float:
    """What a rank computes for a wave in one layer beyond `token_costs`, to attend to sources.

    Of latent attention alone: keys and values of a source are made of its latents, once on each rank that
    reads it, or else its rows are projected.
    """
    return sum(_latent_extra(plan, wave, cp_rank, shape)) if latent_attention(shape) else 0.0


def _latent_extra(plan: ContextPlan, wave: Wave, cp_rank: int, shape: ModelShape) -> tuple[float, float]:
    """Of one rank in one layer, what its forms of latent attention cost more than `token_costs` says: in
    products with the up-projection, and in pairs.
    """
    latent = latent_attention(shape)
    num_rows = sum(segment.num_rows for segment in wave if segment.owner == cp_rank)
    of_values = latent.num_attention_heads * latent.kv_lora_rank * latent.v_head_dim
    weights, pair_operations, absorbs = -num_rows * latent.up_projection, 0.0, False
    for rows, keys, pairs in _parts(plan, wave, cp_rank):
        form = latent_form(rows, keys, shape)
        pair_operations += pairs * (latent.per_pair(form) - latent.per_pair("expanded"))
        weights += keys * latent.up_projection if form == "expanded" else rows * of_values
        absorbs = absorbs or form == "absorbed"
    if absorbs:  # the queries of all rows are, once
        weights += num_rows * (latent.up_projection - of_values)
    return 2.0 * weights, pair_operations


def _parts(plan: ContextPlan, wave: Wave, cp_rank: int) -> Iterator[tuple[int, int, float]]:
    """What a rank attends to in a wave, part by part: rows, keys, and visible pairs."""
    for segment in wave:
        if segment.owner == cp_rank:
            rows, passed = segment.num_rows, plan.mask.num_passed(segment.start)
            yield rows, rows, rows * (rows + 1) / 2
            if passed:
                yield rows, passed, rows * passed
    for read in wave_reads(plan, wave, cp_rank):
        keys = read.source.end - read.source.start
        if rows := sum(end - start for start, end in read.rows):
            yield rows, keys, rows * keys


def latent_form(rows: int, keys: int, shape: ModelShape) -> str:
    """How rows of a rank attend to a source of so many keys, for the fewest operations of latent attention.

    "expanded": the source is projected up once, to keys and values of each head, for all rows that read it.
    "absorbed": the up-projection is applied to the rows instead: to their queries, and to what they read.
    """
    latent = latent_attention(shape)
    assert latent, "the model has no latent attention"
    forms = ("expanded", "absorbed")
    return min(forms, key=lambda form: latent.operations(rows, keys, form))


def kv_layers(shape: ModelShape, *, tp_size: int, bytes_per_value: int, kv_dtype: str = "auto") -> KvLayers:
    """The KV that a TP rank keeps. Fewer KV heads than TP ranks are replicated, and so is a latent, which
    stands for key and value of all heads.

    Args:
        kv_dtype: what contexts are kept in, of `KV_DTYPES`.

    Raises:
        ValueError: latents are only kept as they are computed.
    """
    if latent := latent_attention(shape):
        if kv_dtype != "auto":
            raise ValueError(
                f"kv-dtype is {kv_dtype!r}: it must be 'auto' for a model with multi-head latent attention, "
                "whose latents are kept as they are computed"
            )
        return KvLayers(layer_masks(shape), latent.stored_values * bytes_per_value)
    heads = 2 * max(1, shape.num_query_groups // tp_size)
    stored = 0 if kv_dtype == "auto" else heads * (shape.kv_channels + SCALE_BYTES)
    return KvLayers(layer_masks(shape), heads * shape.kv_channels * bytes_per_value, stored)


def encoding_bytes(plan: ContextPlan, kv: KvLayers) -> int:
    """KV that ranks hand to the exchanges of an encoding, of one TP rank of each CP rank: owners to the
    broadcasts, and in layers that pass keys all ranks to an all-gather.

    Of the last layer, whose KV is all that is wanted of it, nothing is sent.
    """
    counts = Counter(kv.masks[:-1])
    num_tokens = sum(count * crossing_tokens(plan, mask) for mask, count in counts.items())
    return (num_tokens + kv.num_passing * gathered_tokens(plan)) * kv.bytes_per_token


def gathered_tokens(plan: ContextPlan) -> int:
    """Named keys that all ranks together hand to the all-gathers of an encoding, in one layer."""
    if plan.cp_size == 1:
        return 0
    return plan.cp_size * sum(wave_passing(plan, wave).num_padded for wave in plan.waves)


def crossing_sources(plan: ContextPlan, wave: Wave, mask: LayerMask | None = None) -> list[Source]:
    """What crosses ranks for a wave, in one layer with this mask."""
    return [read.source for read in wave_reads(plan, wave, 0, mask) if read.crosses_ranks]


def crossing_tokens(plan: ContextPlan, mask: LayerMask | None = None) -> int:
    """Tokens whose KV crosses ranks, once for each wave that reads it, in one layer with this mask."""
    sources = (source for wave in plan.waves for source in crossing_sources(plan, wave, mask))
    return sum(source.end - source.start for source in sources)


def choose_plan(
    num_tokens: int, cp_size: int, config: StarConfig, costs: TokenCosts
) -> tuple[str, ContextPlan]:
    """The mode that is used, `star` or `exact`, and its plan; `auto` is exact unless star costs less."""
    plans = {
        mode: ContextPlan.build(num_tokens, cp_size, replace(config, mode=mode), costs)
        for mode in possible_modes(config)
    }
    return min(plans.items(), key=lambda item: item[1].cost(costs))


class PartTimes(NamedTuple):
    """One part of a model in a step of token generation: reading its whole weights, and its collectives."""

    read_s: float
    exchange_s: float


def parts_worth_slicing(times: Mapping[str, PartTimes], num_ranks: int) -> frozenset[str]:
    """Parts of which each rank should read its slice: those where that saves more than it costs."""
    return frozenset(part for part, t in times.items() if t.read_s * (1 - 1 / num_ranks) > t.exchange_s)
