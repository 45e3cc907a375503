"""The tensors that several families have, by their Hugging Face names."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

from checkpoints_tools.families.weight import (
    QKV,
    QKV_ROWS,
    VOCABULARY,
    Part,
    Place,
    Weight,
    any_of,
    both,
    norm_of_mlp,
    norms_after,
    norms_before,
    norms_have_biases,
    qk_norm_of,
)

_LAYER = "model.layers.{layer}."


def layer_weight(key: str, *parts: tuple[Any, ...], **how: Any) -> Weight:
    """Of parts (name, axes) or (name, axes, place elsewhere), names without the layer's prefix."""
    return Weight("decoder.layers." + key, tuple(Part(_LAYER + part[0], *part[1:]) for part in parts), **how)


def in_layer(name: str, number: int = 0, pieces: int = 1) -> Place:
    """A place by a name without the layer's prefix."""
    return Place(_LAYER + name, number, pieces)


EMBEDDING = Weight(
    "embedding.word_embeddings.weight",
    (Part("model.embed_tokens.weight", ("vocab", "hidden")),),
    VOCABULARY,
    split_axis=0,
)
FINAL_NORM = Weight("decoder.final_layernorm.weight", (Part("model.norm.weight", ("hidden",)),))
FINAL_NORM_BIAS = Weight(
    "decoder.final_layernorm.bias", (Part("model.norm.bias", ("hidden",)),), only_with=norms_have_biases
)
OUTPUT_LAYER = Weight(
    "output_layer.weight",
    (Part("lm_head.weight", ("vocab", "hidden")),),
    VOCABULARY,
    split_axis=0,
    only_with="untie_embeddings_and_output_weights",
)


def norms(
    *,
    before_attention: str = "input_layernorm",
    before_mlp: str | None = "post_attention_layernorm",
    after_attention: str | None = None,
    after_mlp: str | None = None,
) -> tuple[Weight, ...]:
    """The norms of a layer, by their Hugging Face names; `norm_placement` says which of them a model has."""
    places = (
        ("self_attention.linear_qkv.layer_norm_", before_attention, norms_before),
        ("mlp.linear_fc1.layer_norm_", before_mlp, norm_of_mlp),
        ("self_attn_bda.norm.", after_attention, norms_after),
        ("mlp_bda.norm.", after_mlp, norms_after),
    )
    return tuple(
        layer_weight(key + kind, (f"{name}.{kind}", ("hidden",)), only_with=condition)
        for key, name, placed in places
        if name
        for kind, condition in (("weight", placed), ("bias", both(placed, norms_have_biases)))
    )


def attention(
    *,
    fused: str | None = None,
    output: str = "o_proj",
    query_norm: str = "q_norm",
    key_norm: str = "k_norm",
) -> tuple[Weight, ...]:
    """Projections, and the biases, norms of query and key, and sinks that the arguments ask for.

    Args:
        fused: the one projection whose rows are all query heads, all key heads, all value heads; else three.
    """
    return (
        _query_key_value("weight", ("hidden",), fused),
        _query_key_value("bias", (), fused)._replace(only_with=any_of("add_qkv_bias", "add_bias_linear")),
        layer_weight(
            "self_attention.linear_proj.weight",
            (f"self_attn.{output}.weight", ("hidden", "query")),
            split_axis=1,
        ),
        layer_weight(
            "self_attention.linear_proj.bias",
            (f"self_attn.{output}.bias", ("hidden",)),
            only_with=any_of("add_proj_bias", "add_bias_linear"),
        ),
        *_query_key_norms(query_norm, key_norm),
        layer_weight(
            "self_attention.core_attention.softmax_offset",
            ("self_attn.sinks", ("query_heads",)),
            split_axis=0,
            only_with=lambda args: args.get("softmax_type") == "learnable",
        ),
    )


def _query_key_value(kind: str, columns: tuple[str, ...], fused: str | None) -> Weight:
    key = f"self_attention.linear_qkv.{kind}"
    if fused:
        part = (f"self_attn.{fused}.{kind}", ("query_key_value", *columns))
        return layer_weight(key, part, layout=QKV_ROWS, split_axis=0)
    parts = (("q_proj", "query"), ("k_proj", "key_value"), ("v_proj", "key_value"))
    names = [(f"self_attn.{name}.{kind}", (rows, *columns)) for name, rows in parts]
    return layer_weight(key, *names, layout=QKV, split_axis=0)


def _query_key_norms(query_norm: str, key_norm: str) -> tuple[Weight, ...]:
    """Of each head alike, or over all heads of a token, whose weights tensor parallelism then cuts."""
    of_all_heads = (("q_layernorm", query_norm, "query"), ("k_layernorm", key_norm, "key_value"))
    of_a_head = ((key, name, "head") for key, name, _ in of_all_heads)
    spans = (("head", None, of_a_head), ("all_heads", 0, of_all_heads))
    return tuple(
        layer_weight(
            f"self_attention.{key}.weight",
            (f"self_attn.{name}.weight", (size,)),
            split_axis=split_axis,
            only_with=qk_norm_of(span),
        )
        for span, split_axis, weights in spans
        for key, name, size in weights
    )


def gated_mlp(
    *,
    block: str = "mlp",
    fused: str | None = None,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> tuple[Weight, ...]:
    """Without its norm.

    Args:
        fused: the one projection whose rows are those of the gate, then those of `up`; else two.
    """
    first = ((fused, "gate_up_ffn"),) if fused else ((gate, "ffn"), (up, "ffn"))
    return _mlp(first, down, block)


def plain_mlp(*, up: str = "up_proj", down: str = "down_proj") -> tuple[Weight, ...]:
    """Of an MLP without a gate, and without its norm."""
    return _mlp(((up, "ffn"),), down)


def _mlp(first: tuple[tuple[str, str], ...], down: str, block: str = "mlp") -> tuple[Weight, ...]:
    has_biases = any_of("add_mlp_bias", "add_bias_linear")
    return (
        layer_weight(
            "mlp.linear_fc1.weight",
            *((f"{block}.{name}.weight", (rows, "hidden")) for name, rows in first),
            split_axis=0,
        ),
        layer_weight(
            "mlp.linear_fc1.bias",
            *((f"{block}.{name}.bias", (rows,)) for name, rows in first),
            split_axis=0,
            only_with=has_biases,
        ),
        layer_weight("mlp.linear_fc2.weight", (f"{block}.{down}.weight", ("hidden", "ffn")), split_axis=1),
        layer_weight("mlp.linear_fc2.bias", (f"{block}.{down}.bias", ("hidden",)), only_with=has_biases),
    )


ATTENTION = (*norms()[:2], *attention())
DENSE_MLP = (*norms()[2:], *gated_mlp())


def renamed(weights: tuple[Weight, ...], names: Mapping[str, str]) -> tuple[Weight, ...]:
    """The same weights, with these pieces of their Hugging Face names replaced, one after the other."""

    def name(part: Part) -> str:
        return reduce(lambda found, piece: found.replace(*piece), names.items(), part.name)

    return tuple(
        weight._replace(parts=tuple(part._replace(name=name(part)) for part in weight.parts))
        for weight in weights
    )
