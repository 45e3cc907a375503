"""Rows of logits of every shape, to be sampled in every way."""

import random

import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_star.engine.sampling import FEWEST_CANDIDATES, RowToSample, uniform

VOCAB_SIZE = 3001


def rows_of_all_kinds(count: int, seed: int = 0) -> list[RowToSample]:
    """All parameters in all combinations, and forbidden tokens in a fourth of the rows."""
    generator = random.Random(seed)
    top_ks = [0, 2, 20, 300, FEWEST_CANDIDATES, 2500]
    return [
        RowToSample(
            SamplingParams(
                temperature=generator.choice([0.0, 0.3, 1.0, 1.0, 1.7]),
                top_k=generator.choice(top_ks) if generator.random() < 0.5 else 0,
                top_p=generator.choice([0.0, 0.02, 0.5, 0.95, 1.0]),
            ),
            uniform(seed, i),
            generator.sample(range(VOCAB_SIZE), 3) if generator.random() < 0.25 else (),
        )
        for i in range(count)
    ]


def logits_of_all_kinds(count: int) -> torch.Tensor:
    """Peaked to nearly flat, every second row with the few values of bfloat16: most tokens are tied."""
    torch.manual_seed(0)
    logits = (
        torch.randn(count, VOCAB_SIZE) * torch.tensor([0.02, 0.5, 2.0, 4.0, 8.0]).repeat(count)[:count, None]
    )
    logits[::2] = logits[::2].bfloat16().float()
    return logits + 10.0
