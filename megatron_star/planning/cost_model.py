"""What a plan costs: operations, bytes and, on given hardware, seconds, from the model's configuration.

Feeds the balance of a plan, the choice between star and exact, and `megatron-star plan`. Knows no tensor and
no process group.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from megatron_star.config import StarConfig
from megatron_star.planning.kv_memory import KvLayers
from megatron_star.planning.layer_mask import LayerMask, layer_masks
from megatron_star.planning.mask import possible_modes
from megatron_star.planning.model_shape import ModelShape, latent_attention
from megatron_star.planning.passing import wave_passing
from megatron_star.planning.plan import ContextPlan, TokenCosts
from megatron_star.planning.reads import wave_reads
from megatron_star.planning.segment import Source, Wave


def token_costs(shape: ModelShape) -> TokenCosts:
    """Floating-point operations of encoding, of all TP ranks together: per token, and per visible pair.

    A multiplication by a weight counts 2 (one multiply, one add). Of a mixture of experts, those that a token
    uses count: the router's choice and the shared ones. Of the last layer only keys and values are wanted, so
    nothing is run behind its product with the QKV weights, nor is the output layer.
    """
    whole_layers = shape.num_layers - 1
    masks = Counter(layer_masks(shape)[:-1])
    per_pair = 4.0 * shape.num_attention_heads * shape.kv_channels
    weights = whole_layers * weights_of_a_layer(shape, shape.moe_router_topk) + _qkv_weights(shape)
    return TokenCosts(
        linear_per_token=2.0 * weights,
        attention_per_pair=per_pair * masks[None],
        attention_of_masks=tuple((mask, per_pair * count) for mask, count in masks.items() if mask),
    )


def _qkv_weights(shape: ModelShape) -> int:
    return shape.hidden_size * shape.kv_channels * (shape.num_attention_heads + 2 * shape.num_query_groups)


def weights_of_a_layer(shape: ModelShape, num_experts: int) -> int:
    """Its weight matrices, with so many of its experts; where it has none, with its one MLP."""
    attention = _qkv_weights(shape) + shape.hidden_size * shape.num_attention_heads * shape.kv_channels
    ffn, router = ffn_size(shape, num_experts), shape.num_moe_experts or 0
    return attention + shape.hidden_size * (ffn * (3 if shape.gated_linear_unit else 2) + router)


def ffn_size(shape: ModelShape, num_experts: int) -> int:
    """The inner size of so many experts and the shared ones together, or of the one MLP."""
    if not shape.num_moe_experts:
        return shape.ffn_hidden_size
    return num_experts * shape.moe_ffn_hidden_size + (shape.moe_shared_expert_intermediate_size or 0)


def latent_form(rows: int, keys: int, shape: ModelShape) -> str:
    """How rows of a rank attend to a source of so many keys, for the fewest operations of latent attention.

    "expanded": the source is projected up once, to keys and values of each head, for all rows that read it.
    "absorbed": the up-projection is applied to the rows instead: to their queries, and to what they read.
    """
    latent = latent_attention(shape)
    assert latent, "the model has no latent attention"
    cost = {
        form: rows * keys * latent.per_pair(form) + 2.0 * projected * latent.up_projection
        for form, projected in (("expanded", keys), ("absorbed", rows))
    }
    return min(cost, key=cost.__getitem__)


def kv_layers(shape: ModelShape, *, tp_size: int, bytes_per_value: int) -> KvLayers:
    """The KV that a TP rank keeps. Fewer KV heads than TP ranks are replicated, and so is a latent, which
    stands for key and value of all heads.
    """
    if latent := latent_attention(shape):
        values = latent.stored_values
    else:
        values = 2 * max(1, shape.num_query_groups // tp_size) * shape.kv_channels
    return KvLayers(layer_masks(shape), values * bytes_per_value)


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
