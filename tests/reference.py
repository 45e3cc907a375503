"""The slow truth: what the fast paths are compared with. Nothing here imports what it checks."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


def block_edges(num_tokens: int, block_size: int) -> list[int]:
    """Edges of ceil(n / block_size) even blocks."""
    num_blocks = -(-num_tokens // block_size)
    return [num_tokens * i // num_blocks for i in range(num_blocks + 1)] if num_blocks else [0]


def extended_edges(edges: list[int], num_tokens: int, block_size: int) -> list[int]:
    """Edges of the blocks of a context, and of those of what a later turn appended to it."""
    return edges[:-1] + [edges[-1] + edge for edge in block_edges(num_tokens - edges[-1], block_size)]


def star_mask(
    num_tokens: int, block_size: int, anchor_size: int | None = None, neighbor_blocks: int = 0
) -> Tensor:
    """[n, n] bool, True where row token sees column token: the definition, token by token."""
    edges = block_edges(num_tokens, block_size)
    return mask_of_blocks(edges, block_size if anchor_size is None else anchor_size, neighbor_blocks)


def mask_of_blocks(edges: list[int], anchor_size: int, neighbor_blocks: int = 0) -> Tensor:
    """[n, n] bool: `star_mask` of blocks with these edges."""
    num_tokens = edges[-1]
    first_block = edges[1] if len(edges) > 1 else 0
    anchor = min(anchor_size, first_block)
    block_of = torch.zeros(num_tokens, dtype=torch.long)
    for block, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        block_of[start:end] = block
    row, column = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None, :]
    near = block_of[None, :] >= block_of[:, None] - neighbor_blocks
    return (column <= row) & (near | (column < anchor))


def window_mask(num_tokens: int, size: int) -> Tensor:
    """[n, n] bool: a token sees itself and the size - 1 tokens before it."""
    row, column = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None, :]
    return (column <= row) & (column > row - size)


def chunk_mask(num_tokens: int, size: int) -> Tensor:
    """[n, n] bool: a token sees what is before it in its own chunk of so many tokens."""
    row, column = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None, :]
    return (column <= row) & (column // size == row // size)


def share_of_distance(passed_keys: int, distance: int) -> int:
    """The block before passes all, the one 2 back half of it, 3 and 4 back a quarter, ..: rounded down."""
    reach = 1
    while distance > reach:
        reach, passed_keys = 2 * reach, passed_keys // 2
    return passed_keys


class PassingBlocks(NamedTuple):
    """The definition of passed keys: what blocks name of their keys, and who sees how many of these."""

    edges: list[int]
    anchor_size: int
    passed_keys: int
    neighbor_blocks: int

    @classmethod
    def of(cls, turns: Sequence[int], star: Any) -> Self:
        """Of a context that was encoded in turns, which end there.

        star: a `StarConfig` with a block size.
        """
        edges = block_edges(turns[0], star.block_size)
        for end in turns[1:]:
            edges = extended_edges(edges, end, star.block_size)
        anchor_size = star.block_size if star.anchor_size is None else star.anchor_size
        return cls(edges, min(anchor_size, edges[1]), star.passed_keys or 0, star.neighbor_blocks)

    @property
    def num_blocks(self) -> int:
        return len(self.edges) - 1

    def block_of(self, token: int) -> int:
        return max(block for block in range(self.num_blocks) if self.edges[block] <= token)

    def first_whole(self, block: int) -> int:
        """The first of the blocks that this one sees whole."""
        return max(0, block - self.neighbor_blocks)

    def num_named(self, block: int) -> int:
        """The first block names the anchor, and then so many of its other keys."""
        size = self.edges[block + 1] - self.edges[block]
        return min(size, self.passed_keys + (0 if block else self.anchor_size))

    def num_seen(self, block: int, earlier: int) -> int:
        """How many of the keys that an earlier block names a block sees, unless it sees it whole."""
        share = share_of_distance(self.passed_keys, self.first_whole(block) - earlier)
        return min(self.num_named(earlier), share + (0 if earlier else self.anchor_size))

    def name(self, key: Tensor) -> list[list[int]]:
        """For each block, the positions of what it names of one KV head's keys, [n, hn], in order."""
        named = []
        for block, (start, end) in enumerate(pairwise(self.edges)):
            first = 0 if block else self.anchor_size
            of_block = key[start:end, None, None]
            distinct = most_distinct_one_by_one(of_block, self.num_named(block) - first, first)
            named.append([*range(first), *(start + row for row in distinct[:, 0].tolist())])
        return named

    def mask(self, named: Sequence[Sequence[int]]) -> Tensor:
        """[n, n] bool of one KV head, where these are the positions that each block names."""
        mask = mask_of_blocks(self.edges, 0, self.neighbor_blocks)
        for block, (start, end) in enumerate(pairwise(self.edges)):
            for earlier in range(self.first_whole(block)):
                mask[start:end, list(named[earlier][: self.num_seen(block, earlier)])] = True
        return mask


