"""The table of model families: Hugging Face names, Megatron names, and how the tensors correspond.

One row is one Megatron tensor and the Hugging Face tensors that it is made of. Both directions, the
comparison and the parameter counts read these rows; nothing else knows a name of a weight.

Megatron stacks the tensors of all layers, and of all experts, under one key, along leading axes.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Any, NamedTuple

AS_IS, QKV, VOCABULARY = "as_is", "qkv", "vocabulary"

Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where else a tensor may be: the `number`-th of so many equal pieces (`pieces`) of another, along rows.

    Of a tensor of all experts, each expert's piece is so divided.
    """

    name: str
    number: int = 0
    pieces: int = 1


class Part(NamedTuple):
    """A Hugging Face tensor. `axes` name its sizes, see `axis_sizes`."""

    name: str
    axes: tuple[str, ...]
    elsewhere: Place | None = None


class Weight(NamedTuple):
    """A Megatron tensor. AS_IS parts lie one after the other along rows; QKV and VOCABULARY: `layouts.py`.

    `split_axis` is the axis, counted without layers and experts, that tensor parallelism cuts.
    """

    key: str
    parts: tuple[Part, ...]
    layout: str = AS_IS
    split_axis: int | None = None


class Slab(NamedTuple):
    """A tensor of this name and shape that has what is wanted, from its `begin`-th element on."""

    name: str
    shape: Shape
    begin: int


class HfTensor(NamedTuple):
    """A tensor by the name that we write; `elsewhere` is what may have it instead in what we read."""

    name: str
    shape: Shape
    elsewhere: Slab | None = None


class Chunk(NamedTuple):
    """The unit of conversion: one layer's (and expert's) piece of a Megatron tensor, and where it comes from.

    `offsets` and `shape` include the leading axes; `weight_shape` leaves them out.
    """

    key: str
    layer: int | None
    global_shape: Shape
    offsets: Shape
    shape: Shape
    sources: tuple[HfTensor, ...]
    layout: str
    split_axis: int | None

    @property
    def num_leading(self) -> int:
        """How many leading axes count layers and experts."""
        return len(self.shape) - len(self.sources[0].shape)

    @property
    def weight_shape(self) -> Shape:
        return self.shape[self.num_leading :]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


_LAYER = "model.layers.{layer}."
_MEGATRON_LAYER = "decoder.layers."


def _layer_weight(key: str, *parts: tuple[Any, ...], **how: Any) -> Weight:
    """Of parts (name, axes) or (name, axes, place elsewhere), names without the layer's prefix."""
    return Weight(_MEGATRON_LAYER + key, tuple(Part(_LAYER + part[0], *part[1:]) for part in parts), **how)


def _in_layer(name: str, number: int = 0, pieces: int = 1) -> Place:
    return Place(_LAYER + name, number, pieces)


def _embedding(elsewhere: Place | None = None) -> Weight:
    part = Part("model.embed_tokens.weight", ("vocab", "hidden"), elsewhere)
    return Weight("embedding.word_embeddings.weight", (part,), VOCABULARY, 0)


_EMBEDDING = _embedding()
_TIED_EMBEDDING = _embedding(Place("lm_head.weight"))  # transformers takes whichever of the two is there
_FINAL = Weight("decoder.final_layernorm.weight", (Part("model.norm.weight", ("hidden",)),))
OUTPUT_LAYER = Weight("output_layer.weight", (Part("lm_head.weight", ("vocab", "hidden")),), VOCABULARY, 0)

_ATTENTION = (
    _layer_weight("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight", ("hidden",))),
    _layer_weight(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", ("query", "hidden")),
        ("self_attn.k_proj.weight", ("key_value", "hidden")),
        ("self_attn.v_proj.weight", ("key_value", "hidden")),
        layout=QKV,
        split_axis=0,
    ),
    _layer_weight(
        "self_attention.linear_proj.weight", ("self_attn.o_proj.weight", ("hidden", "query")), split_axis=1
    ),
)
_QKV_BIAS = (
    _layer_weight(
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", ("query",)),
        ("self_attn.k_proj.bias", ("key_value",)),
        ("self_attn.v_proj.bias", ("key_value",)),
        layout=QKV,
        split_axis=0,
    ),
)
_QK_NORMS = (
    _layer_weight("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight", ("head",))),
    _layer_weight("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight", ("head",))),
)
_DENSE_MLP = (
    _layer_weight("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight", ("hidden",))),
    _layer_weight(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", ("ffn", "hidden")),
        ("mlp.up_proj.weight", ("ffn", "hidden")),
        split_axis=0,
    ),
    _layer_weight("mlp.linear_fc2.weight", ("mlp.down_proj.weight", ("hidden", "ffn")), split_axis=1),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """Of a block under `mlp` in transformers 5, which may store all experts of a layer as one tensor."""
    expert = block + ".experts.{expert}."
    fused = "mlp.experts."
    return (
        _layer_weight("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight", ("hidden",))),
        _layer_weight(
            "mlp.router.weight",
            (block + ".gate.weight", ("experts", "hidden"), _in_layer("mlp.gate.weight")),
        ),
        _layer_weight(
            "mlp.experts.experts.linear_fc1.weight",
            (f"{expert}{gate}.weight", ("expert_ffn", "hidden"), _in_layer(fused + "gate_up_proj", 0, 2)),
            (f"{expert}{up}.weight", ("expert_ffn", "hidden"), _in_layer(fused + "gate_up_proj", 1, 2)),
            split_axis=0,
        ),
        _layer_weight(
            "mlp.experts.experts.linear_fc2.weight",
            (f"{expert}{down}.weight", ("hidden", "expert_ffn"), _in_layer(fused + "down_proj")),
            split_axis=1,
        ),
    )


