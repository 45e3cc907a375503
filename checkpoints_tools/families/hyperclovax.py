"""HyperCLOVA X SEED: Granite with norms after attention and MLP too, and logits that are multiplied."""

from typing import Any

from checkpoints_tools.families.family import Family, neutral_but
from checkpoints_tools.families.granite import granite_arguments
from checkpoints_tools.families.weights import attention, gated_mlp, norms
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    return granite_arguments(values) | {
        "logits_multiplier": float(values.number("logits_scaling")),
        "norm_placement": "both" if values.boolean("use_post_norm") else "before",
    }


HYPERCLOVAX = Family(
    "hyperclovax",
    arguments=_arguments,
    neutral=neutral_but("attention_bias", "mlp_bias"),
    layer=(*norms(after_attention="post_norm1", after_mlp="post_norm2"), *attention(), *gated_mlp()),
)
