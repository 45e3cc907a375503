"""Gemma 2: windows in every second layer, soft caps, norms before and after, weights of norms added to 1."""

from typing import Any

from checkpoints_tools.families.arguments import (
    activation_arguments,
    biases_by_keys,
    decoder_arguments,
    optional_numbers,
)
from checkpoints_tools.families.family import IN_SOME_LAYERS, Family, neutral_but
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.model.checked_values import CheckedValues

GEMMA_LAYER = (
    *attention(),
    *gated_mlp(),
    *norms(
        before_attention="input_layernorm",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
)
GEMMA_NEUTRAL = neutral_but("attention_bias", "hidden_act") | {"use_bidirectional_attention": (False, None)}


def gemma_arguments(values: CheckedValues) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    arguments = decoder_arguments(values)
    return arguments | {
        **activation_arguments(values, gated=True, key="hidden_activation"),
        **biases_by_keys(values),
        "apply_layernorm_1p": True,
        "norm_placement": "both",
        "softmax_scale": values.number("query_pre_attn_scalar") ** -0.5,
        "embedding_multiplier": arguments["hidden_size"] ** 0.5,
        "round_embedding_multiplier": True,
        **optional_numbers(values, logits_softcap="final_logit_softcapping"),
    }


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return gemma_arguments(values) | optional_numbers(values, attention_softcap="attn_logit_softcapping")


GEMMA2 = Family(
    "gemma2",
    arguments=_arguments,
    neutral=GEMMA_NEUTRAL,
    windows=IN_SOME_LAYERS,
    layer=GEMMA_LAYER,
)
