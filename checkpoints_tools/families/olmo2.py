"""OLMo 2: norms on the outputs of attention and MLP only, and of query and key over all heads."""

from typing import Any

from checkpoints_tools.families.arguments import biases_by_keys, decoder_arguments
from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.model.checked_values import CheckedValues


def olmo_arguments(values: CheckedValues) -> dict[str, Any]:
    """Also of OLMo 3, whose windows and rotary embeddings are elsewhere."""
    return {
        **decoder_arguments(values),
        **biases_by_keys(values),
        "norm_placement": "after",
        "qk_layernorm": True,
        "qk_layernorm_span": "all_heads",
    }


OLMO_LAYER = (
    *norms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"),
    *attention(),
    *gated_mlp(),
)
OLMO2 = Family("olmo2", arguments=olmo_arguments, neutral=neutral_but("attention_bias"), layer=OLMO_LAYER)
