"""The uses of a model that every family is tested with; lengths in tokens.

The windows (and chunks) of the small models have 13 tokens: more than a block of 9, less than one of 31, and
more than some contexts, turns and queries have.
"""

from typing import NamedTuple

import torch
from random_models import VOCAB_SIZE

from megatron_star.config import StarConfig

WINDOW = 13
NUM_CONTEXT, NUM_QUERY, NUM_GENERATED = 61, 5, 2


class Other(NamedTuple):
    """A context that is encoded first. Its first tokens are the case's, and are not encoded again.

    Attributes:
        num_common: so many.
        turns: where it and its turns end, as those of a case.
    """

    num_common: int
    turns: tuple[int, ...]


class Case(NamedTuple):
    """A context, and a query with the tokens after it.

    Attributes:
        turns: where the contexts end that are encoded one after the other, each extending the one before.
        query: tokens that are fed at once; then NUM_GENERATED are, one by one.
    """

    star: StarConfig
    turns: tuple[int, ...] = (NUM_CONTEXT,)
    query: int = NUM_QUERY
    other: Other | None = None

    @property
    def token_ids(self) -> list[int]:
        """Of context, query and generated tokens."""
        count = self.turns[-1] + self.query + NUM_GENERATED
        return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(3)).tolist()


CASES: dict[str, Case] = {
    "exact": Case(StarConfig(mode="exact")),
    "exact, two turns, in waves": Case(StarConfig(mode="exact", wave_tokens=17), turns=(39, 61)),
    "star, a window longer than a block": Case(StarConfig(block_size=9)),
    "star, one neighbor, in waves": Case(StarConfig(block_size=9, neighbor_blocks=1, wave_tokens=11)),
    "star, a recomputed anchor, a window shorter than a segment": Case(
        StarConfig(block_size=31, anchor="recompute")
    ),
    "star, a context shorter than the window": Case(StarConfig(block_size=4), turns=(9,)),
    "star, a small anchor, a query longer than the window": Case(
        StarConfig(block_size=9, anchor_size=2), turns=(23,), query=17
    ),
    "star, three turns, two shorter than the window": Case(
        StarConfig(block_size=9, neighbor_blocks=1), turns=(48, 55, 61)
    ),
    "exact, on a prefix of another context": Case(
        StarConfig(mode="exact", wave_tokens=17), other=Other(40, (52,))
    ),
    "star, on a prefix within a block of a context shorter than the window": Case(
        StarConfig(block_size=9), turns=(9, 61), other=Other(11, (9, 12))
    ),
    "star, no context": Case(StarConfig(block_size=9), turns=(0,), query=19),
}
FOR_SPEED = CASES["star, three turns, two shorter than the window"]
"""What is also run with slices of the weights, and with compiled layers."""
