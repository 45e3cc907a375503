"""Query rows of one layer in one forward pass, and how they attend to keys and values as these are stored."""

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from megatron_star.attention.merge import PartialSum
from megatron_star.attention.partial import AttentionKernel, Partial


class RunningAttention:
    """A running merge over all that the rows see, part by part."""

    def __init__(
        self, kernel: AttentionKernel, softmax_scale: float, query: Tensor, value_size: int | None = None
    ) -> None:
        """Rows of query [sq, b, np, hn], with no keys seen yet; results of hn values, or of another size."""
        self.query, self.softmax_scale = query, softmax_scale
        self.attend = partial(kernel, softmax_scale=softmax_scale)
        self.partials = PartialSum(query, value_size)

    def set_causal(self, start: int, end: int, key: Tensor, value: Tensor) -> None:
        """Start rows [start, end) with what each sees of as many tokens, up to its own."""
        part = self.attend(self.query[start:end], key, value, causal=True)
        self.partials.set_rows(start, end, part)

    def add(
        self, rows: Iterable[tuple[int, int]], key: Tensor, value: Tensor, *, causal: bool = False
    ) -> None:
        """Each of these ranges of rows sees these further keys: all of them; or, with causal, its last row
        does, the one before it all but the last, and so on."""
        for start, end in rows:
            part = self.attend(self.query[start:end], key, value, causal=causal)
            self.partials.add_rows(start, end, part)

    def merged(self) -> Partial:
        """Of all rows, over all that they have seen; see `PartialSum.merged`."""
        return self.partials.merged()
