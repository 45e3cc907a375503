"""A Hugging Face model whose attention is a candidate's, through transformers' `AttentionInterface`."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.decode import cache_argument
from benchmarks.repair_attention import Heads, ask, attend_to_all, encode, hidden_mass
from benchmarks.repair_candidates import HIDDEN, Candidate
from megatron_star.attention.kernels import select_kernel
from megatron_star.planning.mask import StarMask

INTERFACE = "repairs"
NUM_PROBES = 64
NOT_OURS = ("sliding_window", "softcap", "s_aux")

Attend = Callable[[int, Heads], Tensor]
"""[sq, 1, np, hn] of a layer, counted from 1, and its heads."""


class Outcome(NamedTuple):
    """Whether the right answer is the most likely one at every place, and its log-probability, in nats."""

    right: bool
    log_probability: float


class Encoded(NamedTuple):
    """The KV of a context, and the seconds that it took."""

    cache: DynamicCache
    num_tokens: int
    seconds: float


class RepairedModel:
    """Encodes contexts and asks about them as candidates say. On the CPU, one sequence at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Raises:
            ValueError: no kernel fits this model.
        """
        AttentionInterface.register(INTERFACE, _attention)
        self.model = model.eval()
        self.model.set_attn_implementation(INTERFACE)
        self.num_layers: int = model.config.num_hidden_layers
        head_size = getattr(model.config, "head_dim", None) or (
            model.config.hidden_size // model.config.num_attention_heads
        )
        self.kernel = select_kernel("auto", device=model.device, dtype=model.dtype, head_size=head_size)

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype) -> Self:
        """Raises ValueError or OSError if there is none that fits."""
        return cls(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[int], candidate: Candidate) -> Encoded:
        """The context; `exact_layers` are named, not counted. Of the last layer, only its KV is wanted."""
        exact = candidate.layers_without_blocks(self.num_layers)

        def attend(layer: int, heads: Heads) -> Tensor:
            if layer == self.num_layers:
                return torch.zeros_like(heads.query)
            return attend_to_all(heads) if layer in exact else encode(candidate, heads)

        start = perf_counter()
        cache = self._encode(token_ids, attend)
        return Encoded(cache, len(token_ids), perf_counter() - start)

    @torch.inference_mode()
    def outcome(
        self, encoded: Encoded, candidate: Candidate, query: Sequence[int], answer: Sequence[int]
    ) -> Outcome:
        """Of one question, shown the answer; the cache is then as it was."""

        def attend(layer: int, heads: Heads) -> Tensor:
            return ask(candidate, heads, encoded.num_tokens)

        tokens = [*query, *answer[:-1]]
        logits = self.model(
            input_ids=torch.tensor([tokens]),
            logits_to_keep=len(answer),
            **self._arguments(attend, encoded.cache),
        ).logits[0]
        encoded.cache.crop(-len(tokens))
        expected = torch.tensor(answer)
        log_probabilities = logits.float().log_softmax(-1).gather(1, expected[:, None])
        return Outcome(bool((logits.argmax(-1) == expected).all()), float(log_probabilities.sum()))

    @torch.inference_mode()
    def hidden_masses(self, token_ids: Sequence[int], candidate: Candidate) -> list[float]:
        """For each layer, how much of exact's attention between context tokens star's blocks would hide."""
        num_tokens, masses = len(token_ids), []
        mask = StarMask(tuple(candidate.edges(num_tokens)), candidate.num_anchor(num_tokens))
        positions = [num_tokens * i // NUM_PROBES - 1 for i in range(1, NUM_PROBES + 1)]

        def attend(layer: int, heads: Heads) -> Tensor:
            masses.append(hidden_mass(mask, heads, positions))
            return attend_to_all(heads)

        self._encode(token_ids, attend)
        return masses

    def _encode(self, token_ids: Sequence[int], attend: Attend) -> DynamicCache:
        cache = DynamicCache()
        self.model.model(input_ids=torch.tensor([token_ids]), **self._arguments(attend, cache))
        return cache

    def _arguments(self, attend: Attend, cache: DynamicCache) -> dict[str, Any]:
        """The cache, and what the model hands through to `_attention`."""
        return {
            cache_argument(self.model): cache,
            "use_cache": True,
            "star_attend": attend,
            "star_kernel": self.kernel,
        }


def with_named_layers(
    candidate: Candidate, model: RepairedModel, contexts: Iterable[Sequence[int]]
) -> Candidate:
    """Its `exact_layers` by number: those in which its blocks hide most, in the mean over these contexts.

    The last layer is not one of them: nothing is attended to there.
    """
    if not candidate.exact_layers.startswith(HIDDEN):
        return candidate
    masses = torch.tensor([model.hidden_masses(context, candidate) for context in contexts])[:, :-1].mean(0)
    num = int(candidate.exact_layers.removeprefix(HIDDEN))
    if num > len(masses):
        raise ValueError(f"candidate {str(candidate)!r}: there are {len(masses)} layers to choose from")
    return candidate.with_exact_layers(sorted((masses.topk(num).indices + 1).tolist()))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    star_attend: Attend,
    star_kernel: Any,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, np, sq, hn], key and value [1, ng, sk, hn]; out [1, sq, np, hn]."""
    if found := [name for name in NOT_OURS if others.get(name) is not None]:
        raise ValueError(f"this model's attention has {found[0]}, which is not compared here")
    q, k, v = (tensor.permute(2, 0, 1, 3) for tensor in (query, key, value))
    out = star_attend(module.layer_idx + 1, Heads(q, k, v, scaling, star_kernel))
    return out.transpose(0, 1), None
