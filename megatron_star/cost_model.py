"""What a plan costs: floating-point operations and bytes, from the model's configuration.

Feeds the balance of a plan and the choice between star and exact. Knows no tensor and no process group.
"""

from dataclasses import replace
from typing import Protocol

from megatron_star.config import StarConfig
from megatron_star.plan import ContextPlan, TokenCosts


class ModelShape(Protocol):
    """The fields of Megatron's `TransformerConfig` that decide the cost."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated_linear_unit: bool


def token_costs(shape: ModelShape) -> TokenCosts:
    """Floating-point operations of encoding, of all TP ranks together: per token, and per visible pair.

    A multiplication by a weight counts 2 (one multiply, one add). The output layer is not run on a context.
    """
    query_size = shape.num_attention_heads * shape.kv_channels
    kv_size = shape.num_query_groups * shape.kv_channels
    attention = shape.hidden_size * (2 * query_size + 2 * kv_size)
    mlp = shape.hidden_size * shape.ffn_hidden_size * (3 if shape.gated_linear_unit else 2)
    return TokenCosts(
        linear_per_token=2.0 * shape.num_layers * (attention + mlp),
        attention_per_pair=4.0 * shape.num_layers * query_size,
    )


def kv_bytes_per_token(shape: ModelShape, *, tp_size: int, bytes_per_value: int) -> int:
    """Bytes of KV that a TP rank keeps of one token. Fewer KV heads than TP ranks are replicated."""
    groups = max(1, shape.num_query_groups // tp_size)
    return 2 * shape.num_layers * groups * shape.kv_channels * bytes_per_value


def choose_plan(
    num_tokens: int, cp_size: int, config: StarConfig, costs: TokenCosts
) -> tuple[str, ContextPlan]:
    """The mode that is used, `star` or `exact`, and its plan; `auto` is exact unless star costs less."""
    plans = {
        mode: ContextPlan.build(num_tokens, cp_size, replace(config, mode=mode), costs)
        for mode in (("exact", "star") if config.mode == "auto" else (config.mode,))
    }
    return min(plans.items(), key=lambda item: item[1].cost(costs))
