"""Which keys of a block are worth passing on: those that are least like the others.

Shapes: sk keys, b = 1, ng KV heads, hn head size.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def most_distinct(key: Tensor, num_keys: int, first: int = 0) -> Tensor:
    """The keys whose direction is farthest from the mean direction of all, in each KV head.

    KeyDiff's measure (arXiv 2504.15364, section 3): such keys draw most of the attention, whatever the
    queries are. So nothing of it depends on a question.

    Args:
        key: [sk, 1, ng, hn], rotated, any float dtype.
        num_keys: at most sk - first.
        first: keys before it count in the mean, and are not chosen.

    Returns:
        [num_keys, ng], int64: positions in `key`, the most distinct key first.
    """
    directions = normalize(key.squeeze(1).float(), dim=-1)
    similarity = torch.einsum("kgh,gh->kg", directions, directions.mean(0))
    # Normalising the mean divides all of a head by the same number: it changes no order.
    return similarity[first:].topk(num_keys, dim=0, largest=False).indices + first


def of_heads(tensor: Tensor, positions: Tensor) -> Tensor:
    """[n, 1, ng, hn]: of each KV head of [sk, 1, ng, hn] its own `positions`, [n, ng]."""
    index = positions[:, None, :, None].expand(-1, -1, -1, tensor.size(3))
    return tensor.gather(0, index)
