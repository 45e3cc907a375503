"""Layers with a mask of their own: windows and chunks, whatever the user's options say of the others.

Such a layer is exact and sees no anchor: only what comes shortly before a segment crosses ranks (a halo), and
only the end of a context is kept for what follows it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_star.planning.mask import Range, joined_ranges


class Band(NamedTuple):
    """The tokens [start, end) attend in one call, causally, to the keys of [first, end).

    Each sees at most the last `window` of them, itself included; None is no bound.
    """

    start: int
    end: int
    first: int
    window: int | None


@dataclass(frozen=True)
class LayerMask(ABC):
    """A token sees itself and those shortly before it.

    Attributes:
        size: tokens that one sees at most, itself included.
    """

    size: int

    def __post_init__(self) -> None:
        assert self.size >= 1

    @property
    def name(self) -> str:
        """Of this kind of layer, for people: `window 1024`."""
        return f"{type(self).__name__.lower()} {self.size}"

    @abstractmethod
    def first_seen(self, position: int) -> int:
        """The token at `position` sees [first_seen(position), position]. Rises with the position."""

    @abstractmethod
    def bands(self, start: int, end: int) -> tuple[Band, ...]:
        """How the tokens [start, end) attend, in as few calls as can be; none if there are no tokens."""

    @abstractmethod
    def pairs(self, start: int, end: int) -> int:
        """Visible (query, key) pairs of the tokens [start, end)."""

    def sources(self, start: int, end: int) -> tuple[Range, ...]:
        """What the tokens [start, end) see before `start`."""
        return joined_ranges([Range(self.first_seen(start), start)]) if start < end else ()

    def kept_from(self, num_tokens: int) -> int:
        """What comes after a context of `num_tokens` sees of it only the tokens from here on."""
        return self.first_seen(num_tokens)

    def most_kept(self, num_tokens: int) -> int:
        """Of consecutive tokens, wherever they begin, what comes after them sees at most so many."""
        return min(num_tokens, self.size - 1)


@dataclass(frozen=True)
class Window(LayerMask):
    """A token sees itself and the `size - 1` tokens before it."""

    def first_seen(self, position: int) -> int:
        """The one `size - 1` tokens before, or the beginning."""
        return max(0, position - self.size + 1)

    def bands(self, start: int, end: int) -> tuple[Band, ...]:
        """One; without a bound if the last token sees all that the first one does."""
        first = self.first_seen(start)
        window = self.size if end - first > self.size else None
        return (Band(start, end, first, window),) if start < end else ()

    def pairs(self, start: int, end: int) -> int:
        """The first `size` tokens see all before them, those behind `size` tokens each."""
        growing = max(start, min(end, self.size))
        return _triangle(growing) - _triangle(start) + (end - growing) * self.size


@dataclass(frozen=True)
class Chunk(LayerMask):
    """A token sees those of its chunk up to itself: chunks begin at the multiples of `size` (Llama 4)."""

    def first_seen(self, position: int) -> int:
        """Where its chunk begins."""
        return position // self.size * self.size

    def bands(self, start: int, end: int) -> tuple[Band, ...]:
        """One for each chunk."""
        chunks = range(self.first_seen(start), end, self.size) if start < end else ()
        return tuple(Band(max(start, first), min(end, first + self.size), first, None) for first in chunks)

    def pairs(self, start: int, end: int) -> int:
        """Those up to `end` without those up to `start`."""
        return self._pairs_before(end) - self._pairs_before(start)

    def _pairs_before(self, end: int) -> int:
        num_chunks, rest = divmod(end, self.size)
        return num_chunks * _triangle(self.size) + _triangle(rest)


def _triangle(n: int) -> int:
    """1 + 2 + .. + n."""
    return n * (n + 1) // 2


def layer_masks(config: Any) -> tuple[LayerMask | None, ...]:
    """The mask of each layer, or None where the user's options choose it.

    Args:
        config: a `TransformerConfig` or what has its fields; those of masks may be missing.

    Raises:
        ValueError: these fields do not describe such masks.
    """
    windows = _layers_with(config, "window_attn_skip_freq", _window(config))
    chunks = _layers_with(config, "chunked_layers", _chunk(config))
    if any(window and chunk for window, chunk in zip(windows, chunks, strict=True)):
        raise ValueError("a layer has both a window and chunks (window_attn_skip_freq, chunked_layers)")
    return tuple(window or chunk for window, chunk in zip(windows, chunks, strict=True))


def _window(config: Any) -> Window | None:
    """Of Megatron's `window_size`: how many tokens before and after its own one sees; -1 is all."""
    window_size = getattr(config, "window_size", None)
    if window_size is None:
        return None
    before, after = window_size
    if before == -1 and after in (-1, 0):
        return None
    if before < 0 or after != 0:
        raise ValueError(f"window_size is {[before, after]}: it must be some tokens before and 0 after")
    return Window(before + 1)


def _chunk(config: Any) -> Chunk | None:
    """Of our `attention_chunk_size`."""
    size = getattr(config, "attention_chunk_size", None)
    if size is not None and size < 1:
        raise ValueError(f"attention_chunk_size is {size}: it must be at least 1")
    return None if size is None else Chunk(size)


def _layers_with(config: Any, field: str, mask: LayerMask | None) -> list[LayerMask | None]:
    """For each layer, the mask where the field has a 1; everywhere without the field.

    A number n in the field is Megatron's: every n-th layer has no mask of its own.
    """
    chosen, layers = getattr(config, field, None), range(1, config.num_layers + 1)
    if mask is None or chosen is None:
        return [mask for _ in layers]
    if isinstance(chosen, int):
        chosen = [layer % chosen != 0 for layer in layers]
    if len(chosen) != config.num_layers:
        raise ValueError(f"{field} is {chosen}: it must be a list of {config.num_layers}, one for each layer")
    return [mask if one else None for one in chosen]