_LLAMA = (*_ATTENTION, *_DENSE_MLP)

# Hugging Face model type -> the weights of one layer.
FAMILIES: dict[str, tuple[Weight, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": (*_ATTENTION, *_QKV_BIAS, *_DENSE_MLP),
    "qwen3": (*_ATTENTION, *_QK_NORMS, *_DENSE_MLP),
    "mixtral": (*_ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2")),
    "qwen3_moe": (*_ATTENTION, *_QK_NORMS, *_experts("mlp", "gate_proj", "up_proj", "down_proj")),
}


def axis_sizes(args: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the axes of the table stand for."""
    head = args["kv_channels"]
    return {
        "vocab": args["vocab_size"],
        "hidden": args["hidden_size"],
        "ffn": args["ffn_hidden_size"],
        "expert_ffn": args.get("moe_ffn_hidden_size"),
        "experts": args.get("num_experts"),
        "head": head,
        "query": head * args["num_attention_heads"],
        "key_value": head * args["num_query_groups"],
    }


def chunks(family: str, args: Mapping[str, Any]) -> Iterator[Chunk]:
    """Every piece of the model, layer by layer."""
    untied = args["untie_embeddings_and_output_weights"]
    yield from _weight_chunks(_EMBEDDING if untied else _TIED_EMBEDDING, args, None)
    for layer in range(args["num_layers"]):
        for weight in FAMILIES[family]:
            yield from _weight_chunks(weight, args, layer)
    yield from _weight_chunks(_FINAL, args, None)
    if untied:
        yield from _weight_chunks(OUTPUT_LAYER, args, None)


def _weight_chunks(weight: Weight, args: Mapping[str, Any], layer: int | None) -> Iterator[Chunk]:
    sizes = axis_sizes(args)
    num_experts = sizes["experts"] if "{expert}" in weight.parts[0].name else None
    counts = [n for n in (args["num_layers"] if layer is not None else None, num_experts) if n is not None]
    groups = [weight.parts] if weight.layout == QKV else [(part,) for part in weight.parts]
    heights = [_height(weight.layout, group, args, sizes) for group in groups]
    columns = tuple(sizes[axis] for axis in weight.parts[0].axes[1:])
    for expert, (i, group) in product(range(num_experts or 1), enumerate(groups)):
        index = [n for n in (layer, expert if num_experts else None) if n is not None]
        yield Chunk(
            key=weight.key,
            layer=layer,
            global_shape=(*counts, sum(heights), *columns),
            offsets=(*index, sum(heights[:i]), *(0 for _ in columns)),
            shape=(*(1 for _ in counts), heights[i], *columns),
            sources=tuple(_hf_tensor(part, sizes, layer, expert) for part in group),
            layout=weight.layout,
            split_axis=weight.split_axis,
        )


def _height(layout: str, parts: tuple[Part, ...], args: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    if layout == VOCABULARY:
        return args["padded_vocab_size"]
    return sum(sizes[part.axes[0]] for part in parts)


def _hf_tensor(part: Part, sizes: Mapping[str, int], layer: int | None, expert: int) -> HfTensor:
    shape = tuple(sizes[axis] for axis in part.axes)
    slab = None
    if part.elsewhere:
        name, number, pieces = part.elsewhere
        of_experts = (sizes["experts"],) if "{expert}" in part.name else ()
        whole = (*of_experts, pieces * shape[0], *shape[1:])
        slab = Slab(name.format(layer=layer), whole, (expert * pieces + number) * prod(shape))
    return HfTensor(part.name.format(layer=layer, expert=expert), shape, slab)
