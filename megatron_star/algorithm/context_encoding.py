"""Context encoding: the CP ranks run a plan, wave by wave, and keep the KV of the tokens that they own.

Shapes: sq packed tokens of this rank in this wave, b = 1.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_star.algorithm.bands import set_band
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.kv_pieces import KvPiece, pieces_within, whole
from megatron_star.algorithm.passed_keys import PassedKeys
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_scores import ScoredRows
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.attention.merge import PartialSum
from megatron_star.attention.partial import Partial
from megatron_star.model.attention import ForwardPass, LayerAttention, PassIsComplete
from megatron_star.parallel.exchange import SourceTransfers
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.plan import ContextPlan, Segment, Source, Wave
from megatron_star.planning.reads import Read, wave_reads
from megatron_star.planning.scoring import Scoring, offsets_in_wave, tokens_after


def encode_context(
    star_model: StarModel,
    token_ids: Sequence[int],
    plan: ContextPlan,
    on_wave: Callable[[int], None] = lambda num_tokens: None,
    *,
    keeps_all: bool = False,
    is_long: bool = False,
) -> EncodedContext:
    """Encode a context by its plan.

    Args:
        token_ids: the whole context, on every rank.
        on_wave: called after each wave with the number of context tokens that it encoded, on all ranks.
        keeps_all, is_long: see `EncodedContext`.
    """
    assert len(token_ids) == plan.num_tokens
    context = EncodedContext(
        plan,
        star_model.exchange.cp_rank,
        keeps_all=keeps_all,
        is_long=is_long,
        kv_format=star_model.kv_format,
    )
    for wave in plan.waves:
        encode_wave(star_model, token_ids, wave, context)
        on_wave(sum(segment.num_tokens for segment in wave))
    return context


def encode_wave(star_model: StarModel, token_ids: Sequence[int], wave: Wave, context: EncodedContext) -> None:
    """One forward pass over this rank's segments of a wave; a rank that owns none only takes part."""
    encoding = ContextEncodingPass(star_model, wave, context)
    star_model.forward([token_ids[position] for position in encoding.positions], encoding)


def score_wave(
    star_model: StarModel, token_ids: Sequence[int], wave: Wave, context: EncodedContext, scoring: Scoring
) -> Tensor:
    """`encode_wave`, and the scores of what follows each token of the wave.

    Returns:
        [tokens of the wave, columns], float64 on the CPU (`token_scores`), in the order of the wave: zero for
        what other ranks have encoded, so that the sum over the CP ranks has all. Where nothing follows, the
        score means nothing.
    """
    encoding = ContextEncodingPass(star_model, wave, context, is_scored=True)
    kept = encoding.kept_rows()
    rows = [row for _, its in kept for row in range(its.start, its.stop)]
    positions = [position for segment, _ in kept for position in range(segment.start, segment.end)]
    tokens = [max(0, token) for token in tokens_after(token_ids, positions, scoring)]
    scored = ScoredRows(star_model.on_device(rows), star_model.on_device(tokens), scoring.num_top)
    own = star_model.score([token_ids[position] for position in encoding.positions], encoding, scored)
    offsets = offsets_in_wave(wave)
    scores = torch.zeros(sum(segment.num_tokens for segment in wave), own.size(1), dtype=torch.float64)
    for (segment, _), its in zip(kept, own.cpu().split([s.num_tokens for s, _ in kept]), strict=True):
        scores[offsets[segment.start] :][: segment.num_tokens] = its
    return scores


