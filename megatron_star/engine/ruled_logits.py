"""Logits as the rules of their rows leave them, all rows in one batch on the device that they are on.

Tokens that may not come are left out, biases are added, then repetition, frequency and presence are
penalised: vLLM's order. What `sampling.py` does to rows that are drawn comes after it. A row's logits depend
on nothing but the row.

    logits      [rows, vocab_size], float32
"""

import math
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_star.engine.answer_rules import IN_PROMPT
from megatron_star.engine.row_to_sample import RowToSample

BITS = 32
"""Of a word of a mask."""


class RowsWithRules:
    """Those rows of a step that have rules of one kind or another, as `RowToSample` says them.

    `numbers` go to the device in one copy, together with others; `apply` takes them from there.
    """

    def __init__(self, rows: Sequence[RowToSample]) -> None:
        ruled = [(i, row) for i, row in enumerate(rows) if row.rules]
        self._biased = [(i, row.rules) for i, row in ruled if row.rules.has_bias]
        self._penalised = [(i, row) for i, row in ruled if row.rules.has_penalties]
        self._answers = list(dict.fromkeys(row.rules for _, row in self._penalised))
        self._masked = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
        self._forbidden = [(i, token) for i, row in enumerate(rows) for token in row.forbidden]
        self._proposed = [
            (place, token) for place, (_, row) in enumerate(self._penalised) for token in row.proposed
        ]

    def __bool__(self) -> bool:
        return bool(self._biased or self._penalised or self._masked or self._forbidden)

    def numbers(self) -> list[list[float]]:
        """For `apply`."""
        place_of = {answer: place for place, answer in enumerate(self._answers)}
        uncounted = [(place_of[answer], token) for answer in self._answers for token in answer.uncounted()]
        rules = [row.rules.rules for _, row in self._penalised]
        return [
            [i for i, _ in self._masked],
            [i for i, _ in self._biased],
            [i for i, _ in self._penalised],
            [place_of[row.rules] for _, row in self._penalised],
            list(chain.from_iterable(uncounted)),
            list(chain.from_iterable(self._proposed)),
            [r.repetition_penalty for r in rules]
            + [r.frequency_penalty for r in rules]
            + [r.presence_penalty for r in rules],
            list(chain.from_iterable(self._forbidden)),
        ]

    def apply(self, logits: Tensor, numbers: Sequence[Tensor]) -> Tensor:
        """The logits as rules leave them, -inf where a token may not come. `logits` stay as they are."""
        masked, biased, penalised, answers, uncounted, proposed, penalties, forbidden = numbers
        if self._biased:
            biases = torch.stack([r.bias(logits.size(1), logits.device) for _, r in self._biased])
            logits = _changed(logits, biased, lambda chosen: chosen + biases)
        if self._penalised:
            counts = self._counts(logits, answers.long(), _pairs(uncounted), _pairs(proposed))
            factors = penalties.float().view(3, -1, 1)
            logits = _changed(logits, penalised, lambda chosen: _penalised(chosen, counts, *factors))
        if self._masked:
            is_allowed = _bits(torch.stack([mask for _, mask in self._masked]), logits)
            logits = _changed(logits, masked, lambda chosen: chosen.masked_fill(~is_allowed, -math.inf))
        if self._forbidden:
            logits = logits.index_put(_pairs(forbidden), logits.new_full((), -math.inf))
        return logits

    def _counts(
        self,
        logits: Tensor,
        answers: Tensor,
        uncounted: tuple[Tensor, Tensor],
        proposed: tuple[Tensor, Tensor],
    ) -> Tensor:
        """[penalised rows, vocab_size]: `AnswerRules.counts`, of what each row has before it.

        The answers keep theirs, which end before what is proposed.

        Args:
            answers: of which each row is one.
            uncounted: answers and tokens.
            proposed: places among the penalised rows, and tokens.
        """
        counts = torch.stack([answer.counts(logits.size(1), logits.device) for answer in self._answers])
        one = counts.new_ones(())
        counts.index_put_(uncounted, one, accumulate=True)
        for answer, its_counts in zip(self._answers, counts, strict=True):
            answer.keep(its_counts)
        if len(answers) == len(counts) and not self._proposed:
            return counts
        return counts.index_select(0, answers).index_put_(proposed, one, accumulate=True)


def _changed(logits: Tensor, places: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of the rows at these places, in their order; the others as they are."""
    if len(places) == len(logits):
        return change(logits)
    places = places.long()
    return logits.index_copy(0, places, change(logits.index_select(0, places)))


def _pairs(numbers: Tensor) -> tuple[Tensor, Tensor]:
    first, second = numbers.long().view(-1, 2).T
    return first, second


def _penalised(
    logits: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """A number stays one: it becomes neither infinite, nor a token that may not come."""
    in_answer = counts & (IN_PROMPT - 1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalised = torch.where(counts > 0, repeated, logits)
    penalised = penalised - frequency * in_answer - presence * (in_answer > 0)
    largest = torch.finfo(torch.float32).max
    return torch.where(logits.isneginf(), logits, penalised.clamp_(-largest, largest))


def _bits(words: Tensor, logits: Tensor) -> Tensor:
    """Bits of masks [rows, words] on the host, as [rows, vocab_size], bool; what they do not say is 0."""
    if logits.is_cuda:
        words = words.pin_memory()
    words = words.to(logits.device, non_blocking=True)
    shifts = torch.arange(BITS, dtype=torch.int32, device=logits.device)
    bits = (words.unsqueeze(-1).bitwise_right_shift(shifts) & 1).bool().flatten(1)[:, : logits.size(1)]
    return pad(bits, (0, logits.size(1) - bits.size(1)))