def with_query(context_mask: Tensor, num_query_tokens: int) -> Tensor:
    """The mask of context and query (and generated) tokens, which see everything before them."""
    n = context_mask.size(0)
    mask = torch.ones(n + num_query_tokens, n + num_query_tokens, dtype=torch.bool).tril()
    mask[:n, :n] = context_mask
    return mask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and LSE in float64: [sq, b, np, hn] and [sk, b, ng, hn] to [b, np, sq, hn] and [b, np, sq].

    Values may have another head size, which the output has too. Causal aligns the last query with the last
    key. Of the keys up to its own a row sees the last `window`. A row without a visible key gives 0 and -inf.
    `sinks`, [np], are scores of one more key a head, whose value is zero; the LSE is without it.
    """
    repeat = query.size(2) // key.size(2)
    q = query.double().permute(1, 2, 0, 3)
    k = key.double().permute(1, 2, 0, 3).repeat_interleave(repeat, dim=1)
    v = value.double().permute(1, 2, 0, 3).repeat_interleave(repeat, dim=1)
    scores = softmax_scale * q @ k.transpose(2, 3)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    sq, sk = scores.shape[2:]
    own = torch.arange(sq, device=scores.device)[:, None] + sk - sq
    column = torch.arange(sk, device=scores.device)
    if causal:
        scores = scores.masked_fill(column > own, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(column <= own - window, -torch.inf)
    softmax_lse = scores.logsumexp(-1)
    of_all = softmax_lse
    if sinks is not None:
        of_all = softmax_lse.logaddexp(sinks.double()[:, None])
    weights = (scores - of_all.clamp_min(-1e300).unsqueeze(-1)).exp()
    return weights @ v, softmax_lse


def most_distinct_one_by_one(key: Tensor, num_keys: int, first: int = 0) -> Tensor:
    """[num_keys, ng]: KeyDiff's measure (arXiv 2504.15364) in float64, a head and a key at a time."""
    chosen = []
    for head in key.squeeze(1).double().unbind(1):
        directions = [each / each.norm() for each in head]
        mean = sum(directions) / len(directions)
        similarity = {i: float(directions[i] @ mean / mean.norm()) for i in range(first, len(directions))}
        chosen.append(sorted(similarity, key=similarity.__getitem__)[:num_keys])
    return torch.tensor(chosen, dtype=torch.int64).reshape(len(chosen), num_keys).T


def sampled_token(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, random: float, forbidden: Sequence[int]
) -> int:
    """The token at `random` of the distribution of logits [n]: all sorted, integers added one by one."""
    logits = logits.clone()
    logits[list(forbidden)] = -torch.inf
    order = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))
    if temperature == 0.0 or top_k == 1:
        return order[0]
    powers = (logits - logits.max()) * torch.tensor(temperature).double().pow(-1).div(math.log(2)).float()
    weights = [int(power * 2**40) for power in powers.exp2().tolist()]
    if not top_k and not 0 < top_p < 1:
        order.sort()
    kept = [i for i in order if logits[i] >= logits[order[top_k - 1]]] if top_k else order
    limit, before = min(int(sum(weights[i] for i in kept) * (top_p or 1.0)), sum(weights) - 1), 0
    nucleus = []
    for i in kept:
        if before > limit:
            break
        nucleus, before = [*nucleus, i], before + weights[i]
    target, before = int(random * before), 0
    for i in nucleus:
        before += weights[i]
        if before > target:
            return i
    raise AssertionError("the weights add up to less than the target")
