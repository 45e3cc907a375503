"""What a step of token generation reads that is new with each step: integers, in one copy to the device.

The host writes them into one pinned tensor; what is on the device are views of its copy. So nothing else in a
step waits for the host, and a recorded step (`signature`) only needs these integers anew.

Shapes: rows of a step, of which the last may be fillers; segments as in `attention/triton_tails.py`.
"""

import importlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from types import ModuleType
from typing import NamedTuple, Self
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.kv_pieces import pieces_within
from megatron_star.algorithm.tail import LayerKind, Tail, addresses_of
from megatron_star.attention.tail_rows import TailRows
from megatron_star.model.attention import LayerAttention
from megatron_star.planning.layer_mask import LayerMask

MOST_ROWS = 32
"""New tokens of a sequence that attend to its tail row by row: with more, it is better to read keys once for
many rows."""

LEAST_OF_MOST_KEYS = 512
"""Tails of so many tokens or fewer have the same signature."""


class FedSequence(NamedTuple):
    """One sequence's part of a step.

    Attributes:
        tail: None where it is on another rank.
        num_tail_tokens: before this step.
    """

    context: EncodedContext
    tail: Tail | None
    num_tail_tokens: int
    token_ids: Sequence[int]

    @property
    def position(self) -> int:
        """Of its first row."""
        return self.context.plan.num_tokens + self.num_tail_tokens


class KindFields[Array: (np.ndarray, Tensor)](NamedTuple):
    """Of a kind of layer: slots [rows], spans [rows, segments, 2] and bases [layers, rows, segments, 2]."""

    slots: Array
    spans: Array
    bases: Array


class StepShape(NamedTuple):
    """The sizes of a step's inputs, and what the host knows of their values.

    Attributes:
        segments: of each kind of layer.
        most_keys: that a row can see in a layer of each kind before a buffer grows.
    """

    num_rows: int
    num_logit_rows: int
    segments: tuple[int, ...] = ()
    most_keys: tuple[int, ...] = ()

    def sizes(self, kinds: Sequence[LayerKind]) -> list[tuple[int, ...]]:
        """Of the parts of `StepFields`."""
        rows = self.num_rows
        sizes: list[tuple[int, ...]] = [(rows,), (rows,), (rows,), (self.num_logit_rows,)]
        for kind, segments in zip(kinds, self.segments, strict=True):
            sizes += [(rows,), (rows, segments, 2), (len(kind.layers), rows, segments, 2)]
        return sizes


class StepFields[Array: (np.ndarray, Tensor)]:
    """Names for the parts of one flat array or tensor of int64.

    Attributes:
        token_ids, position_ids: [rows].
        long_rows: [rows], 1 where longrope's long factors count.
        logit_rows: the rows whose logits are wanted.
        kinds: of each kind of layer.
    """

    def __init__(self, flat: Array, shape: StepShape, kinds: Sequence[LayerKind]) -> None:
        parts, offset = [], 0
        for size in shape.sizes(kinds):
            count = prod(size)
            parts.append(flat[offset : offset + count].reshape(size))
            offset += _even(count)
        self.token_ids, self.position_ids, self.long_rows, self.logit_rows = parts[:4]
        self.kinds = [KindFields(*parts[i : i + 3]) for i in range(4, len(parts), 3)]


def _even(count: int) -> int:
    """So that every part begins at a multiple of 16 bytes, for which kernels are compiled."""
    return count + count % 2


