"""From a Hugging Face config.json to Megatron's argument names, refusing by name what would not be the same.

What a key means, which of two spellings counts and what an absent key stands for differs between families
and is transformers' to say: its configuration class of the family reads the JSON, and its values are used.
"""

import copy
import math
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from checkpoints_tools.families import FAMILIES
from checkpoints_tools.rotary_arguments import rotary_arguments
from megatron_star.checked_input import read_json_object, shown
from megatron_star.model.checked_values import CheckedValues

Config = dict[str, Any]

_SOURCE = "config.json"
_LONGEST_ERROR = 300  # characters of what transformers says
# Megatron pads the vocabulary to a multiple of this (--make-vocab-size-divisible-by) times the TP size.
_VOCAB_DIVISOR = 128
_MOST_LAYERS = 10_000
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_WITH_EXPERTS = ("mixtral", "qwen3_moe")


def read_hf_config(directory: Path) -> Config:
    """config.json of a Hugging Face directory.

    Raises:
        FileNotFoundError, ValueError: it is missing or not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is {directory} a Hugging Face checkpoint?")
    return read_json_object(path)


def family_of(config: Config) -> str:
    """Raises ValueError for a family that is not in the table."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"model_type {shown(family)} is not supported; supported: {', '.join(FAMILIES)}")
    return family


def model_arguments(config: Config) -> Config:
    """The model in Megatron's argument names.

    Raises:
        ValueError: the configuration uses something that the Megatron model would not compute the same way.
    """
    family = family_of(config)
    values = _resolved(family, config)
    _refuse_what_differs(family, values)
    heads, groups, head_size = _attention_sizes(values)
    rotary = rotary_arguments(values)
    _refuse_sliding_window(family, values, rotary["max_position_embeddings"])
    vocab_size = values.integer("vocab_size")
    divisor = math.lcm(_VOCAB_DIVISOR, heads)  # so that every TP size that divides the heads divides it
    return {
        "num_layers": values.integer("num_hidden_layers", most=_MOST_LAYERS),
        "hidden_size": values.integer("hidden_size"),
        "ffn_hidden_size": values.integer("intermediate_size"),
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": groups,
        "kv_channels": head_size,
        "normalization": "RMSNorm",
        "norm_epsilon": values.number("rms_norm_eps"),
        "add_bias_linear": False,
        "add_qkv_bias": family == "qwen2",
        "qk_layernorm": family in ("qwen3", "qwen3_moe"),
        "swiglu": True,
        "vocab_size": vocab_size,
        "padded_vocab_size": math.ceil(vocab_size / divisor) * divisor,
        "make_vocab_size_divisible_by": divisor,
        "untie_embeddings_and_output_weights": not values.boolean("tie_word_embeddings"),
        "num_experts": None,
        **rotary,
        **_expert_arguments(family, values),
    }


def _resolved(family: str, config: Config) -> CheckedValues:
    """The attributes of transformers' own configuration object, made of this JSON."""
    raw = CheckedValues(config, _SOURCE)
    for key in _SIZES:
        if key in raw:
            if config[key] is None:
                raise ValueError(f"{_SOURCE}: {key} is missing")
            raw.integer(key)  # transformers divides by some of them before it has looked at them
    try:
        resolved = CONFIG_MAPPING[family].from_dict(copy.deepcopy(config))
        resolved.standardize_rope_params()  # again, as its models do, which then see all top-level keys
    except Exception as error:  # whatever transformers' code raises on this JSON is about this JSON
        said = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_ERROR]
        raise ValueError(f"{_SOURCE}: transformers does not accept it: {said}") from error
    return CheckedValues(vars(resolved), _SOURCE)


def _refuse_what_differs(family: str, values: CheckedValues) -> None:
    allowed: dict[str, tuple[Any, ...]] = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "hidden_act": ("silu", "swish"),  # two names of one function
        "is_causal": (True,),
        "mlp_only_layers": ([], None),
        "decoder_sparse_step": (1,),
    }
    if family == "qwen2":
        del allowed["attention_bias"]  # its layers have biases where Megatron has them, and read no such key
    for key, of_key in allowed.items():
        if key in values and not any(values.any(key) == value for value in of_key):
            raise ValueError(f"{_SOURCE}: {key}={shown(values.any(key))} is not supported for {family}")
    for key in ("quantization_config", "per_layer_config", "transformers_weights"):
        if values.any(key, None):  # an empty one says nothing
            raise ValueError(f"{_SOURCE}: {key}={shown(values.any(key))} is not supported for {family}")


def _attention_sizes(values: CheckedValues) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of a head."""
    heads = values.integer("num_attention_heads")
    groups = values.integer("num_key_value_heads")
    if heads % groups:
        raise ValueError(
            f"{_SOURCE}: num_key_value_heads={groups} does not divide num_attention_heads={heads}"
        )
    if values.any("head_dim", None) is None:
        return heads, groups, values.integer("hidden_size") // heads
    return heads, groups, values.integer("head_dim")


def _refuse_sliding_window(family: str, values: CheckedValues, max_position_embeddings: int) -> None:
    """Unless no layer has one, or none of the tokens that the model is made for lies outside of it."""
    layer_types = values.any("layer_types", None) if family in ("qwen2", "qwen3") else None
    if layer_types is None:
        windowed = values.any("sliding_window", None) is not None
    else:
        for kind in layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(f"{_SOURCE}: layer_types has {shown(kind)}, which is not supported")
        windowed = "sliding_attention" in layer_types
    if windowed and values.integer("sliding_window") < max_position_embeddings:
        raise ValueError(
            f"{_SOURCE}: sliding_window={values.any('sliding_window')} is not supported for {family}, whose "
            f"contexts may have {max_position_embeddings:,} tokens"
        )


def _expert_arguments(family: str, values: CheckedValues) -> Config:
    if family not in _WITH_EXPERTS:
        return {}
    size = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    # Softmax over the chosen experts (Megatron's default) equals softmax over all, renormalised.
    renormalised = family == "mixtral" or values.boolean("norm_topk_prob")
    num_experts = values.integer("num_local_experts", most=_MOST_LAYERS)
    chosen = values.integer("num_experts_per_tok", most=num_experts)
    if renormalised and chosen == 1:
        raise ValueError(
            f"{_SOURCE}: num_experts_per_tok=1 with weights that are normalised to 1 is not supported: "
            "Megatron routes to a single expert only with its probability"
        )
    return {
        "num_experts": num_experts,
        "moe_ffn_hidden_size": values.integer(size),
        "moe_router_topk": chosen,
        "moe_router_pre_softmax": not renormalised,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_layer_freq": 1,
    }
