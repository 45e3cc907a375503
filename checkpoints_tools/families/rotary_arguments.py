"""The rotary embedding of a resolved Hugging Face configuration in Megatron's argument names."""

import math
from typing import Any

from megatron_star.checked_input import shown
from megatron_star.model.checked_values import LARGEST_SIZE, CheckedValues
from megatron_star.model.transformer_config import OWN_FIELDS

_SOURCE = "config.json: rope_parameters"
_FULL, _WINDOW = "full_attention", "sliding_attention"
_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_WHY_NOT = {"dynamic": "; its base changes with every token, for keys that are kept as well"}
_LLAMA3_CONSTANTS = {
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}


def rotary_arguments(
    values: CheckedValues, *, reads_partial: bool = False, reads_alpha: bool = False
) -> dict[str, Any]:
    """Megatron's arguments; `max_position_embeddings` among them.

    Args:
        values: of a configuration that transformers has resolved: `rope_parameters` has all that counts.
        reads_partial: whether transformers' model rotates a part of each head if nothing is scaled. (If
            something is, all do.)
        reads_alpha: whether it takes `dynamic` with an `alpha` as another base, the same for all lengths.

    Raises:
        ValueError: we cannot rotate in the same way.
    """
    rope, of_windows = _by_kind(values)
    arguments = _arguments(values, rope, reads_partial, reads_alpha)
    if of_windows is None:
        return arguments
    window = _arguments(values, of_windows, reads_partial, reads_alpha)
    if window == arguments:
        return arguments
    same = ("rotary_percent", "max_position_embeddings")
    plain = _plain_arguments(window["rotary_base"]) | {name: arguments[name] for name in same}
    if window != plain | {"max_position_embeddings": window["max_position_embeddings"]}:
        rope_type = shown(of_windows.any("rope_type"))
        raise ValueError(
            f"{_SOURCE}: {_WINDOW}: rope_type {rope_type} is not supported; default is, where it is not as "
            f"{_FULL}"
        )
    return arguments | {"window_rotary_base": window["rotary_base"]}


def _by_kind(values: CheckedValues) -> tuple[CheckedValues, CheckedValues | None]:
    """The parameters of all layers; or of those without a window, and of those with one."""
    found, kinds = values.any("rope_parameters", None), values.any("layer_types", None)
    by_kind = found if isinstance(found, dict) else {}
    if by_kind and not any(isinstance(value, dict) for value in by_kind.values()):
        return CheckedValues(by_kind, _SOURCE), None
    kinds = sorted({*map(str, kinds)}) if isinstance(kinds, list) else []  # full before sliding
    if not kinds or not all(
        kind in (_FULL, _WINDOW) and isinstance(by_kind.get(kind), dict) for kind in kinds
    ):
        raise ValueError(
            f"{_SOURCE}={shown(found)}: one rotary embedding for all layers is supported, or one for "
            f"{_FULL} and one for {_WINDOW}"
        )
    parameters = [CheckedValues(by_kind[kind], f"{_SOURCE}: {kind}") for kind in kinds]
    return parameters[0], parameters[1] if len(parameters) > 1 else None


def _plain_arguments(base: float) -> dict[str, Any]:
    return {
        "position_embedding_type": "rope",
        "rotary_base": int(base) if base == int(base) else base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
    }


def _arguments(
    values: CheckedValues, rope: CheckedValues, reads_partial: bool, reads_alpha: bool
) -> dict[str, Any]:
    rope_type, base = rope.any("rope_type"), rope.number("rope_theta")
    if reads_alpha and rope_type == "dynamic" and rope.any("alpha", None):
        head_size = values.integer("head_dim", least=4)
        rope_type, base = "default", base * rope.number("alpha") ** (head_size / (head_size - 2))
    if rope_type not in _TYPES:
        raise ValueError(
            f"config.json: rope_type {shown(rope_type)} is not supported; {', '.join(_TYPES)} are"
            + _WHY_NOT.get(str(rope_type), "")
        )
    arguments = _plain_arguments(base)
    arguments["rotary_percent"] = _rotary_percent(rope, reads_partial or rope_type != "default")
    arguments["max_position_embeddings"] = values.integer("max_position_embeddings")
    if rope_type == "linear":
        return arguments | {"rotary_seq_len_interpolation_factor": rope.number("factor")}
    if rope_type == "llama3":
        return arguments | _llama3_arguments(rope)
    if rope_type == "yarn":
        return arguments | _yarn_arguments(rope, arguments["max_position_embeddings"])
    if rope_type == "longrope":
        return arguments | _longrope_arguments(rope, arguments["max_position_embeddings"])
    return arguments


