"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) around any kernel.

What is stored of a token is one KV head: as its key the latent, normalised, and behind it the key's part that
is rotated, which all query heads share; as its value nothing, since that is made of the latent, too. There
are two ways to attend to it, with equal results:

- expanded: the latents are projected up to a key and a value for each query head;
- absorbed: the up-projection of keys is applied to the queries instead. These attend to the stored key, with
  its latent as the value, and what comes of it is projected up. Parts are merged before that, as latents.

Shapes: tokens first, then b = 1, np query heads of this TP rank; l values of a latent, d and r those of a
head's query that are not rotated and that are, hv of its value.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_star.attention.kv_layout import KeyValue
from megatron_star.attention.partial import AttentionKernel, Partial
from megatron_star.attention.running import RunningAttention
from megatron_star.attention.torch_latent import product
from megatron_star.planning.cost_model import latent_form
from megatron_star.planning.model_shape import ModelShape

EXPANDED_BYTES = 1 << 29
"""Keys and values of a source that are in memory at a time; a piece is never smaller than a token."""


@dataclass(frozen=True)
class LatentKernel:
    """Two kernels as one, for keys of either form.

    Attributes:
        stored_size: head size of stored keys, which `absorbed` attends to.
    """

    stored_size: int
    expanded: AttentionKernel
    absorbed: AttentionKernel

    @property
    def name(self) -> str:
        """Of the kernel for expanded keys, which can be chosen."""
        return self.expanded.name

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Partial:
        """See `AttentionKernel`."""
        is_stored = key.size(2) == 1 and key.size(3) == self.stored_size
        return (self.absorbed if is_stored else self.expanded)(query, key, value, **options)


class Latent(NamedTuple):
    """What a layer makes of latents.

    Attributes:
        weight: of the up-projection, [np * (d + hv), l], as it is now.
        shape: the model's, for `latent_form`; with its sizes.
    """

    weight: Callable[[], Tensor]
    shape: ModelShape

    def absorbed(self, query: Tensor) -> Tensor:
        """Query [sq, 1, np, d + r] to [sq, 1, np, l + r], which attends to stored keys."""
        plain, rotated = query.split([self.shape.qk_head_dim, self.shape.qk_pos_emb_head_dim], -1)
        up_key, _ = self._of_heads()
        in_latents = torch.bmm(plain.squeeze(1).transpose(0, 1), up_key)
        return torch.cat((in_latents.transpose(0, 1).unsqueeze(1), rotated), -1)

    def projected_up(self, part: Partial) -> Partial:
        """What absorbed queries read, [1, np, sq, l], to [1, np, sq, hv], in float32."""
        _, up_value = self._of_heads()
        latents = part.out.squeeze(0).to(up_value.dtype)
        return part._replace(out=product(latents, up_value.transpose(1, 2)).unsqueeze(0))

    def latents(self, key: Tensor) -> Tensor:
        """Of stored keys [sk, 1, 1, l + r], as values: a view."""
        return key[..., : self.shape.kv_lora_rank]

    def expanded(self, key: Tensor) -> KeyValue:
        """Stored keys [sk, 1, 1, l + r] to keys [sk, 1, np, d + r] and values [sk, 1, np, hv]."""
        sizes = [self.shape.qk_head_dim, self.shape.v_head_dim]
        # As a matrix: of [sk, 1, l] that is a view, torch makes one product for each token.
        up = torch.nn.functional.linear(self.latents(key).flatten(0, 2), self.weight()).unsqueeze(1)
        plain, value = up.unflatten(-1, (-1, sum(sizes))).split(sizes, -1)
        rotated = key[..., self.shape.kv_lora_rank :].expand(-1, -1, plain.size(2), -1)
        return torch.cat((plain, rotated), -1), value

    def expanded_pieces(self, key: Tensor) -> Iterator[KeyValue]:
        """The same in pieces of at most `EXPANDED_BYTES`."""
        of_heads, _ = self._of_heads()
        bytes_of_token = self.weight().size(0) * key.element_size()
        bytes_of_token += of_heads.size(0) * self.shape.qk_pos_emb_head_dim * key.element_size()
        yield from map(self.expanded, key.split(max(1, EXPANDED_BYTES // bytes_of_token)))

    def _of_heads(self) -> tuple[Tensor, Tensor]:
        """Of the weight, what makes keys, [np, d, l], and what makes values, [np, hv, l]."""
        sizes = [self.shape.qk_head_dim, self.shape.v_head_dim]
        return self.weight().unflatten(0, (-1, sum(sizes))).split(sizes, 1)


class AbsorbedAttention(RunningAttention):
    """For few rows, as in token generation: absorbed, and projected up once, after all parts are merged."""

    def __init__(self, kernel: AttentionKernel, softmax_scale: float, query: Tensor, latent: Latent) -> None:
        super().__init__(kernel, softmax_scale, latent.absorbed(query), latent.shape.kv_lora_rank)
        self.latent = latent

    def set_causal(self, start: int, end: int, key: Tensor, value: Tensor) -> None:
        """See `RunningAttention`."""
        super().set_causal(start, end, key, self.latent.latents(key))

    def add(
        self, rows: Iterable[tuple[int, int]], key: Tensor, value: Tensor, *, causal: bool = False
    ) -> None:
        """See `RunningAttention`."""
        super().add(rows, key, self.latent.latents(key), causal=causal)

    def merged(self) -> Partial:
        """See `RunningAttention`."""
        return self.latent.projected_up(super().merged())


class CheaperFormAttention(RunningAttention):
    """For many rows, as in context encoding: each source in the form that costs less for all rows that read
    it; parts are merged as values."""

    def __init__(self, kernel: AttentionKernel, softmax_scale: float, query: Tensor, latent: Latent) -> None:
        super().__init__(kernel, softmax_scale, query, latent.shape.v_head_dim)
        self.latent = latent

    def set_causal(self, start: int, end: int, key: Tensor, value: Tensor) -> None:
        """See `RunningAttention`."""
        if self._absorbs(end - start, key):
            self.partials.set_rows(start, end, self._absorbed_part(start, end, key, causal=True))
        else:
            super().set_causal(start, end, *self.latent.expanded(key))

    def add(
        self, rows: Iterable[tuple[int, int]], key: Tensor, value: Tensor, *, causal: bool = False
    ) -> None:
        """See `RunningAttention`; without causal."""
        assert not causal, "tokens that follow a context are few: they are absorbed"
        rows = list(rows)
        if self._absorbs(sum(end - start for start, end in rows), key):
            for start, end in rows:
                self.partials.add_rows(start, end, self._absorbed_part(start, end, key, causal=False))
        elif rows:
            for piece in self.latent.expanded_pieces(key):
                super().add(rows, *piece)

    def _absorbs(self, num_rows: int, key: Tensor) -> bool:
        return latent_form(num_rows, key.size(0), self.latent.shape) == "absorbed"

    def _absorbed_part(self, start: int, end: int, key: Tensor, *, causal: bool) -> Partial:
        part = self.attend(self._absorbed_query[start:end], key, self.latent.latents(key), causal=causal)
        return self.latent.projected_up(part)

    @cached_property
    def _absorbed_query(self) -> Tensor:
        return self.latent.absorbed(self.query)
