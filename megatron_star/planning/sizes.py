"""How large blocks are, what they begin with and what they pass on, where nobody says.

`star` without sizes is the setting that we recommend. Its sizes follow from the length of the context alone,
not from ranks or requests beside it: equal questions have equal answers everywhere.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from megatron_star.config import StarConfig

BLOCKS_OF_A_CONTEXT = 16
SMALLEST_BLOCK, LARGEST_BLOCK = 512, 32 << 10
ANCHOR_SIZE = 128
FEWEST_PASSED_KEYS, BLOCK_PER_PASSED_KEY = 128, 8
"""The recommended sizes, from needles with SmolLM2 (docs/accuracy.md): 8 blocks of 512 with 128 passed keys
behind an anchor of 128 tokens kept 98% of what exact attention found at 4K; at 8K, 16 blocks of 512 and 8 of
1,024 with 128 passed keys lost nothing in a dozen samples. Larger blocks and models were not measured."""

PUBLISHED_BLOCKS, SMALLEST_PUBLISHED, LARGEST_PUBLISHED = 4, 8 << 10, 32 << 10
"""The sizes that arXiv 2411.17116 publishes accuracies for: a quarter of the context, up to 32K."""

GROWTH = 4
"""A conversation keeps its sizes until it is so many times as long as when they were chosen."""


def with_sizes(star: StarConfig, num_tokens: int) -> StarConfig:
    """The configuration with every size that was left open.

    Sizes are the recommended ones, unless the configuration speaks of the published method: a block size
    without passed keys, none at all, or a recomputed anchor. `exact` has no sizes.
    """
    if star.mode == "exact":
        return star
    if star.passed_keys and star.anchor_size is None:
        star = replace(star, anchor_size=ANCHOR_SIZE)
    if star.block_size is not None:
        return replace(star, passed_keys=star.passed_keys or 0)
    if star.passed_keys == 0 or star.anchor == "recompute":
        return replace(star, block_size=published_block_size(num_tokens), passed_keys=0)
    block_size = recommended_block_size(num_tokens)
    return replace(
        star,
        block_size=block_size,
        anchor_size=ANCHOR_SIZE if star.anchor_size is None else star.anchor_size,
        passed_keys=recommended_passed_keys(block_size) if star.passed_keys is None else star.passed_keys,
    )


def sizes_of(star: StarConfig) -> dict[str, int]:
    """Those of a configuration of `with_sizes`, by their names: who asks for them gets the same encoding."""
    if star.mode == "exact":
        return {}
    anchor_size = star.block_size if star.anchor_size is None else star.anchor_size
    return {"block_size": star.block_size, "anchor_size": anchor_size, "passed_keys": star.passed_keys}


def recommended_block_size(num_tokens: int) -> int:
    """The power of two that is nearest to a sixteenth of the context, from 512 to 32K."""
    exponent = round(math.log2(max(1, num_tokens) / BLOCKS_OF_A_CONTEXT))
    return min(max(2**exponent, SMALLEST_BLOCK), LARGEST_BLOCK)


def recommended_passed_keys(block_size: int) -> int:
    """An eighth of the block, and at least 128."""
    return max(FEWEST_PASSED_KEYS, block_size // BLOCK_PER_PASSED_KEY)


def published_block_size(num_tokens: int) -> int:
    """A quarter of the context, from 8K to 32K."""
    quarter = -(-num_tokens // PUBLISHED_BLOCKS)
    return min(max(quarter, SMALLEST_PUBLISHED), LARGEST_PUBLISHED)


def length_for_sizes(num_tokens: int, turn_edges: Iterable[int] = ()) -> int:
    """The length of a context that its sizes are chosen by: of a conversation, that of its first turn.

    So a further turn finds what was encoded before. But a long document may follow a short greeting: sizes
    are chosen anew whenever the conversation has become four times as long.
    """
    first, *later = (*turn_edges, num_tokens)
    chosen_by = first
    for edge in later:
        if edge >= GROWTH * chosen_by:
            chosen_by = edge
    return chosen_by
