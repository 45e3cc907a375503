"""Rotary embedding at given positions, with the angles of any of Megatron's rotary embedding classes."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor


class RotaryAtPositions(torch.nn.Module):
    """Stands in for a model's `rotary_pos_emb`: angles for given positions, not a table from 0.

    Megatron asks its rotary module for a table over the maximum length (512 MB at 1M positions) and slices
    it. A wave holds pieces from anywhere in a context, so the angles are made for its positions instead.
    They are linear in the position for every class that Megatron has (default, interpolated, Llama-3
    scaled, YaRN): angle(p) = p * angle(1), so the wrapped module is only asked for position 1.
    """

    def __init__(self, rotary_pos_emb: torch.nn.Module) -> None:
        super().__init__()
        self.rotary_pos_emb = rotary_pos_emb

    def get_rotary_seq_len(self, inference_context: Any, *args: object) -> Tensor:
        """The positions [sq] of this pass's tokens. Megatron passes them on to `forward` as a length."""
        return inference_context.position_ids

    def forward(self, position_ids: Tensor, **_: object) -> Tensor | tuple[Tensor, float]:
        """Angles [sq, 1, 1, rotary dim], float32; with YaRN's scale beside them, as its class returns."""
        unit = self.rotary_pos_emb.get_emb(1, offset=1)
        positions = position_ids.to(torch.float32)[:, None, None, None]
        if isinstance(unit, tuple):
            return unit[0] * positions, unit[1]
        return unit * positions


def rotate_at_positions(model: GPTModel) -> None:
    """Replace a model's `rotary_pos_emb`, if it has one, by its `RotaryAtPositions`."""
    rotary_pos_emb = getattr(model, "rotary_pos_emb", None)
    if rotary_pos_emb and not isinstance(rotary_pos_emb, RotaryAtPositions):
        model.rotary_pos_emb = RotaryAtPositions(rotary_pos_emb)


def cosines_and_sines(
    angles: Tensor, scale: float, dtype: torch.dtype, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, of Megatron's angles [sq, 1, 1, 2 * r], one for each value of a pair.

    Args:
        scale: YaRN's (arXiv 2309.00071).
        interleaved: see `rotate`.
    """
    once = angles[..., ::2] if interleaved else angles[..., : angles.size(-1) // 2]
    return (once.cos() * scale).to(dtype), (once.sin() * scale).to(dtype)


def rotate(
    tensor: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None, *, interleaved: bool = False
) -> Tensor:
    """Rotate the pairs (i, i + r), i < r, of a head's values; those beyond 2 * r stay (arXiv 2104.09864).

    Megatron's own makes cosines and sines anew for queries and keys of each layer, and goes over memory some
    seven times; this goes over it once.

    Args:
        tensor: [sq, b, heads, hn].
        cos, sin: [sq, 1, 1, r], in the tensor's dtype.
        out: where to, in the tensor's shape; a new tensor unless given.
        interleaved: the pairs are (2 * i, 2 * i + 1) instead, as in GLM, Cohere and Llama 4.
    """
    r = cos.size(-1)
    out = tensor.new_empty(tensor.shape) if out is None else out
    halves = (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if interleaved else (slice(r), slice(r, 2 * r))
    (first, second), (first_out, second_out) = ([t[..., half] for half in halves] for t in (tensor, out))
    torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin)
    if 2 * r < tensor.size(-1):
        out[..., 2 * r :] = tensor[..., 2 * r :]
    return out