@dataclass(frozen=True)
class TailLayers:
    """A model's layers, as far as `attention/triton_tails.py` has to know them.

    Attributes:
        kinds: layers with the same mask; none where attention cannot go over addresses.
        softcap: of attention scores.
        kernels: that module.
    """

    kinds: tuple[LayerKind, ...]
    softcap: float | None
    kernels: ModuleType

    @classmethod
    def of(cls, layers: Iterable[LayerAttention], softcap: float | None) -> Self:
        """Of these layers; latent attention goes over no addresses."""
        numbers: dict[LayerMask | None, list[int]] = {}
        for layer in layers:
            if layer.latent is None:
                numbers.setdefault(layer.mask, []).append(layer.number)
        kinds = tuple(LayerKind(mask, tuple(of_mask)) for mask, of_mask in numbers.items())
        # Triton comes with torch's CUDA builds; elsewhere it may be missing.
        return cls(kinds, softcap, importlib.import_module("megatron_star.attention.triton_tails"))

    def has_tables_for(self, fed: Sequence[FedSequence]) -> bool:
        """Whether a step's attention to tails goes over addresses: not before all tails have begun, and not
        with so many new tokens of a sequence that each should not read all of the tail for itself.

        The same on all ranks, also on those without a tail.
        """
        return bool(self.kinds) and all(
            one.num_tail_tokens and len(one.token_ids) <= MOST_ROWS for one in fed
        )

    @cached_property
    def _contexts(self) -> "WeakKeyDictionary[EncodedContext, list[ContextPieces]]":
        return WeakKeyDictionary()

    def pieces_of(self, context: EncodedContext) -> list["ContextPieces"]:
        """What this rank holds for layers with masks of their own, of each kind; looked up once."""
        if context not in self._contexts:
            self._contexts[context] = [_pieces_of(context, kind) for kind in self.kinds]
        return self._contexts[context]


class ContextPieces(NamedTuple):
    """Of a kind of layer: positions [start, end) of each piece, and addresses [layers, pieces, 2]."""

    edges: list[tuple[int, int]]
    addresses: np.ndarray


def _pieces_of(context: EncodedContext, kind: LayerKind) -> ContextPieces:
    if kind.mask is None:
        return ContextPieces([], np.zeros((len(kind.layers), 0, 2), dtype=np.int64))
    end = context.plan.num_tokens
    of_layers = [pieces_within(context.recent(layer), kind.mask.kept_from(end), end) for layer in kind.layers]
    addresses = [[addresses_of(piece[2:]) for piece in pieces] for pieces in of_layers]
    array = np.array(addresses, dtype=np.int64).reshape(len(kind.layers), -1, 2)
    return ContextPieces([(piece.start, piece.end) for piece in of_layers[0]], array)


class StepInputs:
    """Written on the host; on the device as soon as it is asked for.

    Attributes:
        num_fed: rows that are not fillers.
        has_tables: whether attention to tails goes over addresses, which are in the inputs then.
        runs: contexts side by side, weakly, and how many rows attend to each; fillers to the last one.
        signature: equal for steps in which Python does the same, as long as the model is, and `num_fed` where
            it has experts: what was recorded with the inputs of one of them runs another after `refill`.
            Their contexts are the same objects.
        host: all inputs, [n], int64, pinned where there is a GPU.
    """

    def __init__(
        self,
        layers: TailLayers,
        fed: Sequence[FedSequence],
        logit_rows: Sequence[int],
        device: torch.device,
        size: tuple[int, int],
    ) -> None:
        """
        Args:
            fed: in the order of their rows; those that share a context side by side.
            size: rows and logit rows with the fillers behind them; there are no filling rows where attention
                goes over no addresses.
        """
        self.device, self.num_fed = device, sum(len(one.token_ids) for one in fed)
        self.has_tables = layers.has_tables_for(fed)
        self.kinds = layers.kinds if self.has_tables else ()
        for one in fed:
            if one.tail and self.has_tables:
                one.tail.make_room(self.kinds, one.num_tail_tokens, len(one.token_ids))
        pieces = [layers.pieces_of(one.context) for one in fed] if self.has_tables else []
        self.shape = StepShape(
            size[0] if self.has_tables else self.num_fed,
            size[1],
            tuple(1 + max(len(of[k].edges) for of in pieces) for k in range(len(self.kinds))),
            tuple(_most_keys(kind, fed) for kind in self.kinds),
        )
        self.runs = _weak_runs(fed, self.shape.num_rows - self.num_fed)
        self.signature: Hashable = self.shape, self.runs, self.has_tables
        size = sum(_even(prod(size)) for size in self.shape.sizes(self.kinds))
        self.host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._write(fed, logit_rows, pieces)

    @cached_property
    def tensor(self) -> Tensor:
        """`host` on the device."""
        return self.host.to(self.device, non_blocking=True)

    @cached_property
    def fields(self) -> StepFields[Tensor]:
        """Views of `tensor`."""
        return StepFields(self.tensor, self.shape, self.kinds)

    @cached_property
    def of_layers(self) -> dict[int, TailRows]:
        """What kernels read of each layer: views of `tensor`."""
        return {
            number: TailRows(fields.slots, fields.spans, bases, most_keys)
            for kind, fields, most_keys in zip(
                self.kinds, self.fields.kinds, self.shape.most_keys, strict=True
            )
            for number, bases in zip(kind.layers, fields.bases.unbind(0), strict=True)
        }

    def refill(self, other: Self) -> None:
        """Take the values of other inputs with the same signature, on the device."""
        assert other.signature == self.signature
        self.tensor.copy_(other.host, non_blocking=True)

    def _write(
        self,
        fed: Sequence[FedSequence],
        logit_rows: Sequence[int],
        pieces: Sequence[Sequence[ContextPieces]],
    ) -> None:
        fields: StepFields[np.ndarray] = StepFields(self.host.numpy(), self.shape, self.kinds)
        fields.logit_rows[: len(logit_rows)] = logit_rows
        for kind in fields.kinds:
            kind.slots[:] = -1
        start = 0
        for i, one in enumerate(fed):
            rows = slice(start, start + len(one.token_ids))
            fields.token_ids[rows] = one.token_ids
            fields.position_ids[rows] = range(one.position, one.position + len(one.token_ids))
            fields.long_rows[rows] = one.context.is_long
            for k, kind in enumerate(self.kinds):
                slots, spans, bases = fields.kinds[k]
                of_rows = KindFields(slots[rows], spans[rows], bases[:, rows])
                if one.tail:
                    _write_tail(of_rows, kind, one, one.tail)
                if pieces[i][k].edges:
                    _write_pieces(of_rows, kind, one, pieces[i][k])
            start = rows.stop


