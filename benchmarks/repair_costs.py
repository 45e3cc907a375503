"""What encoding a context as a candidate costs, by formula: pairs, operations, bytes between ranks."""

from typing import NamedTuple

from benchmarks.repair_candidates import Candidate
from benchmarks.repair_selection import ROWS
from megatron_star.planning.cost_model import kv_layers, token_costs
from megatron_star.planning.layer_mask import layer_masks
from megatron_star.planning.mask import joined_ranges
from megatron_star.planning.model_shape import ModelShape


class Costs(NamedTuple):
    """Of all ranks together.

    Attributes:
        pairs: visible (query, key) pairs, against exact's, in the mean over the layers that attend.
        operations: floating point, linear and attention; as the cost model counts them.
        crossing_bytes: KV that ranks hand to each other where each block is on a rank of its own.
    """

    pairs: float
    operations: float
    crossing_bytes: int


def costs(candidate: Candidate, num_tokens: int, shape: ModelShape, bytes_per_value: int) -> Costs:
    """Of a context of at least one token; `exact_layers` are named. The last layer does not attend.

    Raises:
        ValueError: layers of the model have masks of their own.
    """
    kv = kv_layers(shape, tp_size=1, bytes_per_value=bytes_per_value)
    if any(layer_masks(shape)):
        raise ValueError("this model has layers with a mask of their own, which are not compared here")
    num_layers = shape.num_layers - 1
    num_exact = len(candidate.layers_without_blocks(shape.num_layers) - {shape.num_layers})
    share_exact = num_exact / num_layers
    of_exact = num_tokens * (num_tokens + 1) / 2
    pairs = share_exact * of_exact + (1 - share_exact) * _attended(candidate, num_tokens)
    scored = (1 - share_exact) * _scored(candidate, num_tokens)
    per_token = token_costs(shape)
    linear, attention = per_token.linear_per_token, per_token.attention_per_pair
    crossing = num_exact * num_tokens + (num_layers - num_exact) * crossing_tokens(candidate, num_tokens)
    return Costs(
        pairs / of_exact, linear * num_tokens + attention * (pairs + scored), crossing * kv.bytes_per_token
    )


def _attended(candidate: Candidate, num_tokens: int) -> int:
    """Pairs of a layer with blocks."""
    dense_rows = range(0, num_tokens if candidate.delta else 0, candidate.delta or 1)
    return sum(view.pairs for view in candidate.views(num_tokens)) + sum(row + 1 for row in dense_rows)


def _scored(candidate: Candidate, num_tokens: int) -> float:
    """Pairs whose scores are computed again to name keys: half of a pair's operations. Others cost O(n)."""
    if not candidate.passed or candidate.select != "scores":
        return 0.0
    sizes = [view.end - view.start for view in candidate.views(num_tokens)[:-1]]
    return sum(min(candidate.rows or ROWS, size) * size / 2 for size in sizes)


def crossing_tokens(candidate: Candidate, num_tokens: int) -> int:
    """Tokens whose KV crosses ranks in a layer: what other blocks see, each token once, for each KV head.

    All of them where there are no blocks, or where some rows see everything. Where `most` bounds what a block
    sees, what it may choose from.
    """
    views = candidate.views(num_tokens)
    if len(views) == 1 or candidate.delta:
        return num_tokens
    whole = joined_ranges(sorted(r for view in views for r in view.whole))
    passed: dict[int, int] = {}
    for source, num_keys in (p for view in views for p in view.passed):
        if not any(r.start <= views[source].start and views[source].end <= r.end for r in whole):
            passed[source] = max(passed.get(source, 0), num_keys)
    return sum(r.end - r.start for r in whole) + sum(passed.values())
