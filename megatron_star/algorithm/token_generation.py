"""Token generation: new tokens of many sequences attend to the whole context and to their own tail.

Every CP rank runs all new tokens. A rank attends to the context KV that it holds; the tail of a sequence
lives on one tail rank. What each rank finds is merged over the CP group in one collective a layer.
Shapes: sq packed new tokens of all sequences, b = 1.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_star.algorithm.bands import add_in_band
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.kv_pieces import pieces_within
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.step_inputs import FedSequence, StepInputs
from megatron_star.algorithm.tail import Tail
from megatron_star.attention.merge import PartialSum
from megatron_star.attention.partial import Partial
from megatron_star.model.attention import ForwardPass, LayerAttention
from megatron_star.planning.kv_memory import MOST_PROPOSED_TOKENS
from megatron_star.planning.layer_mask import LayerMask


@dataclass
class Sequence:
    """An encoded context, and the tokens that follow it.

    Attributes:
        num_tail_tokens: query and generated tokens that went through the model.
        tail: their KV; it stays empty on all ranks but the tail rank.
    """

    context: EncodedContext
    tail_rank: int
    num_tail_tokens: int = 0
    tail: Tail = field(init=False)

    def __post_init__(self) -> None:
        self.tail = Tail(self.context)

    @property
    def num_tokens(self) -> int:
        """Of the context and of the tail: the position of the next token."""
        return self.context.plan.num_tokens + self.num_tail_tokens

    def rewind(self, num_tail_tokens: int) -> None:
        """Forget the end of the tail, as if it had never been fed: of the tokens of its last step, and
        `MOST_PROPOSED_TOKENS` at most."""
        assert self.num_tail_tokens - MOST_PROPOSED_TOKENS <= num_tail_tokens <= self.num_tail_tokens
        self.num_tail_tokens = num_tail_tokens


class NewTokens(NamedTuple):
    """At least one token that a sequence is fed in a step.

    Attributes:
        num_logits: of the last tokens whose logits are wanted; may be 0.
    """

    sequence: Sequence
    token_ids: SequenceOf[int]
    num_logits: int = 1


def generate_step(
    star_model: StarModel, new_tokens: SequenceOf[NewTokens | tuple[Sequence, SequenceOf[int]]]
) -> Tensor:
    """Feed each sequence its new tokens.

    Returns:
        Logits [sum of num_logits, vocab_size], float32, after the last `num_logits` tokens of each sequence,
        in the order given.
    """
    fed = [NewTokens(*new) for new in new_tokens]
    contexts = [id(new.sequence.context) for new in fed]
    # Side by side where they share a context, in an order that is the same on every rank.
    by_context = sorted(range(len(fed)), key=lambda i: contexts.index(contexts[i]))
    packed = [fed[i] for i in by_context]
    ends = dict(zip(by_context, (end for _, end in _row_ranges(packed)), strict=True))
    rows = [row for i, new in enumerate(fed) for row in range(ends[i] - new.num_logits, ends[i])]
    logits = _run(star_model, packed, rows)
    for new in fed:
        new.sequence.num_tail_tokens += len(new.token_ids)
    return logits


def _run(star_model: StarModel, packed: SequenceOf[NewTokens], logit_rows: SequenceOf[int]) -> Tensor:
    if star_model.tail_layers is None:
        token_ids = [token for new in packed for token in new.token_ids]
        return star_model.forward(token_ids, TokenGenerationStep(star_model, packed), logit_rows)
    inputs = step_inputs(star_model, packed, logit_rows)
    logits = star_model.run_step(inputs, partial(run_packed, star_model, packed))
    return logits[: len(logit_rows)]


def run_packed(star_model: StarModel, packed: SequenceOf[NewTokens], inputs: StepInputs) -> Tensor:
    """The forward pass of a step: logits [logit rows, vocab_size], those of fillers included."""
    step, fields = TokenGenerationStep(star_model, packed, inputs), inputs.fields
    return star_model.forward(fields.token_ids, step, fields.logit_rows)


def step_inputs(
    star_model: StarModel, packed: SequenceOf[NewTokens], logit_rows: SequenceOf[int]
) -> StepInputs:
    """What is new in a step, filled up to the size that the model wants.

    packed: sequences that share a context stand side by side.
    """
    cp_rank = star_model.exchange.cp_rank
    fed = [
        FedSequence(
            new.sequence.context,
            new.sequence.tail if new.sequence.tail_rank == cp_rank else None,
            new.sequence.num_tail_tokens,
            new.token_ids,
        )
        for new in packed
    ]
    size = star_model.step_size(sum(len(new.token_ids) for new in packed), len(logit_rows))
    return StepInputs(star_model.tail_layers, fed, logit_rows, star_model.device, size=size)


class TokenGenerationStep(ForwardPass):
    """Rows attend to their context and, causally, to their tail.

    Rows that share a context do so in one call for each context of its chain (`EncodedContext.parent`).

    Attributes:
        rows: of each sequence, where they start and end.
        runs: sequences that share a context, with their rows.
        num_rows: new tokens of all sequences.
        num_filled_rows: with the fillers that its inputs have behind them. They attend to the context of the
            last sequence, and nobody reads what comes of them.
    """

    is_replicated = True

    def __init__(
        self, star_model: StarModel, packed: SequenceOf[NewTokens], inputs: StepInputs | None = None
    ) -> None:
        """
        Args:
            packed: sequences that share a context stand side by side.
            inputs: of `step_inputs`, where they go to the device in one copy.
        """
        self.rows = _row_ranges(packed)
        pairs = zip((new.sequence for new in packed), self.rows, strict=True)
        self.runs = [list(run) for _, run in groupby(pairs, key=lambda pair: id(pair[0].context))]
        self.exchange, self.kernel = star_model.exchange, star_model.kernel
        self.tail_layers, self.inputs = star_model.tail_layers, inputs
        self.num_rows = self.rows[-1][1]
        self.num_filled_rows = inputs.shape.num_rows if inputs else self.num_rows
        if inputs:
            super().__init__(inputs.fields.position_ids, inputs.fields.long_rows)
            return
        positions = [new.sequence.num_tokens + i for new in packed for i in range(len(new.token_ids))]
        long_rows = [new.sequence.context.is_long for new in packed for _ in new.token_ids]
        super().__init__(torch.tensor(positions, dtype=torch.int64, device=star_model.device), long_rows)

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """The algorithm of token generation for one layer; see `ForwardPass.attend`."""
        return self.exchange.merge(self.attend_locally(layer, query, key, value))

    def attend_locally(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Keep this step's KV, and attend to what this rank holds; in float32."""
        if self.inputs and self.inputs.has_tables:
            return self._attend_by_addresses(layer, query, key, value)
        if layer.mask:
            return self._attend_in_bands(layer, layer.mask, query, key, value)
        number, attention = layer.number, layer.of_few_rows(self.kernel, query)
        for run in self.runs:
            (first_sequence, (start, _)), (_, (_, end)) = run[0], run[-1]
            tails = [
                (
                    sequence.tail.append(
                        number, sequence.num_tail_tokens, key[first:last], value[first:last]
                    ),
                    (first, last),
                )
                for sequence, (first, last) in run
                if sequence.tail_rank == self.exchange.cp_rank
            ]
            # A single new token sees all of its tail, which may be contiguous with the context.
            is_joined = bool(tails) and end - start == 1 and first_sequence.tail.is_contiguous(number)
            num_contiguous = len(tails[0][0][0]) if is_joined else 0
            for held in first_sequence.context.held(number, num_contiguous):
                held.add_to(attention, [(start, end)])
            if is_joined:
                continue
            for tail, (first, last) in tails:
                attention.add([(first, last)], *tail, causal=last - first > 1)
        return attention.merged()

    def _attend_by_addresses(
        self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> Partial:
        """The same in a few launches for all tails together, of whatever lengths."""
        kernels, rows = self.tail_layers.kernels, self.inputs.of_layers[layer.number]
        kernels.append_rows(key, value, rows)
        return kernels.attend_tails(
            query,
            rows,
            num_groups=key.size(2),
            value_size=value.size(3),
            softmax_scale=layer.softmax_scale,
            softcap=self.tail_layers.softcap,
            start=None if layer.mask else self._attend_to_contexts(layer, query),
        )

    def _attend_to_contexts(self, layer: LayerAttention, query: Tensor) -> Partial | None:
        """All rows, to what this rank holds of their contexts; None if it holds nothing."""
        attention = layer.of_few_rows(self.kernel, query)
        for i, run in enumerate(self.runs):
            (sequence, (start, _)), (_, (_, end)) = run[0], run[-1]
            if i == len(self.runs) - 1:
                end = self.num_filled_rows
            for held in sequence.context.held(layer.number):
                held.add_to(attention, [(start, end)])
        return attention.partials.so_far()

    def _attend_in_bands(
        self, layer: LayerAttention, mask: LayerMask, query: Tensor, key: Tensor, value: Tensor
    ) -> Partial:
        """In a layer with a mask of its own, a row sees the end of its tail and of its context, if at all."""
        partials, attend = PartialSum(query), partial(self.kernel, softmax_scale=layer.softmax_scale)
        for run in self.runs:
            held = run[0][0].context.recent(layer.number)
            for sequence, (start, end) in run:
                pieces = held
                if sequence.tail_rank == self.exchange.cp_rank:
                    new = sequence.num_tail_tokens, key[start:end], value[start:end]
                    pieces = [*held, sequence.tail.append_recent(layer.number, mask, *new)]
                first = sequence.num_tokens
                for band in mask.bands(first, first + end - start):
                    for piece in pieces_within(pieces, band.first, band.end):
                        add_in_band(partials, attend, band, start + band.start - first, piece)
        return partials.merged()


def _row_ranges(packed: SequenceOf[NewTokens]) -> list[tuple[int, int]]:
    """Where the rows of each sequence start and end."""
    ends = list(accumulate(len(new.token_ids) for new in packed))
    return list(zip([0, *ends], ends, strict=False))