def _write_tail(rows: KindFields[np.ndarray], kind: LayerKind, fed: FedSequence, tail: Tail) -> None:
    """What a sequence's rows see of its tail, in the layers of a kind."""
    tail_start = fed.context.plan.num_tokens
    buffer_start = tail_start + tail.start_of_buffer(kind)
    rows.bases[:, :, 0] = tail.addresses(kind)[:, None]
    for row, position in enumerate(range(fed.position, fed.position + len(fed.token_ids))):
        first = max(tail_start, kind.mask.first_seen(position)) if kind.mask else tail_start
        rows.slots[row] = position - buffer_start
        rows.spans[row, 0] = first - buffer_start, position + 1 - first


def _write_pieces(
    rows: KindFields[np.ndarray], kind: LayerKind, fed: FedSequence, pieces: ContextPieces
) -> None:
    """What they see of the end of their context."""
    rows.bases[:, :, 1 : 1 + len(pieces.edges)] = pieces.addresses[:, None]
    for row in range(len(fed.token_ids)):
        seen_from = kind.mask.first_seen(fed.position + row)
        for segment, (start, end) in enumerate(pieces.edges, start=1):
            first = min(end, max(start, seen_from))
            rows.spans[row, segment] = first - start, end - first


def _weak_runs(fed: Sequence[FedSequence], num_fillers: int) -> tuple[tuple[ref[EncodedContext], int], ...]:
    """See `StepInputs.runs`."""
    runs = [list(run) for _, run in groupby(fed, key=lambda one: id(one.context))]
    sizes = [sum(len(one.token_ids) for one in run) for run in runs]
    sizes[-1] += num_fillers
    return tuple((ref(run[0].context), size) for run, size in zip(runs, sizes, strict=True))


def _most_keys(kind: LayerKind, fed: Sequence[FedSequence]) -> int:
    """A power of two, so that not every growth of a buffer makes another signature."""
    if kind.mask:
        return kind.mask.size
    room = max((one.tail.end_of_buffer(kind) for one in fed if one.tail), default=0)
    return max(LEAST_OF_MOST_KEYS, 1 << (room - 1).bit_length())
