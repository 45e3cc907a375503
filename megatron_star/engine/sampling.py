"""Choosing the next token of one request, with Megatron's sampling and the request's own generator."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core.inference.sampling.torch_sampling import TorchSampling
from megatron.core.inference.sampling_params import SamplingParams
from torch import Tensor


class Choice(NamedTuple):
    """A token that was drawn, and the most likely one, with their log-probabilities at temperature 1."""

    token: int
    logprob: float
    likeliest: int
    likeliest_logprob: float


class TokenSampler:
    """Samples for one request; what it draws depends on its seed alone, not on its neighbours."""

    def __init__(self, sampling: SamplingParams, seed: int) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, logits: Tensor, forbidden: Sequence[int] = ()) -> Choice:
        """The next token, of logits [vocab_size], float32, CPU.

        Args:
            forbidden: tokens that must not be chosen; log-probabilities are as without.
        """
        allowed = logits
        if forbidden:
            allowed = logits.index_fill(0, torch.tensor(forbidden), -math.inf)
        token = self._choose(allowed[None])
        logprobs = logits.log_softmax(-1)
        likeliest = int(logits.argmax())
        return Choice(token, float(logprobs[token]), likeliest, float(logprobs[likeliest]))

    def _choose(self, logits: Tensor) -> int:
        """A token of logits [1, vocab_size]; top_p is taken of what top_k leaves."""
        top_k, top_p, temperature = self.sampling.top_k, self.sampling.top_p, self.sampling.temperature
        if temperature == 0.0:
            top_k, top_p, temperature = 1, 0.0, 1.0
        if top_k > 1 and top_p > 0.0:  # Megatron's sampling takes one of them at a time
            logits = TorchSampling.filter_logits(logits, temperature, top_k, 0.0)
            top_k, temperature = 0, 1.0
        token = TorchSampling.sample_from_logits(
            logits,
            temperature,
            top_k,
            0.0 if top_k else top_p,
            generator=self.generator,
            vocab_size=logits.size(-1),
        )
        return int(token.item())
