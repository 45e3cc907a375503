"""Choosing the next token of every row of a step, in one batch on the device of the logits.

A token is where a random number between 0 and 1 falls in the cumulative distribution of its row. That number
is a hash of the request's seed and of the token's index in its answer: no generator has a state.

Probabilities are integers: exp((logit - largest) / temperature) in units of 2^-40. A sum of integers is the
same in any order. So a token depends on its own row alone, however a device adds up one row or many, and a
few hundred candidates give the very token that sorting the vocabulary does.

Rules change logits first (`ruled_logits.py`); then come temperature, min_p, top_k and top_p, in this order.
Log-probabilities are of the logits as they were, at temperature 1.

    logits          [rows, vocab_size], float32
    weights         [rows, tokens], int64: probabilities that do not add up to one
    cumulative      [rows, tokens], int64: of weights
"""

import hashlib
import math
from collections.abc import Sequence
from itertools import batched, chain
from typing import NamedTuple, Self

import torch
from torch import Tensor

from megatron_star.engine.row_to_sample import Choice, RowToSample
from megatron_star.engine.ruled_logits import RowsWithRules

UNIT = 2.0**40
FEWEST_CANDIDATES = 512
"""Of the most likely tokens, so many are looked at first for top_k and top_p."""
MORE_CANDIDATES = 16
"""So many times as many are looked at for rows that keep more than these."""
MOST_LOGITS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 24}
"""A CPU's cache holds what is made of them; on a GPU it takes some hundred MiB."""


