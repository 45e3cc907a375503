"""How many of a context's first tokens may be taken from another context that begins with the same tokens.

What was encoded for them is used as it is: so they must have seen the same in every layer, and what later
tokens see of them must still be there.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from math import lcm

from megatron_star.planning.layer_mask import Chunk, LayerMask
from megatron_star.planning.mask import Mask


def num_shared_tokens(mask: Mask, base: Mask) -> int:
    """How many tokens of a context with the mask `base` one with `mask` may use, if their tokens are equal.

    Tokens of the first block see all before them, under any mask. Those of a further block see the same if
    all blocks before are the same and the two begin at the same token; where they end does not matter. But a
    block that names keys names them as a whole: so its last token is not shared, unless the block is.
    """
    num_equal = num_equal_items(mask.block_edges, base.block_edges) if mask.rule == base.rule else 1
    next_edges = [each.block_edges[num_equal : num_equal + 1] for each in (mask, base)]
    shared = min(mask.num_tokens, base.num_tokens, *(edge for edges in next_edges for edge in edges))
    ends_unnamed_block = next_edges[0] == (shared,) and mask.num_named(num_equal - 1) > 0
    return shared - 1 if ends_unnamed_block else shared


def num_kept_tokens(masks: Collection[LayerMask], num_tokens: int, end: int) -> int:
    """At most how many of the first `num_tokens` of an encoded context may be used without those after them.

    Layers with a mask of their own keep only what tokens after the context's `end` see. Tokens after an
    earlier one see it, too, where that is all they see: in the last chunk, in a context that is shorter than
    a window, and at the beginning of any chunk, where nothing is seen of what is before.
    """
    chunks = lcm(*(mask.size for mask in masks if isinstance(mask, Chunk)))
    for num_kept in (num_tokens, num_tokens // chunks * chunks):
        if all(mask.kept_from(num_kept) in (num_kept, mask.kept_from(end)) for mask in masks):
            return num_kept
    return 0


def num_equal_items(one: Sequence, other: Sequence) -> int:
    """How many items both begin with."""
    most = min(len(one), len(other))
    return bisect_left(range(1, most + 1), True, key=lambda n: one[:n] != other[:n])
