"""Rotary embedding at given positions, and the one place where queries and keys are rotated.

Shapes: sq tokens of a forward pass, r pairs of a head's values that are rotated, hn values of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import Tensor

from megatron_star.model.rotary_frequencies import plain_frequencies
from megatron_star.model.transformer_config import own_field

LongRows = Sequence[bool] | Tensor
"""For each row, or for all, whether longrope's long factors count (`longrope.py`)."""


class RotaryAtPositions(torch.nn.Module):
    """Stands in for a model's `rotary_pos_emb`: angles for given positions, not a table from 0.

    Megatron asks its rotary module for a table over the maximum length (512 MB at 1M positions) and slices
    it. A wave holds pieces from anywhere in a context, so the angles are made for its positions instead.
    """

    def __init__(self, frequencies: Tensor, window_frequencies: Tensor | None = None) -> None:
        """
        Args:
            frequencies: angles for one position, [r], float32; of longrope [2, r], short and long.
            window_frequencies: of the layers with a window, where they have a rotary embedding of their own.
        """
        super().__init__()
        # Plain attributes: as buffers they would be cast with the model.
        self.frequencies = frequencies
        self.window_frequencies = window_frequencies

    def get_rotary_seq_len(self, inference_context: Any, *args: object) -> tuple[Tensor, LongRows]:
        """What `forward` takes, of this pass's tokens. Megatron passes it on as a length."""
        return inference_context.position_ids, inference_context.long_rows

    def forward(self, rows: tuple[Tensor, LongRows], **_: object) -> tuple[Tensor, Tensor]:
        """Angles of all layers but those with windows, and of these: each [sq, 1, 1, r], float32.

        Args:
            rows: positions [sq], and for each of them, or for all, whether longrope's long factors count.
        """
        position_ids, long_rows = rows
        positions = position_ids.to(torch.float32)[:, None, None, None]
        self.frequencies = frequencies = self.frequencies.to(positions.device)
        if frequencies.dim() > 1:
            chosen = torch.as_tensor(long_rows, dtype=torch.int64, device=positions.device)
            frequencies = frequencies[chosen][:, None, None]
        angles = positions * frequencies
        if self.window_frequencies is None:
            return angles, angles
        self.window_frequencies = self.window_frequencies.to(positions.device)
        return angles, positions * self.window_frequencies


def rotate_at_positions(model: GPTModel, frequencies: Tensor | None = None) -> None:
    """Replace a model's `rotary_pos_emb`, if it has one, by its `RotaryAtPositions`.

    With latent attention each layer has a module of its own, all alike: they are replaced by one.

    Args:
        frequencies: [r]; those of the replaced module unless given. Angles are linear in the position in
            every class that Megatron has: default, interpolated, Llama-3 scaled, YaRN.
    """
    latent_layers = [layer for layer in model.modules() if isinstance(layer, MultiLatentAttention)]
    if latent_layers:
        _rotate_latent_layers(latent_layers, frequencies)
    rotary = getattr(model, "rotary_pos_emb", None)
    if rotary is None or isinstance(rotary, RotaryAtPositions):
        return
    if frequencies is None:
        frequencies = _frequencies_of(rotary)
    window_base, window_frequencies = own_field(model.config, "window_rotary_base"), None
    if window_base is not None:
        window_frequencies = plain_frequencies(2 * frequencies.size(-1), window_base)
    model.rotary_pos_emb = RotaryAtPositions(frequencies, window_frequencies)
    # GPTModel then takes what the module returns as it is, also where it would expect YaRN's scale beside it.
    model.position_embedding_type = "rope"


def _rotate_latent_layers(layers: Sequence[MultiLatentAttention], frequencies: Tensor | None) -> None:
    rotary = layers[0].rotary_pos_emb
    if not isinstance(rotary, RotaryAtPositions):
        rotary = RotaryAtPositions(_frequencies_of(rotary) if frequencies is None else frequencies)
    for layer in layers:
        layer.rotary_pos_emb = rotary


def _frequencies_of(rotary: RotaryEmbedding) -> Tensor:
    """Of one of Megatron's modules, which has each angle twice."""
    angles = rotary.get_emb(1, offset=1)
    angles = (angles[0] if isinstance(angles, tuple) else angles).flatten()
    return angles[::2] if rotary.rotary_interleaved else angles[: angles.numel() // 2]


def angles_of_values(angles: Tensor, interleaved: bool) -> Tensor:
    """Angles [sq, 1, 1, r] as Megatron has them: [sq, 1, 1, 2 * r], one for each value of a pair."""
    return angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)


def cosines_and_sines(angles: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, of angles [sq, 1, 1, r]; `scale` is YaRN's (arXiv 2309.00071)."""
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


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
