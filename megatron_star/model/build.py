"""Build a Megatron GPT model that runs Star Attention."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_star.model.architecture import ModelParallelSizes, gpt_model_arguments, transformer_config
from megatron_star.model.layer_spec import layer_spec
from megatron_star.model.rotary import rotate_at_positions
from megatron_star.model.rotary_frequencies import ROTARY_TYPES, rotary_frequencies
from megatron_star.model.spec import with_star_attention


def build_gpt_model(
    args: Mapping[str, Any],
    groups: ProcessGroupCollection,
    *,
    dtype: torch.dtype,
    device: torch.device,
    transformer_impl: str = "local",
) -> GPTModel:
    """A GPT model with Star Attention; its weights are not initialised; `attach` runs it.

    Args:
        args: the model in Megatron's argument names (`architecture.py`).
        groups: the model's process groups; `cp` in it must be a group of one rank, since context
            parallelism stays off inside Megatron.

    Raises:
        ValueError: something in `args` that Star Attention does not support, or heads that do not divide.
    """
    sizes = ModelParallelSizes(groups.tp.size(), groups.ep.size(), groups.expt_tp.size())
    config = transformer_config(args, sizes, dtype=dtype, device=device)
    arguments = gpt_model_arguments(args)
    is_rotary = args["position_embedding_type"] in ROTARY_TYPES
    model = GPTModel(
        config=config,
        transformer_layer_spec=with_star_attention(layer_spec(config, transformer_impl, groups)),
        pg_collection=groups,
        **arguments | ({"position_embedding_type": "rope"} if is_rotary else {}),
    )
    if is_rotary:
        rotate_at_positions(model, rotary_frequencies(args))
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
