"""The rotary embedding of a resolved Hugging Face configuration in Megatron's argument names."""

import math
from typing import Any

from megatron_star.checked_input import shown
from megatron_star.model.checked_values import LARGEST_SIZE, CheckedValues

_SOURCE = "config.json: rope_parameters"
_LLAMA3_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_TYPES = ("default", "llama3", "yarn")


def rotary_arguments(values: CheckedValues) -> dict[str, Any]:
    """Megatron's arguments; `max_position_embeddings` among them.

    Args:
        values: of a configuration that transformers has resolved: `rope_parameters` has all that counts.

    Raises:
        ValueError: Megatron cannot rotate in the same way.
    """
    found = values.any("rope_parameters", None)
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise ValueError(f"{_SOURCE}={shown(found)}: one rotary embedding for all layers is supported")
    rope = CheckedValues(found, _SOURCE)
    rope_type = rope.any("rope_type")
    if rope_type not in _TYPES:
        raise ValueError(
            f"config.json: rope_type {shown(rope_type)} is not supported; {', '.join(_TYPES)} are"
        )
    if rope.any("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor={shown(rope.any('partial_rotary_factor'))} is not supported"
        )
    base = rope.number("rope_theta")
    arguments = {
        "position_embedding_type": "rope",
        "rotary_base": int(base) if base == int(base) else base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "max_position_embeddings": values.integer("max_position_embeddings"),
    }
    if rope_type == "llama3":
        return arguments | _llama3_arguments(rope)
    if rope_type == "yarn":
        return arguments | _yarn_arguments(rope, arguments["max_position_embeddings"])
    return arguments


def _llama3_arguments(rope: CheckedValues) -> dict[str, Any]:
    for key, constant in _LLAMA3_CONSTANTS.items():
        if rope.any(key, None) != constant:
            raise ValueError(
                f"config.json: {key}={shown(rope.any(key, None))}; Megatron's scaling has {constant} built in"
            )
    return {"use_rope_scaling": True, "rope_scaling_factor": rope.number("factor")}


def _yarn_arguments(rope: CheckedValues, max_position_embeddings: int) -> dict[str, Any]:
    rope.number("rope_theta", above=1.0)  # its logarithm divides
    original = rope.integer("original_max_position_embeddings")
    factor = max_position_embeddings / original  # transformers' default, where it is null
    if rope.any("factor") is not None:
        factor = rope.number("factor")
    if factor * original > LARGEST_SIZE:
        raise rope.wrong("factor", f"at most {LARGEST_SIZE:,} / {original:,}")
    mscale, mscale_all_dim = _yarn_mscales(rope, factor)
    return {
        "position_embedding_type": "yarn",
        "max_position_embeddings": max(max_position_embeddings, int(factor * original)),
        "rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": _number_or(rope, "beta_fast", 32.0),
        "yarn_beta_slow": _number_or(rope, "beta_slow", 1.0),
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        "yarn_correction_range_round_to_int": bool(rope.any("truncate", True)),
    }


def _number_or(rope: CheckedValues, key: str, default: float) -> float:
    """The default where transformers takes it: null and zero count as absent."""
    return rope.number(key) if rope.any(key, None) else default


def _yarn_mscales(rope: CheckedValues, factor: float) -> tuple[float | None, float | None]:
    """Megatron's two scales that give the attention factor that transformers uses; None for the default."""
    if rope.any("attention_factor", None) is not None:
        return _mscales_of_attention_factor(rope, factor)
    if rope.any("mscale", None) and rope.any("mscale_all_dim", None):
        return rope.number("mscale"), rope.number("mscale_all_dim")
    return None, None


def _mscales_of_attention_factor(rope: CheckedValues, factor: float) -> tuple[float | None, float | None]:
    """Megatron: (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1), or 1 if factor <= 1."""
    attention_factor = rope.number("attention_factor")
    if factor > 1:
        return (attention_factor - 1) / (0.1 * math.log(factor)), 0.0
    if attention_factor != 1:
        raise rope.wrong("attention_factor", f"1 beside a factor of {factor:g}: Megatron has no other")
    return None, None
