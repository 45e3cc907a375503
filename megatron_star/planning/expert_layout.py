"""Experts over ranks: how many share them, what that sends, and what the busiest rank of a step reads.

To Megatron, context-parallel ranks are data-parallel ranks, so experts spread over all TP x CP of them.
Tokens are taken to choose experts evenly, whatever the router really does.
"""

from functools import cache
from math import comb
from typing import NamedTuple

from megatron_star.planning.model_shape import ModelShape, expert_input


class ExpertLayout(NamedTuple):
    """
    Attributes:
        tp_size: ranks that share all that is not an expert.
        ep_size: ranks over which the experts of a layer are spread.
        expert_tp_size: ranks over which each expert is cut.
    """

    tp_size: int
    ep_size: int
    expert_tp_size: int

    @property
    def num_ranks(self) -> int:
        """Consecutive ranks that hold each expert once."""
        return self.ep_size * self.expert_tp_size

    @property
    def dispatches(self) -> bool:
        """Whether context encoding sends rows to the experts' ranks. Where these are one TP group, all have
        the same rows: each runs its own experts, and a sum follows. Otherwise each TP rank takes its slice
        of the rows. Either way it does 1 / TP of the work of the rows.
        """
        return self.num_ranks != self.tp_size

    def sent_rows(self, rows: int, chosen: int) -> float:
        """Rows that leave a rank in one layer, to the experts that they choose, once for each of these.

        A TP rank takes its slice of the rows.
        """
        if not self.dispatches:
            return 0.0
        return rows / self.tp_size * chosen * (1 - 1 / self.ep_size)

    def all_to_all_bytes(self, rows: int, shape: ModelShape, bytes_per_value: int) -> float:
        """What leaves a rank in one layer of context encoding: rows to their experts, and as much back.

        rows: that this rank encodes.
        """
        sent = self.sent_rows(rows, shape.moe_router_topk)
        return 2 * sent * expert_input(shape) * bytes_per_value

    def expert_tp_bytes(self, rows: int, shape: ModelShape, bytes_per_value: int) -> float:
        """What a rank then sends to those that share its experts: the rows that came, and the sums."""
        if not self.dispatches:
            return 0.0
        came = rows / self.tp_size * shape.moe_router_topk
        return 2 * (self.expert_tp_size - 1) * came * expert_input(shape) * bytes_per_value

    def sum_bytes(self, rows: int, shape: ModelShape, bytes_per_value: int) -> float:
        """What a rank sends in one layer where all ranks have the same rows, as in token generation: a ring's
        share of the sum of what the ranks' experts return.
        """
        ring = 2 * (self.num_ranks - 1) / self.num_ranks
        return ring * rows * expert_input(shape) * bytes_per_value

    def busiest(self, shape: ModelShape) -> float:
        """Of one token's experts in one layer, how many the rank with most of them is expected to have."""
        return _expected_most(shape.num_moe_experts, shape.moe_router_topk, self.ep_size)


@cache
def _expected_most(num_experts: int, chosen: int, num_ranks: int) -> float:
    """Of `chosen` different experts, all choices as likely, those of the rank that has most.

    The choices with at most m on each rank are counted by the coefficient of x^chosen in the product of the
    ranks' polynomials, in which that of x^k counts the choices of k of a rank's experts.
    """
    of_a_rank = num_experts // num_ranks
    choices, expected = comb(num_experts, chosen), 0.0
    for most in range(chosen):
        counts = [1] + [0] * chosen
        for _ in range(num_ranks):
            counts = [
                sum(comb(of_a_rank, k) * counts[total - k] for k in range(min(most, total) + 1))
                for total in range(chosen + 1)
            ]
        expected += 1 - counts[chosen] / choices
    return expected
