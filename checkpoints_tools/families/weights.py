"""Which Hugging Face tensors a Megatron tensor is made of, and the tensors that several families have.

One `Weight` is one Megatron tensor. Both directions, the comparison and the parameter counts read them;
nothing else knows a name of a weight. Megatron stacks the tensors of all layers, and of all experts, under
one key, along leading axes.
"""

from typing import Any, NamedTuple

AS_IS, QKV, VOCABULARY = "as_is", "qkv", "vocabulary"


class Place(NamedTuple):
    """Where else a tensor may be: the `number`-th of so many equal pieces (`pieces`) of another, along rows.

    Of a tensor of all experts, each expert's piece is so divided.
    """

    name: str
    number: int = 0
    pieces: int = 1


class Part(NamedTuple):
    """A Hugging Face tensor. `axes` name its sizes, see `chunks.axis_sizes`."""

    name: str
    axes: tuple[str, ...]
    elsewhere: Place | None = None


class Weight(NamedTuple):
    """A Megatron tensor. AS_IS parts lie one after the other along rows; QKV and VOCABULARY: `layouts.py`.

    Attributes:
        split_axis: the axis, counted without layers and experts, that tensor parallelism cuts.
        only_with: Megatron's argument that a model with this tensor sets; None: every model has it.
    """

    key: str
    parts: tuple[Part, ...]
    layout: str = AS_IS
    split_axis: int | None = None
    only_with: str | None = None


_LAYER = "model.layers.{layer}."


def layer_weight(key: str, *parts: tuple[Any, ...], **how: Any) -> Weight:
    """Of parts (name, axes) or (name, axes, place elsewhere), names without the layer's prefix."""
    return Weight("decoder.layers." + key, tuple(Part(_LAYER + part[0], *part[1:]) for part in parts), **how)


def _in_layer(name: str, number: int = 0, pieces: int = 1) -> Place:
    return Place(_LAYER + name, number, pieces)


EMBEDDING = Weight(
    "embedding.word_embeddings.weight",
    (Part("model.embed_tokens.weight", ("vocab", "hidden")),),
    VOCABULARY,
    split_axis=0,
)
FINAL_NORM = Weight("decoder.final_layernorm.weight", (Part("model.norm.weight", ("hidden",)),))
OUTPUT_LAYER = Weight(
    "output_layer.weight",
    (Part("lm_head.weight", ("vocab", "hidden")),),
    VOCABULARY,
    split_axis=0,
    only_with="untie_embeddings_and_output_weights",
)

ATTENTION = (
    layer_weight("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight", ("hidden",))),
    layer_weight(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", ("query", "hidden")),
        ("self_attn.k_proj.weight", ("key_value", "hidden")),
        ("self_attn.v_proj.weight", ("key_value", "hidden")),
        layout=QKV,
        split_axis=0,
    ),
    layer_weight(
        "self_attention.linear_proj.weight", ("self_attn.o_proj.weight", ("hidden", "query")), split_axis=1
    ),
    layer_weight(
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", ("query",)),
        ("self_attn.k_proj.bias", ("key_value",)),
        ("self_attn.v_proj.bias", ("key_value",)),
        layout=QKV,
        split_axis=0,
        only_with="add_qkv_bias",
    ),
    layer_weight(
        "self_attention.q_layernorm.weight",
        ("self_attn.q_norm.weight", ("head",)),
        only_with="qk_layernorm",
    ),
    layer_weight(
        "self_attention.k_layernorm.weight",
        ("self_attn.k_norm.weight", ("head",)),
        only_with="qk_layernorm",
    ),
)
DENSE_MLP = (
    layer_weight("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight", ("hidden",))),
    layer_weight(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", ("ffn", "hidden")),
        ("mlp.up_proj.weight", ("ffn", "hidden")),
        split_axis=0,
    ),
    layer_weight("mlp.linear_fc2.weight", ("mlp.down_proj.weight", ("hidden", "ffn")), split_axis=1),
)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """Of a block under `mlp` in transformers 5, which may store all experts of a layer as one tensor."""
    expert = block + ".experts.{expert}."
    fused = "mlp.experts."
    return (
        layer_weight("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight", ("hidden",))),
        layer_weight(
            "mlp.router.weight",
            (block + ".gate.weight", ("experts", "hidden"), _in_layer("mlp.gate.weight")),
        ),
        layer_weight(
            "mlp.experts.experts.linear_fc1.weight",
            (f"{expert}{gate}.weight", ("expert_ffn", "hidden"), _in_layer(fused + "gate_up_proj", 0, 2)),
            (f"{expert}{up}.weight", ("expert_ffn", "hidden"), _in_layer(fused + "gate_up_proj", 1, 2)),
            split_axis=0,
        ),
        layer_weight(
            "mlp.experts.experts.linear_fc2.weight",
            (f"{expert}{down}.weight", ("hidden", "expert_ffn"), _in_layer(fused + "down_proj")),
            split_axis=1,
        ),
    )
