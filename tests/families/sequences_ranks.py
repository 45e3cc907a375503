"""Sequences of one model in one step, on each rank."""

from ranks import load
from torch import Tensor

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import choose_plan, token_costs

Fed = list[list[int]]


def together_and_alone(
    checkpoint: str, context_ids: list[int], fed: list[Fed]
) -> list[tuple[Tensor, Tensor]]:
    """Logits of each step of sequences on one context, with all of them in a step and each by itself.

    fed: what each sequence is fed, step by step; one that has no more tokens is left out.
    """
    star_model, _ = load(checkpoint, 1)
    exchange, costs = star_model.exchange, token_costs(star_model.model.config)
    _, plan = choose_plan(len(context_ids), exchange.cp_size, StarConfig(block_size=9), costs)
    context = encode_context(star_model, context_ids, plan)

    def sequences() -> list[Sequence]:
        return [Sequence(context, tail_rank=i % exchange.cp_size) for i in range(len(fed))]

    alone = [
        [generate_step(star_model, [(s, tokens)])[0] for tokens in steps]
        for s, steps in zip(sequences(), fed, strict=True)
    ]
    running, pairs = sequences(), []
    for step in range(max(map(len, fed))):
        active = [i for i, steps in enumerate(fed) if step < len(steps)]
        logits = generate_step(star_model, [(running[i], fed[i][step]) for i in active])
        pairs += [(found, alone[i][step]) for i, found in zip(active, logits, strict=True)]
    return pairs
