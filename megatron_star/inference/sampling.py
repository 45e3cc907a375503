"""Choosing the next token of one request, with Megatron's sampling and the request's own generator."""

import torch
from megatron.core.inference.sampling.torch_sampling import TorchSampling
from megatron.core.inference.sampling_params import SamplingParams
from torch import Tensor


class TokenSampler:
    """Samples for one request; what it draws depends on its seed alone, not on its neighbours."""

    def __init__(self, sampling: SamplingParams, seed: int) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, logits: Tensor) -> tuple[int, float]:
        """The next token, and its log-probability at temperature 1, of logits [vocab_size], float32, CPU."""
        greedy = self.sampling.temperature == 0.0
        token = TorchSampling.sample_from_logits(
            logits[None],
            1.0 if greedy else self.sampling.temperature,
            1 if greedy else self.sampling.top_k,
            0.0 if greedy else self.sampling.top_p,
            generator=self.generator,
            vocab_size=logits.numel(),
        ).item()
        return int(token), float(logits.log_softmax(-1)[token])
