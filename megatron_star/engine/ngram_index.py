"""Where the last tokens of a text stood before: an index of all places of a text of up to a million tokens.

Each token has a key of 64 bits: a hash of the three tokens that end with it, and its place. Keys are kept in
sorted runs, so that places after the same three tokens, or the same two, stand side by side. Runs of similar
size are merged as in a log-structured merge tree. A token takes 12 bytes: 8 of the key, 4 of itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HASH_BITS = (13, 12, 12)
"""Of the last token, the one before it, and the one before that."""
PLACE_BITS = 26
MOST_INDEXED_TOKENS = 1 << PLACE_BITS
MOST_MATCHED = 32
"""Tokens by which places are told apart: of those with a longer match, the last is as good as any."""
FEWEST_MATCHED = 2
MOST_CANDIDATES = 4096
"""Places of one run that are looked at: one frequent pair may stand anywhere in a million tokens."""
SMALLEST_RUN = 64
_MULTIPLIER, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


class Match(NamedTuple):
    """So many of the last tokens stood before; `place` is that of the token that followed them there."""

    length: int
    place: int


class NgramIndex:
    """Of one text, which grows at its end. Places are those of a longer text, which it is a part of."""

    def __init__(self, start: int, capacity: int, before: Sequence[int] = ()) -> None:
        """
        Args:
            start: the place of the first token.
            capacity: tokens, at most; memory is touched as they come.
            before: what stands before the first token: matches may begin there.
        """
        self.start, self.num_tokens, self._num_sorted = start, 0, 0
        before = before[-MOST_MATCHED:]
        self._tokens = np.empty(MOST_MATCHED + capacity, dtype=np.int32)
        self._tokens[:MOST_MATCHED] = -1  # matches nothing
        self._tokens[MOST_MATCHED - len(before) : MOST_MATCHED] = before
        self._runs: list[NDArray[np.int64]] = []

    def append(self, tokens: Sequence[int]) -> None:
        """The next tokens of the text."""
        start = MOST_MATCHED + self.num_tokens
        self._tokens[start : start + len(tokens)] = tokens
        self.num_tokens += len(tokens)
        num_sorted = min(self.num_tokens, MOST_INDEXED_TOKENS)
        if num_sorted - self._num_sorted >= SMALLEST_RUN:
            self._sort_until(num_sorted)

    def longest_match(self, last: Sequence[int], end: int | None = None) -> Match | None:
        """Where the most of these tokens, the last ones included, stood before; of such places, the last.

        Args:
            last: tokens of any text, of which `MOST_MATCHED` are looked at.
            end: the place that the match ends before; all of this text is searched, unless given.

        Returns:
            None if not even the last `FEWEST_MATCHED` stand anywhere.
        """
        wanted = list(last[: -MOST_MATCHED - 1 : -1])
        end = self.num_tokens if end is None else end - self.start
        for num_tokens in range(len(HASH_BITS), FEWEST_MATCHED - 1, -1):
            if len(wanted) >= num_tokens:
                match = self._longest(self._candidates(wanted[:num_tokens], end), wanted)
                if match.length >= num_tokens:
                    return match
        return None

    def _sort_until(self, end: int) -> None:
        run = np.sort(self._keys(self._num_sorted, end))
        self._num_sorted = end
        while self._runs and self._runs[-1].size <= run.size:
            run = np.sort(np.concatenate([self._runs.pop(), run]))
        self._runs.append(run)

    def _keys(self, start: int, end: int) -> NDArray[np.int64]:
        keys = np.arange(start, end, dtype=np.int64)
        for back, shift in enumerate(_shifts()):
            rows = slice(MOST_MATCHED + start - back, MOST_MATCHED + end - back)
            hashes = self._tokens[rows].astype(np.uint64) * np.uint64(_MULTIPLIER)
            keys |= (hashes >> np.uint64(64 - HASH_BITS[back])).astype(np.int64) << shift
        return keys

    def _candidates(self, wanted: Sequence[int], end: int) -> NDArray[np.int64]:
        """Where the last of these tokens, latest first, may stand, from the text's start: their hashes do."""
        shifts = _shifts()
        hashes = (
            (token * _MULTIPLIER & _MASK) >> 64 - bits for token, bits in zip(wanted, HASH_BITS, strict=False)
        )
        first = sum(value << shift for value, shift in zip(hashes, shifts, strict=False))
        bounds = np.array([first, first + (1 << shifts[len(wanted) - 1])], dtype=np.int64)
        found = [self._in_unsorted(wanted[0])]
        for run in self._runs:
            start, stop = run.searchsorted(bounds).tolist()
            if start < stop:
                found.append(run[max(start, stop - MOST_CANDIDATES) : stop] & (MOST_INDEXED_TOKENS - 1))
        places = np.concatenate(found)
        return places[places < end]

    def _in_unsorted(self, token: int) -> NDArray[np.int64]:
        first = max(self._num_sorted, self.num_tokens - SMALLEST_RUN)
        tokens = self._tokens[MOST_MATCHED + first : MOST_MATCHED + self.num_tokens]
        return np.flatnonzero(tokens == token) + first

    def _longest(self, places: NDArray[np.int64], wanted: Sequence[int]) -> Match:
        length = 0
        for back, token in enumerate(wanted):
            same = places[self._tokens[MOST_MATCHED + places - back] == token]
            if not same.size:
                break
            places, length = same, back + 1
        return Match(length, self.start + int(places.max()) + 1 if length else 0)


def _shifts() -> tuple[int, ...]:
    """Of the hash of each token in a key, the last token's first."""
    before = [sum(HASH_BITS[i + 1 :]) for i in range(len(HASH_BITS))]
    return tuple(PLACE_BITS + bits for bits in before)
