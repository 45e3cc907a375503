"""MiniCPM3: latent attention that rotates halves; multipliers of embedding, residual sums and logits."""

import math
from typing import Any

from checkpoints_tools.families.family import Family
from checkpoints_tools.families.latent_attention import latent_attention, latent_attention_arguments
from checkpoints_tools.families.weights import DENSE_MLP
from megatron_star.model.checked_values import CheckedValues


def _arguments(values: CheckedValues) -> dict[str, Any]:
    arguments = latent_attention_arguments(values)
    return arguments | {
        "embedding_multiplier": float(values.number("scale_emb")),
        "round_embedding_multiplier": True,
        "residual_multiplier": values.number("scale_depth") / math.sqrt(arguments["num_layers"]),
        "logits_multiplier": values.integer("dim_model_base") / arguments["hidden_size"],
    }


MINICPM3 = Family(
    "minicpm3", arguments=_arguments, layer=(*latent_attention(rotates_halves=True), *DENSE_MLP)
)
