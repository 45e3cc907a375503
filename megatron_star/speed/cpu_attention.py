"""Attention on a CPU: torch's fused kernel in float32, or another way for few rows where that is faster.

Which way that is depends on the processor, on torch's libraries, and on how many rows and keys there are: it
is measured when a model is loaded (`choose_attention`). Each way is tested against torch's kernel.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_star.attention import torch_cpu
from megatron_star.attention.kv_layout import KeyValue, empty_kv
from megatron_star.attention.partial import Partial
from megatron_star.planning.model_shape import latent_attention
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.linear import linear_by_onednn
from megatron_star.speed.measured import agreed, fastest, least_seconds

log = logging.getLogger(__name__)

MOST_ROWS = 64
"""Of each KV head, the query heads of its group being rows: more are the fused kernel's."""
TOKENS = (1, 2, 4, 8, 16)
"""New tokens of the steps that are measured; with others it is as with the next larger number."""
KEYS = {512: 1024, 4096: 8192}
"""From so many keys on it is as with so many, which are measured. With fewer, all are fast."""
MOST_SCORES = 1 << 24
MOST_BYTES = 1 << 25
"""Of the keys and values that are measured, of which there are then fewer."""
CACHED_BYTES = 3 << 24
"""Keys and values of so many bytes are measured in turn, since a token finds none in a cache."""

FewRowsAttention = Callable[[Tensor, Tensor, Tensor, float], Partial]
"""Query [rows, b, heads, hn], key and value [keys, b, heads, hn] of one dtype, and the softmax scale: every
row sees every key."""


