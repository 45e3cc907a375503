"""Context encoding: the CP ranks run a plan, wave by wave, and keep the KV of the tokens that they own.

Shapes: sq packed tokens of this rank in this wave, b = 1.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_star.algorithm.kv_store import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.merge import PartialSum
from megatron_star.attention.partial import Partial
from megatron_star.model.attention import ForwardPass, LayerAttention, PassIsComplete
from megatron_star.planning.plan import ContextPlan, Segment, Wave
from megatron_star.planning.reads import wave_reads


def encode_context(
    star_model: StarModel,
    token_ids: Sequence[int],
    plan: ContextPlan,
    on_wave: Callable[[int], None] = lambda num_tokens: None,
) -> EncodedContext:
    """Encode a context by its plan.

    Args:
        token_ids: the whole context, on every rank.
        on_wave: called after each wave with the number of context tokens that it encoded, on all ranks.
    """
    assert len(token_ids) == plan.num_tokens
    context = EncodedContext(plan, star_model.exchange.cp_rank)
    for wave in plan.waves:
        encode_wave(star_model, token_ids, wave, context)
        on_wave(sum(segment.num_tokens for segment in wave))
    return context


def encode_wave(star_model: StarModel, token_ids: Sequence[int], wave: Wave, context: EncodedContext) -> None:
    """One forward pass over this rank's segments of a wave; a rank that owns none only takes part."""
    encoding = ContextEncodingPass(star_model, wave, context)
    star_model.forward([token_ids[position] for position in encoding.positions], encoding)


class ContextEncodingPass(ForwardPass):
    """Each segment attends causally to itself and fully to its sources."""

    def __init__(self, star_model: StarModel, wave: Wave, context: EncodedContext) -> None:
        rank = star_model.exchange.cp_rank
        self.segments = tuple(segment for segment in wave if segment.owner == rank)
        # Megatron's attention cannot reshape an empty batch: a rank without segments runs one filler token,
        # which attends to nothing and is not stored.
        self.positions = [position for segment in self.segments for position in _positions(segment)] or [0]
        super().__init__(torch.tensor(self.positions, dtype=torch.int64, device=star_model.device))
        self.reads = wave_reads(context.plan, wave, rank)
        self.num_layers: int = star_model.model.config.num_layers
        self.context, self.exchange, self.kernel = context, star_model.exchange, star_model.kernel

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """The algorithm of context encoding for one layer; see `ForwardPass.attend`."""
        self._store(layer.number, key, value)
        if layer.number == self.num_layers:
            raise PassIsComplete  # of the last layer, only the KV is wanted
        transfers = self.exchange.broadcast_sources(
            [read.source for read in self.reads if read.crosses_ranks],
            lambda source: self.context.read(layer.number, source),
            like=key,
        )
        partials = PartialSum(query)
        for start, end in self._rows():
            rows = slice(start, end)
            own = self.kernel(
                query[rows], key[rows], value[rows], causal=True, softmax_scale=layer.softmax_scale
            )
            partials.set_rows(start, end, own)
        for read in self.reads:
            received = transfers.receive() if read.crosses_ranks else None
            for start, end in read.rows:
                source_kv = received or self.context.read(layer.number, read.source)
                part = self.kernel(
                    query[start:end], *source_kv, causal=False, softmax_scale=layer.softmax_scale
                )
                partials.add_rows(start, end, part)
        return partials.merged()

    def _store(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Keep the KV of the segments, without the anchor copies in front of them."""
        for segment, (start, end) in zip(self.segments, self._rows(), strict=True):
            kept = slice(start + segment.recomputed, end)
            self.context.store(layer_number, segment.start, key[kept], value[kept])

    def _rows(self) -> list[tuple[int, int]]:
        """Packed rows of each segment, its anchor copy included."""
        rows, start = [], 0
        for segment in self.segments:
            end = start + segment.num_rows
            rows.append((start, end))
            start = end
        return rows


def _positions(segment: Segment) -> list[int]:
    """Positions of a segment's rows. The anchor copy is encoded at the anchor's own positions."""
    return [*range(segment.recomputed), *range(segment.start, segment.end)]
