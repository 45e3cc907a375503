"""From a Hugging Face config.json to Megatron's argument names, refusing by name what would not be the same.

Both spellings are read: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (transformers 5).
"""

import json
import math
from pathlib import Path
from typing import Any

from checkpoints_tools.families import FAMILIES

Config = dict[str, Any]

# Megatron pads the vocabulary to a multiple of this (--make-vocab-size-divisible-by) times the TP size.
_VOCAB_DIVISOR = 128
_LLAMA3_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def read_hf_config(directory: Path) -> Config:
    """config.json of a Hugging Face directory.

    Raises:
        FileNotFoundError, ValueError: it is missing or not JSON.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is {directory} a Hugging Face checkpoint?")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def family_of(config: Config) -> str:
    """Raises ValueError for a family that is not in the table."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    return family


def model_arguments(config: Config) -> Config:
    """The model in Megatron's argument names.

    Raises:
        ValueError: the configuration uses something that the Megatron model would not compute the same way.
    """
    family = family_of(config)
    for key in _REQUIRED:
        _require(config, key)
    _refuse_what_differs(family, config)
    heads = config["num_attention_heads"]
    vocab_size = config["vocab_size"]
    divisor = math.lcm(_VOCAB_DIVISOR, heads)  # so that every TP size that divides the heads divides it
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "normalization": "RMSNorm",
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "add_bias_linear": False,
        "add_qkv_bias": family == "qwen2",
        "qk_layernorm": family in ("qwen3", "qwen3_moe"),
        "swiglu": True,
        "vocab_size": vocab_size,
        "padded_vocab_size": math.ceil(vocab_size / divisor) * divisor,
        "make_vocab_size_divisible_by": divisor,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "num_experts": None,
        **_rotary_arguments(config),
        **_expert_arguments(family, config),
    }


def _refuse_what_differs(family: str, config: Config) -> None:
    refused = {
        "attention_bias": family != "qwen2" and config.get("attention_bias"),
        "mlp_bias": config.get("mlp_bias"),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "sliding_window": _uses_sliding_window(family, config),
        "quantization_config": config.get("quantization_config") is not None,
        "partial_rotary_factor": _rope_parameters(config).get("partial_rotary_factor", 1.0) != 1.0,
        "mlp_only_layers": bool(config.get("mlp_only_layers")),
        "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
    }
    values = _rope_parameters(config) | config
    for key, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"config.json: {key}={values.get(key)!r} is not supported for {family}")


def _uses_sliding_window(family: str, config: Config) -> bool:
    if family.startswith("qwen"):
        return bool(config.get("use_sliding_window"))
    window = config.get("sliding_window")
    return window is not None and window < config["max_position_embeddings"]


def _rope_parameters(config: Config) -> Config:
    """One form for both spellings, with `rope_type` and `rope_theta`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if "partial_rotary_factor" in config:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    return rope


def _rotary_arguments(config: Config) -> Config:
    rope = _rope_parameters(config)
    rope_type = rope["rope_type"]
    base = rope["rope_theta"]
    arguments = {
        "position_embedding_type": "rope",
        "rotary_base": int(base) if base == int(base) else base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "max_position_embeddings": config["max_position_embeddings"],
    }
    if rope_type == "llama3":
        return arguments | _llama3_arguments(rope)
    if rope_type == "yarn":
        return arguments | _yarn_arguments(rope, config)
    if rope_type != "default":
        raise ValueError(f"config.json: rope_type {rope_type!r} is not supported; default, llama3, yarn are")
    return arguments


def _llama3_arguments(rope: Config) -> Config:
    for key, constant in _LLAMA3_CONSTANTS.items():
        if rope.get(key) != constant:
            raise ValueError(
                f"config.json: {key}={rope.get(key)!r}; Megatron's scaling has {constant} built in"
            )
    return {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}


def _yarn_arguments(rope: Config, config: Config) -> Config:
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if not factor:
        raise ValueError("config.json: factor of the yarn rotary scaling is missing")
    mscale, mscale_all_dim = _yarn_mscales(rope, factor)
    return {
        "position_embedding_type": "yarn",
        "max_position_embeddings": max(config["max_position_embeddings"], int(factor * original)),
        "rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": rope.get("beta_fast") or 32.0,
        "yarn_beta_slow": rope.get("beta_slow") or 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }


def _yarn_mscales(rope: Config, factor: float) -> tuple[float | None, float | None]:
    """Megatron's two scales that give the attention factor that transformers uses; None for the default."""
    attention_factor = rope.get("attention_factor")
    if attention_factor is not None and factor > 1:
        # Megatron: (0.1 * mscale * ln(factor) + 1) / (0.1 * mscale_all_dim * ln(factor) + 1)
        return (attention_factor - 1) / (0.1 * math.log(factor)), 0.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return rope["mscale"], rope["mscale_all_dim"]
    return None, None


def _expert_arguments(family: str, config: Config) -> Config:
    if family not in ("mixtral", "qwen3_moe"):
        return {}
    size = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    # Softmax over the chosen experts (Megatron's default) equals softmax over all, renormalised.
    renormalised = family == "mixtral" or config.get("norm_topk_prob", False)
    return {
        "num_experts": _require(config, "num_local_experts", "num_experts"),
        "moe_ffn_hidden_size": _require(config, size),
        "moe_router_topk": _require(config, "num_experts_per_tok"),
        "moe_router_pre_softmax": not renormalised,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_layer_freq": 1,
    }


def _require(config: Config, *names: str) -> Any:
    """The value of the first of these keys that is there."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ValueError(f"config.json: {names[0]} is missing")