def _rotary_percent(rope: CheckedValues, is_read: bool) -> float:
    if rope.any("partial_rotary_factor", 1.0) == 1.0:
        return 1.0
    factor = rope.number("partial_rotary_factor")
    if factor > 1 or not is_read:
        raise ValueError(f"config.json: partial_rotary_factor={shown(factor)} is not supported")
    return factor


def _llama3_arguments(rope: CheckedValues) -> dict[str, Any]:
    """Megatron's, and its constants where they are others."""
    constants = {name: rope.number(key) for key, name in _LLAMA3_CONSTANTS.items()}
    rope.integer("original_max_position_embeddings")
    if constants["rope_high_freq_factor"] < constants["rope_low_freq_factor"]:  # Llama 4 has twice the same
        raise rope.wrong("high_freq_factor", f"at least low_freq_factor, {rope.any('low_freq_factor')}")
    others = {name: value for name, value in constants.items() if value != OWN_FIELDS[name].default}
    return {"use_rope_scaling": True, "rope_scaling_factor": rope.number("factor"), **others}


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


def _longrope_arguments(rope: CheckedValues, max_position_embeddings: int) -> dict[str, Any]:
    original = rope.integer("original_max_position_embeddings", least=2)  # its logarithm divides
    factor = max_position_embeddings / original  # transformers' default, where it is null
    if rope.any("factor", None) is not None:
        factor = rope.number("factor")
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if rope.any("attention_factor", None) is not None:
        attention_factor = rope.number("attention_factor")
    return {
        "position_embedding_type": "longrope",
        "longrope_short_factors": rope.numbers("short_factor"),
        "longrope_long_factors": rope.numbers("long_factor"),
        "longrope_original_max_position_embeddings": original,
        "longrope_attention_factor": attention_factor,
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


def query_scale_arguments(values: CheckedValues) -> dict[str, Any]:
    """Of Ministral 3, whose `rope_parameters` say by how much queries grow with their position."""
    rope = CheckedValues(values.any("rope_parameters"), _SOURCE)
    return {
        "query_scale_beta": rope.number("llama_4_scaling_beta"),
        "query_scale_floor": rope.integer("original_max_position_embeddings"),
    }


def latent_rotary_arguments(values: CheckedValues, arguments: dict[str, Any]) -> dict[str, Any]:
    """What latent attention changes of the `arguments` that `rotary_arguments` gave.

    Its attention scores grow with `mscale_all_dim` alone (by mscale(factor, mscale_all_dim)^2), whatever the
    cosines and sines are multiplied with: so both scales are numbers.

    Raises:
        ValueError: a way of scaling that we do not have for latent attention.
    """
    rope, _ = _by_kind(values)
    if arguments["position_embedding_type"] != "yarn":
        if (kind := rope.any("rope_type", "default")) != "default":
            raise ValueError(
                f"{_SOURCE}: rope_type {shown(kind)} is not supported with latent "
                "attention; default and yarn are"
            )
        return {}
    all_dim = rope.number("mscale_all_dim") if rope.any("mscale_all_dim", None) else 0.0
    mscale = 1.0 if arguments["mscale"] is None else arguments["mscale"]
    divisor = arguments["mscale_all_dim"] or 0.0
    factor = arguments["rotary_scaling_factor"]
    if divisor != all_dim and factor > 1:
        grown = _mscale(factor, mscale) / _mscale(factor, divisor) * _mscale(factor, all_dim)
        mscale = (grown - 1) / (0.1 * math.log(factor))
    return {"mscale": mscale, "mscale_all_dim": all_dim}


def _mscale(factor: float, mscale: float) -> float:
    """DeepSeek's `yarn_get_mscale`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