class ContextEncodingPass(ForwardPass):
    """Each segment attends causally to itself, and fully to its sources and to what is passed to it."""

    def __init__(
        self, star_model: StarModel, wave: Wave, context: EncodedContext, *, is_scored: bool = False
    ) -> None:
        """is_scored: the last layer's output is wanted, too, and not only its KV."""
        rank = star_model.exchange.cp_rank
        self.is_scored = is_scored
        self.segments = tuple(segment for segment in wave if segment.owner == rank)
        # Megatron's attention cannot reshape an empty batch: a rank without segments runs one filler token,
        # which attends to nothing and is not stored.
        self.is_filler = not self.segments
        self.positions = [position for segment in self.segments for position in _positions(segment)] or [0]
        positions = torch.tensor(self.positions, dtype=torch.int64, device=star_model.device)
        super().__init__(positions, (context.is_long,))
        self.wave = wave
        self.num_layers: int = star_model.model.config.num_layers
        self.context, self.exchange, self.kernel = context, star_model.exchange, star_model.kernel
        self.passed = PassedKeys(context, wave, self.exchange, star_model.device)
        self._reads: dict[LayerMask | None, tuple[Read, ...]] = {}

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """The algorithm of context encoding for one layer; see `ForwardPass.attend`."""
        if layer.mask:
            return self._attend_in_bands(layer, layer.mask, query, key, value)
        self._store(layer.number, key, value)
        if layer.number == self.num_layers and not self.is_scored:
            raise PassIsComplete  # of the last layer, only the KV is wanted
        self._keep_exact(layer.number, key, value)
        transfers = self._transfers(
            None, lambda source: self.context.read(layer.number, source), like=(key, value)
        )
        if not self.passed.reads_first:
            self.passed.start(layer.number, (key, value))
        attention, received_pieces = layer.of_many_rows(self.kernel, query), []
        for start, end in self._rows():
            attention.set_causal(start, end, key[start:end], value[start:end])
        for read in self.reads(None):
            received = transfers.receive() if read.crosses_ranks else None
            if read.rows:
                attention.add(read.rows, *(received or self.context.read(layer.number, read.source)))
            if self.passed.reads_first and read.rows and read.source.owner != self.exchange.cp_rank:
                received_pieces.append(KvPiece(read.source.start, read.source.end, *received))
        if self.passed.reads_first:
            self.passed.start(layer.number, (key, value), received_pieces)
        for rows, passed in zip(self._rows(), self.passed.receive(), strict=True):
            if passed:
                attention.add([rows], *passed)
        self.context.forget_exact(layer.number)
        return attention.merged()

    def reads(self, mask: LayerMask | None) -> tuple[Read, ...]:
        """What this rank reads in layers with this mask, or with the plan's."""
        if mask not in self._reads:
            self._reads[mask] = wave_reads(self.context.plan, self.wave, self.exchange.cp_rank, mask)
        return self._reads[mask]

    def _transfers(
        self, mask: LayerMask | None, read: Callable[[Source], KeyValue], like: KeyValue
    ) -> SourceTransfers:
        sources = [read.source for read in self.reads(mask) if read.crosses_ranks]
        return self.exchange.broadcast_sources(sources, read, like)

    def _attend_in_bands(
        self, layer: LayerAttention, mask: LayerMask, query: Tensor, key: Tensor, value: Tensor
    ) -> Partial:
        """A layer with a mask of its own: a segment sees itself and what comes shortly before it."""
        own = [KvPiece(s.start, s.end, key[rows], value[rows]) for s, rows in self.kept_rows()]
        held = [*self.context.recent(layer.number), *own]
        if layer.number == self.num_layers and not self.is_scored:
            self.context.keep_recent(layer.number, mask, own, self.wave[-1].end)
            raise PassIsComplete
        before = self._sources_before(mask, held, like=(key, value))
        partials, attend = PartialSum(query), partial(self.kernel, softmax_scale=layer.softmax_scale)
        for segment, piece, (start, _) in zip(self.segments, own, self._rows(), strict=True):
            copy = slice(start, start + segment.recomputed)  # of the anchor, which sees nothing else
            for band in mask.bands(0, segment.recomputed):
                set_band(
                    partials, attend, band, start, [KvPiece(0, segment.recomputed, key[copy], value[copy])]
                )
            for band in mask.bands(segment.start, segment.end):
                first_row = copy.stop + band.start - segment.start
                seen = [*pieces_within(before, band.first, segment.start), piece]
                set_band(partials, attend, band, first_row, seen)
        self.context.keep_recent(layer.number, mask, own, self.wave[-1].end)
        return partials.merged()

    def _sources_before(self, mask: LayerMask, held: list[KvPiece], like: KeyValue) -> list[KvPiece]:
        """What this rank's segments see before themselves, wherever it is."""

        def read(source: Source) -> KeyValue:
            return whole(held, source.start, source.end)[2:]

        transfers = self._transfers(mask, read, like)
        pieces = []
        for source, rows, crosses_ranks in self.reads(mask):
            received = transfers.receive() if crosses_ranks else None
            if rows:
                pieces.append(KvPiece(source.start, source.end, *(received or read(source))))
        return pieces

    def _store(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Keep the KV of the segments, without the anchor copies in front of them."""
        for segment, kept in self.kept_rows():
            self.context.store(layer_number, segment.start, key[kept], value[kept])

    def _keep_exact(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Within a wave, segments and blocks are read as they were computed."""
        for segment, kept in self.kept_rows():
            self.context.keep_exact(layer_number, segment.start, key[kept], value[kept])

    def kept_rows(self) -> list[tuple[Segment, slice]]:
        """Each segment with its packed rows, without its anchor copy."""
        pairs = zip(self.segments, self._rows(), strict=True)
        return [(segment, slice(start + segment.recomputed, end)) for segment, (start, end) in pairs]

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