def fused(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
    """By torch's kernel, in float32."""
    return torch_cpu.attend(query, key, value, False, softmax_scale)


def fused_as_stored(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
    """By torch's kernel, without widening keys and values to float32."""
    tensors = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    return Partial(*torch_cpu.FUSED(*tensors, 0.0, False, scale=softmax_scale))


def whole_products(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
    """By matrix products over all keys; the fused kernel takes 512 at a time, which are too small ones for
    so few rows. All scores are in memory at once: too many are the fused kernel's.
    """
    if query.size(0) * query.size(2) * key.size(0) > MOST_SCORES:
        return fused(query, key, value, softmax_scale)
    parts = [
        _attend_heads(*(tensor[:, i].transpose(0, 1) for tensor in (query, key, value)), softmax_scale)
        for i in range(query.size(1))
    ]
    return Partial(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))


def _attend_heads(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
    """[heads, rows, hn] and twice [heads, keys, hn] to [heads, rows, hn] and LSE [heads, rows]."""
    # Keys first, MKL has a better kernel.
    scores = torch.bmm(key, (query * softmax_scale).transpose(1, 2)).transpose(1, 2).contiguous()
    weights = torch.softmax(scores, dim=-1)
    out = torch.stack([linear_by_onednn(*of_head) for of_head in zip(weights, value.mT, strict=True)])
    # The largest weight is exp(largest score - LSE).
    return Partial(out, scores.amax(-1) - weights.amax(-1).log_())


def ways(dtype: torch.dtype, native: FewRowsAttention | None) -> dict[str, FewRowsAttention]:
    """All that take this dtype; the first is what is taken unless another is faster.

    native: what `compile_few_rows_attention` has made, if anything.
    """
    others = {"products": whole_products} if dtype == torch.float32 else {"as stored": fused_as_stored}
    return {"fused": fused} | others | ({"native": native} if native else {})


@dataclass(frozen=True)
class CpuAttention:
    """An `Attend`; the same as `torch_cpu.attend`.

    Attributes:
        head_size, dtype: of the keys and values for which it was measured.
        chosen: the way for up to so many rows, ascending, by the number of keys from which on it is taken.
    """

    head_size: int = 0
    dtype: torch.dtype = torch.float32
    chosen: Mapping[int, Mapping[int, FewRowsAttention]] = field(default_factory=dict)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        softmax_scale: float,
        window: int | None = None,
    ) -> Partial:
        """See `Attend`."""
        if not causal and window is None and key.size(0) >= min(KEYS) and query.size(2) == key.size(2):
            return self._way(query, key)(query, key, value, softmax_scale)
        return torch_cpu.attend(query, key, value, causal, softmax_scale, window)

    def _way(self, query: Tensor, key: Tensor) -> FewRowsAttention:
        if query.dtype != self.dtype or query.size(3) != self.head_size:
            return fused
        of_rows = self.chosen[max(edge for edge in KEYS if edge <= key.size(0))]
        return next((way for rows, way in of_rows.items() if query.size(0) <= rows), fused)


@torch.inference_mode()
def choose_attention(star_model: FastStarModel) -> FastStarModel:
    """The model with the ways that are fastest here; called on all ranks together, which choose the same.

    Of latent attention, and of kernels that are not torch's own for a CPU, nothing is chosen.
    """
    config, kernel = star_model.model.config, star_model.kernel
    attend = getattr(kernel, "attend", None)
    if not isinstance(attend, CpuAttention) or latent_attention(config):
        return star_model
    dtype = config.params_dtype
    candidates = ways(dtype, star_model.native_attention)
    exchanges = star_model.exchange, star_model.tp_exchange
    seconds = agreed(_measured(config, candidates), exchanges)
    chosen: dict[int, dict[int, FewRowsAttention]] = {edge: {} for edge in KEYS}
    told = []
    for edge, rows in dict.fromkeys((edge, rows) for edge, rows, _ in seconds):
        of_ways = {name: seconds[edge, rows, name] for name in candidates}
        name = fastest(of_ways)
        chosen[edge][rows] = candidates[name]
        times = (f"{1e3 * of_ways[way]:.2f}" for way in dict.fromkeys((name, "fused")))
        told.append(f"{rows} x {KEYS[edge]} {name} ({' of '.join(times)})")
    if star_model.exchange.cp_rank == star_model.tp_exchange.cp_rank == 0:
        log.info(
            "attention on this processor, rows x keys: way (ms, of torch's fused kernel): %s", ", ".join(told)
        )
    return replace(star_model, kernel=replace(kernel, attend=CpuAttention(config.kv_channels, dtype, chosen)))


def _measured(
    config: TransformerConfig, candidates: Mapping[str, FewRowsAttention]
) -> dict[tuple[int, int, str], float]:
    """Seconds of a call, by the number of keys from which on it counts, rows, and way."""
    heads, rows_of_token = heads_of_rank(config)
    sizes = [tokens * rows_of_token for tokens in TOKENS if tokens * rows_of_token <= MOST_ROWS]
    stored = _stored(heads, config.kv_channels, config.params_dtype)
    seconds = {}
    for edge, num_keys in KEYS.items():
        for rows in sizes:
            query = stored[0][0].new_ones(rows, 1, heads, config.kv_channels)
            given = _in_turn(stored, num_keys)
            actions = {
                (edge, rows, name): lambda way=way, given=given, query=query: way(query, *next(given), 0.1)
                for name, way in candidates.items()
            }
            seconds |= least_seconds(actions)
    return seconds


def heads_of_rank(config: TransformerConfig) -> tuple[int, int]:
    """KV heads of a TP rank, and query heads of each."""
    tp_size = config.tensor_model_parallel_size
    heads = max(1, config.num_query_groups // tp_size)
    return heads, config.num_attention_heads // tp_size // heads


def _stored(heads: int, head_size: int, dtype: torch.dtype) -> list[KeyValue]:
    """Keys and values as they lie in memory, [keys, 1, heads, head_size] each, several times."""
    like = torch.empty(1, 1, heads, head_size, dtype=dtype)
    num_keys = min(max(KEYS.values()), max(1024, MOST_BYTES // (2 * like.nbytes)))
    copies = max(1, min(16, CACHED_BYTES // (2 * num_keys * like.nbytes)))
    return [tuple(empty_kv(num_keys, like).fill_(1) for _ in range(2)) for _ in range(copies)]


def _in_turn(stored: list[KeyValue], num_keys: int) -> Iterator[KeyValue]:
    """The first keys of one after the other, without end."""
    return cycle([(key[:num_keys], value[:num_keys]) for key, value in stored])