def uniform(seed: int, index: int) -> float:
    """The random number, at least 0 and below 1, of the token at this index of an answer with this seed."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def sample_rows(logits: Tensor, rows: Sequence[RowToSample]) -> list[Choice]:
    """Choose a token for each row of logits [len(rows), vocab_size], float32, on any device.

    There is one copy to the device and one back; one more of each where a row keeps uncommonly many tokens.
    """
    assert len(logits) == len(rows)
    at_once = max(1, MOST_LOGITS_AT_ONCE[logits.device.type] // logits.size(1))
    parts = zip(batched(rows, at_once), logits.split(at_once), strict=False)  # no rows are one part of logits
    return list(chain.from_iterable(_sample(part, its, FEWEST_CANDIDATES) for its, part in parts))


def _sample(logits: Tensor, rows: Sequence[RowToSample], num_candidates: int) -> list[Choice]:
    """`sample_rows`, where top_k and top_p look at so many of the most likely tokens first."""
    largest, likeliest = logits.max(-1, keepdim=True)
    tokens, is_possible, is_certain = _draw(logits, likeliest, rows, num_candidates)
    total = _weights(logits, largest, math.log2(math.e)).sum(-1, keepdim=True) / UNIT
    normaliser = total.log().double() + largest
    # The sum of both is finite if no logit is infinite or no number: the largest and the smallest show it.
    is_finite = (largest.double() + logits.amin(-1, keepdim=True)).isfinite()
    logprobs = logits.gather(1, tokens) - normaliser
    results = torch.cat([tokens, logprobs, is_finite, is_possible, is_certain | ~is_finite], dim=1)
    results, tops = _to_host(results, _top_logprobs(logits, normaliser, rows))
    tops = iter(tops)
    choices = [
        Choice(
            int(token),
            logprob,
            tuple(next(tops)[: row.num_top_logprobs]) if row.num_top_logprobs else (),
            is_finite=bool(finite),
            is_possible=bool(possible),
        )
        for row, (token, logprob, finite, possible, _) in zip(rows, results, strict=True)
    ]
    if left := [i for i, result in enumerate(results) if not result[4]]:
        again = _sample(logits[left], [rows[i] for i in left], num_candidates * MORE_CANDIDATES)
        for i, choice in zip(left, again, strict=True):
            choices[i] = choice
    return choices


def _top_logprobs(logits: Tensor, normaliser: Tensor, rows: Sequence[RowToSample]) -> Tensor:
    """Of those rows that ask, [rows, tokens, 2]: the likeliest tokens and their log-probabilities, float64.

    There are as many as any row asks for. Tokens that are as likely come in the order of their ids.
    """
    asking = [i for i, row in enumerate(rows) if row.num_top_logprobs]
    if not asking:
        return normaliser.new_empty(0, 0, 2)
    count = min(max(rows[i].num_top_logprobs for i in asking), logits.size(1))
    logits, normaliser = (torch.stack([of_rows[i] for i in asking]) for of_rows in (logits, normaliser))
    # Of positive floats, the bits are in the same order; adding zero leaves no negative zero.
    bits = (logits + 0.0).view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    ids = (order - torch.arange(logits.size(1), device=logits.device)).topk(count).indices
    return torch.stack([ids, logits.gather(1, ids) - normaliser], dim=-1)


def _to_host(results: Tensor, tops: Tensor) -> tuple[list[list[float]], list[list[tuple[int, float]]]]:
    """Both, in one copy."""
    flat = torch.cat([results.flatten(), tops.flatten()]).tolist()
    of_rows = [list(numbers) for numbers in batched(flat[: results.numel()], results.size(1))]
    pairs = [(int(token), value) for token, value in batched(flat[results.numel() :], 2)]
    return of_rows, [list(its) for its in batched(pairs, max(1, tops.size(1)))]


class _Drawn(NamedTuple):
    """Rows that are drawn in the same way, on the device: [rows, 1] each but the first.

    Attributes:
        places: [rows] which of all rows they are, int64.
        scale: what logits are multiplied by to be powers of two at the row's temperature, float32.
        random: float64.
        top_k: int64, 0 is off.
        top_p: float64, 1 is off.
        min_p: float32, as a power of two; minus infinity is off.
    """

    places: Tensor
    scale: Tensor
    random: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def of_numbers(cls, numbers: Tensor) -> Self:
        """Of what `_numbers` wrote, [6 * rows], float64."""
        places, scale, random, top_k, top_p, min_p = numbers.view(6, -1, 1)
        return cls(places[:, 0].long(), scale.float(), random, top_k.long(), top_p, min_p.float())

    def rows_of(self, logits: Tensor) -> Tensor:
        """These rows of the logits of all; no copy if they are all."""
        return logits if len(self.places) == len(logits) else logits.index_select(0, self.places)

    def likely_of(self, logits: Tensor) -> Tensor:
        """These rows of the logits of all, without tokens that min_p leaves out."""
        logits = self.rows_of(logits)
        powers = (logits - logits.amax(-1, keepdim=True)) * self.scale
        return logits.masked_fill(powers < self.min_p, -math.inf)


def _numbers(rows: Sequence[RowToSample], places: Sequence[int]) -> list[float]:
    chosen = [rows[i] for i in places]
    return [
        *places,
        *(_scale(row.sampling.temperature) for row in chosen),
        *(row.random for row in chosen),
        *(row.sampling.top_k for row in chosen),
        *(row.sampling.top_p or 1.0 for row in chosen),
        *(math.log2(row.min_p) if row.min_p else -math.inf for row in chosen),
    ]


def _scale(temperature: float) -> float:
    """Within what float32 holds: neither zero times it nor minus infinity times it is no number."""
    return min(max(math.log2(math.e) / temperature, 2.0**-100), 2.0**100)


def _draw(
    logits: Tensor, likeliest: Tensor, rows: Sequence[RowToSample], num_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row a token, whether there is one, and whether so many candidates were enough, [rows, 1] each.

    likeliest: [rows, 1], whatever rules say.
    """
    plain = [i for i, row in enumerate(rows) if row.is_drawn and not row.is_filtered]
    filtered = [i for i, row in enumerate(rows) if row.is_filtered]
    ruled = RowsWithRules(rows)
    tokens = likeliest
    is_possible = is_certain = torch.ones_like(likeliest, dtype=torch.bool)
    if not (plain or filtered or ruled):
        return tokens, is_possible, is_certain
    numbers = [_numbers(rows, plain), _numbers(rows, filtered), *ruled.numbers()]
    plain_numbers, filtered_numbers, *ruled_numbers = _to_device(numbers, logits.device)
    if ruled:
        logits = ruled.apply(logits, ruled_numbers)
        largest, tokens = logits.max(-1, keepdim=True)
        is_possible = ~largest.isneginf()
    if plain:
        drawn = _Drawn.of_numbers(plain_numbers)
        left = (drawn.likely_of if any(rows[i].min_p for i in plain) else drawn.rows_of)(logits)
        tokens = tokens.index_copy(0, drawn.places, _draw_from_all(left, drawn))
    if filtered:
        drawn = _Drawn.of_numbers(filtered_numbers)
        left = (drawn.likely_of if any(rows[i].min_p for i in filtered) else drawn.rows_of)(logits)
        found, enough = _draw_from_candidates(left, drawn, num_candidates)
        tokens = tokens.index_copy(0, drawn.places, found)
        is_certain = is_certain.index_copy(0, drawn.places, enough)
    return tokens, is_possible, is_certain


