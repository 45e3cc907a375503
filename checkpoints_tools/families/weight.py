"""Which Hugging Face tensors a Megatron tensor is made of, and which models and layers have it.

One `Weight` is one Megatron tensor. Both directions, the comparison and the parameter counts read them;
nothing else knows a name of a weight. Megatron stacks the tensors of all layers, and of all experts, under
one key, along leading axes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

AS_IS, QKV, QKV_ROWS, VOCABULARY = "as_is", "qkv", "qkv_rows", "vocabulary"
QUERY_HALVES, KEY_HALVES = "query_halves", "key_halves"
TURNED, TURNED_PAIRS, PAIRS = "turned", "turned_pairs", "pairs"  # of an expert
Condition = Callable[[Mapping[str, Any]], bool]  # of Megatron's arguments
LayerCondition = Callable[[Mapping[str, Any], int], bool]  # and of the layer's number, from 0 on


class Place(NamedTuple):
    """Where else a tensor may be: the `number`-th of so many equal pieces (`pieces`) of another, along rows.

    Of a tensor of all experts, each expert's piece is so divided.
    """

    name: str
    number: int = 0
    pieces: int = 1


class Part(NamedTuple):
    """A Hugging Face tensor. `axes` name its sizes, see `chunks.axis_sizes`.

    With `{expert}` in its name it is one of each expert. `NAME[{expert}]` is never stored by itself, but is
    an expert's of NAME (`elsewhere`), which holds those of all experts of a layer; `NAME[0]` the only item of
    NAME.
    """

    name: str
    axes: tuple[str, ...]
    elsewhere: Place | None = None


class Weight(NamedTuple):
    """A Megatron tensor. AS_IS parts lie one after the other along rows; the others: `layouts.py`.

    Attributes:
        split_axis: the axis, counted without layers and experts, that tensor parallelism cuts.
        only_with: Megatron's argument that a model with this tensor sets, or what its arguments must be;
            None: every model has it.
        only_in: the layers that have it; None: all. If a layer of the model lacks a tensor that others have,
            Megatron stacks no tensor of its layers: each has keys of its own.
        may_be_float32: where it is float32 it stays so, beside others of another dtype.
    """

    key: str
    parts: tuple[Part, ...]
    layout: str = AS_IS
    split_axis: int | None = None
    only_with: str | Condition | None = None
    only_in: LayerCondition | None = None
    may_be_float32: bool = False

    def belongs_to(self, args: Mapping[str, Any]) -> bool:
        """Whether a model with these arguments has the tensor, in one layer at least."""
        if self.only_with is None or isinstance(self.only_with, str):
            return self.only_with is None or bool(args.get(self.only_with))
        return self.only_with(args)

    def is_in(self, args: Mapping[str, Any], layer: int) -> bool:
        """Whether the layer has the tensor, of a model that has it."""
        return self.only_in is None or self.only_in(args, layer)


def norms_before(args: Mapping[str, Any]) -> bool:
    """Whether what attention and MLP read is normalised."""
    return (args.get("norm_placement") or "before") in ("before", "both")


def norms_after(args: Mapping[str, Any]) -> bool:
    """Whether what attention and MLP return is normalised, before the residual sum."""
    return args.get("norm_placement") in ("after", "both")


def norm_of_mlp(args: Mapping[str, Any]) -> bool:
    """Whether the MLP has a norm of its own before it, and not that of the attention beside it."""
    return norms_before(args) and not args.get("parallel_mlp")


def any_of(*names: str) -> Condition:
    """Whether one of these arguments is set."""
    return lambda args: any(args.get(name) for name in names)


def both(first: Condition, second: Condition) -> Condition:
    """Whether both hold."""
    return lambda args: first(args) and second(args)


def norms_have_biases(args: Mapping[str, Any]) -> bool:
    """Whether the norms of layers are LayerNorm with a bias."""
    return args["normalization"] == "LayerNorm" and args.get("norm_bias") is not False


def qk_norm_of(span: str) -> Condition:
    """Whether queries and keys are normalised over this: a "head", or "all_heads" of a token."""
    return lambda args: bool(args.get("qk_layernorm")) and (args.get("qk_layernorm_span") or "head") == span
