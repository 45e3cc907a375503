"""Megatron's arguments of a decoder with RMS norms, SwiGLU and grouped queries, and of its experts."""

import math
from typing import Any

from checkpoints_tools.families.rotary_arguments import rotary_arguments
from megatron_star.model.checked_values import CheckedValues
from megatron_star.model.recorded_arguments import MOST_LAYERS

# Megatron pads the vocabulary to a multiple of this (--make-vocab-size-divisible-by) times the TP size.
_VOCAB_DIVISOR = 128


# transformers' names of activation functions, by ours. Some have several.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
    "xielu": "xielu",
}


def decoder_arguments(
    values: CheckedValues, *, norm_epsilon: str = "rms_norm_eps", **rotary_options: bool
) -> dict[str, Any]:
    """Without biases, without norms of query and key, without experts: a family changes what is otherwise.

    Args:
        norm_epsilon: the key that has it.
        rotary_options: of `rotary_arguments`.
    """
    heads, groups, head_size = _attention_sizes(values)
    rotary = rotary_arguments(values, **rotary_options)
    vocab_size = values.integer("vocab_size")
    divisor = math.lcm(_VOCAB_DIVISOR, heads)  # so that every TP size that divides the heads divides it
    return {
        "num_layers": values.integer("num_hidden_layers", most=MOST_LAYERS),
        "hidden_size": values.integer("hidden_size"),
        "ffn_hidden_size": values.integer("intermediate_size"),
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": groups,
        "kv_channels": head_size,
        "normalization": "RMSNorm",
        "norm_epsilon": values.number(norm_epsilon),
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "swiglu": True,
        "vocab_size": vocab_size,
        "padded_vocab_size": math.ceil(vocab_size / divisor) * divisor,
        "make_vocab_size_divisible_by": divisor,
        "untie_embeddings_and_output_weights": not values.boolean("tie_word_embeddings"),
        "num_experts": None,
        **rotary,
    }


def _attention_sizes(values: CheckedValues) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of a head."""
    heads = values.integer("num_attention_heads")
    groups = values.integer("num_key_value_heads")
    if heads % groups:
        raise ValueError(
            f"config.json: num_key_value_heads={groups} does not divide num_attention_heads={heads}"
        )
    if values.any("head_dim", None) is None:
        return heads, groups, values.integer("hidden_size") // heads
    return heads, groups, values.integer("head_dim")


def activation_arguments(values: CheckedValues, *, gated: bool, key: str = "hidden_act") -> dict[str, Any]:
    """Of the MLP, whose activation has the name in `key`.

    Args:
        gated: activation(gate) * up; else activation(up).

    Raises:
        ValueError: an activation that we do not compute.
    """
    name = values.any(key)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise values.wrong(key, " or ".join(map(repr, _ACTIVATIONS)))
    if gated and _ACTIVATIONS[name] == "silu":
        return {"swiglu": True}
    return {"swiglu": False, "activation": _ACTIVATIONS[name], "gated_mlp": gated}


def bias_arguments(*, query_key_value: bool, output: bool, mlp: bool) -> dict[str, Any]:
    """Which linear layers have a bias; Megatron has a name for all of them together."""
    if query_key_value and output and mlp:
        return {"add_bias_linear": True}
    ours = {"add_proj_bias": output, "add_mlp_bias": mlp}
    return {"add_qkv_bias": query_key_value} | {name: True for name, has_it in ours.items() if has_it}


def optional_numbers(values: CheckedValues, **keys: str) -> dict[str, float]:
    """By argument, the number in its key of config.json; without those where null means none."""
    return {name: values.number(key) for name, key in keys.items() if values.any(key, None) is not None}


def biases_by_keys(values: CheckedValues) -> dict[str, Any]:
    """Where `attention_bias` is of queries, keys, values and the output, and `mlp_bias` of the whole MLP."""
    of_attention = bool(values.boolean("attention_bias", None))
    of_mlp = bool(values.boolean("mlp_bias", None))
    return bias_arguments(query_key_value=of_attention, output=of_attention, mlp=of_mlp)
