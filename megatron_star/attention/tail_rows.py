"""Where the rows of a step find what they see of a layer's tails; `triton_tails.py` reads it."""

from typing import NamedTuple

from torch import Tensor


class TailRows(NamedTuple):
    """What the kernels read of the rows of a step, for one layer: int64, on the device.

    Attributes:
        slots: [sq], the token of its tail's buffers that a row becomes; -1 where its tail is on another rank.
        spans: [sq, segments, 2], the first token that a row sees of a segment, and how many.
        bases: [sq, segments, 2], where a segment's keys and values begin: addresses of token 0. They are not
            read where a row sees nothing of a segment.
        most_keys: that a row may see as long as no buffer grows: known to the host.
    """

    slots: Tensor
    spans: Tensor
    bases: Tensor
    most_keys: int
