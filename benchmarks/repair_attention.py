"""What a candidate does in a layer: while the context is encoded, and while the question is asked.

Shapes: n tokens, b = 1, np query heads, ng KV heads, hn head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.repair_candidates import BlockView, Candidate
from benchmarks.repair_selection import Block, NamedKeys, named_keys
from megatron_star.attention.distinct_keys import of_heads
from megatron_star.attention.merge import PartialSum, merge_outs
from megatron_star.attention.partial import AttentionKernel, Partial
from megatron_star.planning.mask import StarMask


@dataclass(frozen=True)
class Heads:
    """Of one layer, after the rotary embedding: query [sq, 1, np, hn], key and value [sk, 1, ng, hn]."""

    query: Tensor
    key: Tensor
    value: Tensor
    softmax_scale: float
    kernel: AttentionKernel

    def attend(self, rows: slice, keys: slice | Tensor, *, causal: bool) -> Partial:
        """Of some rows to some keys: the same for each KV head, or [ng, keys]."""
        taken = (t[keys] if isinstance(keys, slice) else of_heads(t, keys.T) for t in (self.key, self.value))
        key, value = taken
        return self.kernel(self.query[rows], key, value, causal=causal, softmax_scale=self.softmax_scale)


def encode(candidate: Candidate, heads: Heads) -> Tensor:
    """[n, 1, np, hn], in a layer that is not exact."""
    num_tokens = heads.query.size(0)
    views, num_anchor = candidate.views(num_tokens), candidate.num_anchor(num_tokens)
    out, named = torch.empty_like(heads.query), []
    for view in views:
        out[view.start : view.end] = _attend_block(heads, view, named)
        if candidate.passed:
            named.append(named_keys(candidate, _block(heads, view, num_anchor)))
    return _with_delta(out, heads, candidate.delta) if candidate.delta else out


def _block(heads: Heads, view: BlockView, num_anchor: int) -> Block:
    rows = slice(view.start, view.end)
    in_block = 0 if view.start else num_anchor
    return Block(view.start, heads.query[rows, 0], heads.key[rows, 0], in_block, heads.softmax_scale)


def _attend_block(heads: Heads, view: BlockView, named: Sequence[NamedKeys]) -> Tensor:
    rows = slice(view.start, view.end)
    partials = PartialSum(heads.query[rows])
    partials.set_rows(0, view.end - view.start, heads.attend(rows, rows, causal=True))
    if view.num_earlier:
        earlier = earlier_keys(view, named, heads.key.size(2))
        partials.add_rows(0, view.end - view.start, heads.attend(rows, earlier, causal=False))
    return partials.result()


def earlier_keys(view: BlockView, named: Sequence[NamedKeys], num_kv_heads: int) -> Tensor:
    """[ng, keys]: positions of what a block sees before itself."""
    whole = [torch.arange(r.start, r.end).expand(num_kv_heads, -1) for r in view.whole]
    if not view.num_passed:
        return torch.cat(whole, 1)
    positions = torch.cat([named[p.block].positions[:, : p.num_keys] for p in view.passed], 1)
    if view.num_passed < positions.size(1):
        scores = torch.cat([named[p.block].scores[:, : p.num_keys] for p in view.passed], 1)
        positions = positions.gather(1, scores.topk(view.num_passed, dim=-1).indices)
    return torch.cat([*whole, positions], 1)


def _with_delta(out: Tensor, heads: Heads, delta: int) -> Tensor:
    """Delta attention (arXiv 2505.11254): a dense row's gain is added to the rows until the next one."""
    num_tokens = out.size(0)
    dense = [
        heads.attend(slice(row, row + 1), slice(0, row + 1), causal=True).out.permute(2, 0, 1, 3)
        for row in range(0, num_tokens, delta)
    ]
    gain = torch.cat(dense).float() - out[::delta].float()
    return (out.float() + gain.repeat_interleave(delta, 0)[:num_tokens]).to(out.dtype)


def attend_to_all(heads: Heads) -> Tensor:
    """[sq, 1, np, hn]: exact attention; rows are the last tokens."""
    everything = slice(0, None)
    partial = heads.attend(everything, everything, causal=True)
    return partial.out.permute(2, 0, 1, 3).to(heads.query.dtype)


def ask(candidate: Candidate, heads: Heads, num_context: int) -> Tensor:
    """[sq, 1, np, hn]: rows of the question, which see the blocks of the context and themselves.

    What a row sees of a block is a part with its LSE, as on the block's rank; parts are scaled or left out by
    it, for each head.
    """
    if not candidate.asked_blocks and not candidate.asked_bias:
        return attend_to_all(heads)
    edges, rows = candidate.edges(num_context), slice(0, None)
    blocks = [slice(*pair) for pair in zip(edges, edges[1:], strict=False)]
    parts = [heads.attend(rows, block, causal=False) for block in blocks]
    own = heads.attend(rows, slice(num_context, None), causal=True)
    lses = torch.stack([part.softmax_lse for part in parts])
    later = lses[1:]
    later += candidate.asked_bias
    if 0 < candidate.asked_blocks < len(later):
        least = later.topk(candidate.asked_blocks, dim=0).values[-1]
        later.masked_fill_(later < least, -torch.inf)
    outs = torch.stack([part.out.float() for part in (*parts, own)])
    merged = merge_outs(outs, torch.cat([lses, own.softmax_lse[None]]))
    return merged.permute(2, 0, 1, 3).to(heads.query.dtype)


def hidden_mass(mask: StarMask, heads: Heads, positions: Sequence[int]) -> float:
    """The mean share of exact's softmax that a mask hides from these rows: see `hidden_attention.py`."""
    group = heads.query.size(2) // heads.key.size(2)
    key = heads.key[:, 0].float().repeat_interleave(group, 1)
    shares = []
    for position in positions:
        hidden = torch.zeros(position + 1, dtype=torch.bool)
        for start, end in mask.hidden(position):
            hidden[start:end] = True
        logits = torch.einsum("hd,khd->hk", heads.query[position, 0].float(), key[: position + 1])
        weights = (logits * heads.softmax_scale).softmax(-1)
        shares.append(weights[:, hidden].sum(-1).mean())
    return float(torch.stack(shares).mean())
