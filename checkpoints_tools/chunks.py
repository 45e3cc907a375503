"""The pieces of a model that are converted one at a time, of the table of its family."""

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch

from checkpoints_tools.families.family import Family
from checkpoints_tools.families.weight import QKV, TURNED, TURNED_PAIRS, VOCABULARY, Part, Place, Weight

Shape = tuple[int, ...]


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

    def written(self, *, fused_experts: bool) -> tuple[str, Shape]:
        """Name and shape of the tensor that it is written to, or to a piece of.

        Args:
            fused_experts: all experts of a layer go to one tensor, where the family has one for them.
        """
        slab = self.elsewhere
        if slab and (self.name.endswith("]") or (fused_experts and slab.shape != self.shape)):
            return slab.name, slab.shape
        return self.name, self.shape


class Chunk(NamedTuple):
    """The unit of conversion: one layer's (and expert's) piece of a Megatron tensor, and where it comes from.

    `offsets` and `shape` include the leading axes; `weight_shape` leaves them out. `may_be_float32`: see
    `Weight`.
    """

    key: str
    layer: int | None
    global_shape: Shape
    offsets: Shape
    shape: Shape
    sources: tuple[HfTensor, ...]
    layout: str
    split_axis: int | None
    may_be_float32: bool = False

    def dtype(self, found: torch.dtype, common: torch.dtype) -> torch.dtype:
        """What it is written in: the dtype of all weights, or as it is `found`."""
        return found if self.may_be_float32 and found == torch.float32 else common

    @property
    def num_leading(self) -> int:
        """How many leading axes count layers and experts."""
        return len(self.shape) - max(1, len(self.sources[0].shape))  # Megatron has no tensors without axes

    @property
    def weight_shape(self) -> Shape:
        return self.shape[self.num_leading :]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def key_of_layer(key: str, layer: int) -> str:
    """The key of one layer's tensor where Megatron does not stack those of all layers under `key`."""
    return key.replace("decoder.layers.", f"decoder.layers.{layer}.")


def axis_sizes(args: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the axes of weights stand for."""
    head = args["kv_channels"]
    return {
        "vocab": args["vocab_size"],
        "hidden": args["hidden_size"],
        "ffn": args["ffn_hidden_size"],
        "expert_ffn": args.get("moe_ffn_hidden_size"),
        "experts": args.get("num_experts"),
        "head": head,
        "query_heads": args["num_attention_heads"],
        "query": head * args["num_attention_heads"],
        "key_value": head * args["num_query_groups"],
        "query_key_value": head * (args["num_attention_heads"] + 2 * args["num_query_groups"]),
        "gate_up_ffn": 2 * args["ffn_hidden_size"],
        "expert_gate_up_ffn": 2 * (args.get("moe_ffn_hidden_size") or 0),
        "shared_ffn": args.get("moe_shared_expert_intermediate_size"),
        "one": 1,
        **_latent_sizes(args),
    }


def _latent_sizes(args: Mapping[str, Any]) -> dict[str, int]:
    """Of latent attention."""
    if not args.get("multi_latent_attention"):
        return {}
    heads, latent = args["num_attention_heads"], args["kv_lora_rank"]
    return {
        "query_latent": args.get("q_lora_rank"),
        "latent": latent,
        "latent_and_rotated_key": latent + args["qk_pos_emb_head_dim"],
        "plain_keys_and_values": heads * (args["qk_head_dim"] + args["v_head_dim"]),
        "values": heads * args["v_head_dim"],
    }


def chunks(family: Family, args: Mapping[str, Any]) -> Iterator[Chunk]:
    """Every piece of the model, layer by layer."""
    output_layer = [family.output_layer] if family.output_layer.belongs_to(args) else []
    embedding = family.embedding if output_layer else _tied(family.embedding, family.output_layer)
    yield from _weight_chunks(embedding, args)
    layers = range(args["num_layers"])
    in_layers = [
        weight
        for weight in family.layer
        if weight.belongs_to(args) and any(weight.is_in(args, layer) for layer in layers)
    ]
    stacked = all(weight.is_in(args, layer) for weight in in_layers for layer in layers)
    for layer in layers:
        for weight in in_layers:
            if weight.is_in(args, layer):
                yield from _weight_chunks(weight, args, layer, stacked=stacked)
    for weight in (*family.end, *output_layer):
        if weight.belongs_to(args):
            yield from _weight_chunks(weight, args)


def _tied(embedding: Weight, output_layer: Weight) -> Weight:
    """The embedding of a tied model: transformers takes whichever of the two names is there."""
    [part], [other] = embedding.parts, output_layer.parts
    return embedding._replace(parts=(part._replace(elsewhere=Place(other.name)),))


def _weight_chunks(
    weight: Weight, args: Mapping[str, Any], layer: int | None = None, *, stacked: bool = False
) -> Iterator[Chunk]:
    """The tensor's pieces, of the layer: under the key of all layers, or `stacked` is false, of its own."""
    sizes = axis_sizes(args)
    num_experts = sizes["experts"] if "{expert}" in weight.parts[0].name else None
    counts = [n for n in (args["num_layers"] if stacked else None, num_experts) if n is not None]
    key = weight.key if stacked or layer is None else key_of_layer(weight.key, layer)
    groups = [weight.parts] if weight.layout == QKV else [(part,) for part in weight.parts]
    heights = [_height(weight.layout, group, args, sizes) for group in groups]
    columns = tuple(sizes[axis] for axis in _axes(weight.layout, weight.parts[0])[1:])
    for expert, (i, group) in product(range(num_experts or 1), enumerate(groups)):
        index = [n for n in (layer if stacked else None, expert if num_experts else None) if n is not None]
        yield Chunk(
            key=key,
            layer=layer,
            global_shape=(*counts, sum(heights), *columns),
            offsets=(*index, sum(heights[:i]), *(0 for _ in columns)),
            shape=(*(1 for _ in counts), heights[i], *columns),
            sources=tuple(_hf_tensor(part, sizes, layer, expert) for part in group),
            layout=weight.layout,
            split_axis=weight.split_axis,
            may_be_float32=weight.may_be_float32,
        )


def _height(layout: str, parts: tuple[Part, ...], args: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    if layout == VOCABULARY:
        return args["padded_vocab_size"]
    return sum(sizes[_axes(layout, part)[0]] if part.axes else 1 for part in parts)


def _axes(layout: str, part: Part) -> tuple[str, ...]:
    """As Megatron has them."""
    return part.axes[::-1] if layout in (TURNED, TURNED_PAIRS) else part.axes


def _hf_tensor(part: Part, sizes: Mapping[str, int], layer: int | None, expert: int) -> HfTensor:
    shape = tuple(sizes[axis] for axis in part.axes)
    slab = None
    if part.elsewhere:
        name, number, pieces = part.elsewhere
        items = (sizes["experts"],) if "{expert}" in part.name else (1,) if part.name.endswith("[0]") else ()
        whole = (*items, pieces * shape[0], *shape[1:])
        slab = Slab(name.format(layer=layer), whole, (expert * pieces + number) * prod(shape))
    return HfTensor(part.name.format(layer=layer, expert=expert), shape, slab)
