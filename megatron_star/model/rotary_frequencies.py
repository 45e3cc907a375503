"""Frequencies of a rotary embedding: by what angle each pair of a head's values turns with each position.

Made on the CPU and in float32, in the order of operations that transformers has: at position 100,000 another
rounding of a frequency is another angle, by up to 0.005.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch import Tensor

from megatron_star.model.transformer_config import OWN_FIELDS

ROTARY_TYPES = ("rope", "yarn", "longrope")
"""Values of `position_embedding_type`."""


def rotary_size(args: Mapping[str, Any]) -> int:
    """Of a head's values, how many are rotated; of an odd number, one more."""
    if args.get("multi_latent_attention"):
        return args["qk_pos_emb_head_dim"]
    return int(args["kv_channels"] * args.get("rotary_percent", 1.0))


def rotary_frequencies(args: Mapping[str, Any]) -> Tensor:
    """Of the model that `args` describe (`architecture.py`), of its layers without a window.

    Returns:
        [r], float32; of longrope [2, r], with the short factors and with the long ones.
    """
    if args["position_embedding_type"] == "longrope":
        factors = torch.tensor([args["longrope_short_factors"], args["longrope_long_factors"]])
        size = rotary_size(args)
        return 1 / (factors * args["rotary_base"] ** (torch.arange(0, size, 2).float() / size))
    if args["position_embedding_type"] == "yarn":
        return _yarn_frequencies(args)
    plain = plain_frequencies(rotary_size(args), args.get("rotary_base", 10000))
    if args.get("use_rope_scaling"):
        return _llama3_frequencies(plain, args)
    return plain / (args.get("rotary_seq_len_interpolation_factor") or 1.0)


def plain_frequencies(size: int, base: float) -> Tensor:
    """base ** (-2 * i / size) of the pair i."""
    return RotaryEmbedding(size, 1.0, rotary_base=base, use_cpu_initialization=True).inv_freq


def _llama3_frequencies(plain: Tensor, args: Mapping[str, Any]) -> Tensor:
    low, high, original = (
        OWN_FIELDS[name].default if args.get(name) is None else args[name]
        for name in ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_position_embeddings")
    )
    return RotaryEmbedding._apply_scaling(None, plain, args["rope_scaling_factor"], low, high, original)


def _yarn_frequencies(args: Mapping[str, Any]) -> Tensor:
    yarn = YarnRotaryEmbedding(
        rotary_size(args),
        rotary_base=args["rotary_base"],
        scaling_factor=args["rotary_scaling_factor"],
        original_max_position_embeddings=args["yarn_original_max_position_embeddings"],
        beta_fast=args["yarn_beta_fast"],
        beta_slow=args["yarn_beta_slow"],
        correction_range_round_to_int=args["yarn_correction_range_round_to_int"],
        use_cpu_initialization=True,
    )
    angles, _ = yarn.get_emb(1, offset=1)
    return angles.flatten()[: angles.numel() // 2]