def _to_device(numbers: Sequence[Sequence[float]], device: torch.device) -> Sequence[Tensor]:
    """Each list as a tensor, float64; all in one copy, for which nobody waits."""
    flat = torch.tensor(
        list(chain.from_iterable(numbers)), dtype=torch.float64, pin_memory=device.type == "cuda"
    )
    return flat.to(device, non_blocking=True).split([len(part) for part in numbers])


def _weights(logits: Tensor, largest: Tensor, scale: Tensor | float) -> Tensor:
    """2 to the power of (logits - largest) * scale, in units."""
    return (logits - largest).mul_(scale).exp2_().mul_(UNIT).long()


def _first_beyond(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first place where more than the target [rows, 1], int64, is reached; the last if nowhere."""
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.size(1) - 1)


def _share(total: Tensor, share: Tensor) -> Tensor:
    """A share, at least 0 and at most 1, of totals [rows, 1], int64; always less than all."""
    return torch.minimum((total * share).long(), total - 1)


def _draw_from_all(logits: Tensor, drawn: _Drawn) -> Tensor:
    """Tokens [rows, 1], in the order of their ids."""
    cumulative = _weights(logits, logits.amax(-1, keepdim=True), drawn.scale).cumsum(-1)
    return _first_beyond(cumulative, _share(cumulative[:, -1:], drawn.random))


def _draw_from_candidates(logits: Tensor, drawn: _Drawn, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Tokens [rows, 1], in the order of falling logits, and whether sorting all tokens is sure to give them.

    As in Megatron's sampling, top_k keeps all that are as likely as the last of the k, and top_p each token
    before which no more than top_p is reached.
    """
    values, ids = _candidates(logits, num_candidates)
    least, cumulative = values[:, -1:], _weights(values, values[:, :1], drawn.scale).cumsum(-1)
    kth = values.gather(1, (drawn.top_k - 1).clamp(0, values.size(1) - 1))
    num_kept = (values >= kth).sum(-1, keepdim=True)
    of_all = _weights(logits, values[:, :1], drawn.scale).sum(-1, keepdim=True)
    total = torch.where(drawn.top_k > 0, cumulative.gather(1, (num_kept - 1).clamp(min=0)), of_all)
    last = _first_beyond(cumulative, _share(total, drawn.top_p))
    needed = torch.where(drawn.top_k > 0, kth, values.gather(1, last))
    place = _first_beyond(cumulative, _share(cumulative.gather(1, last), drawn.random))
    # All that are more likely than the least candidate are candidates; of those as likely, some are not.
    enough = (needed > least) | least.isneginf() | (num_candidates >= logits.size(1))
    return ids.gather(1, place), enough


def _candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logits and ids of the most likely tokens, so many or all: falling logits, equal ones by rising id."""
    if count >= logits.size(1):
        return logits.sort(dim=-1, descending=True, stable=True)
    values, ids = logits.topk(count, sorted=False)
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)
