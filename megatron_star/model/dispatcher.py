"""Megatron's all-to-all of rows to the ranks of their experts, wherever gloo or a CPU runs it."""

import torch
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

_SPLITS = ("input_splits", "output_splits", "output_splits_tp")


class RowDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends each row to the ranks that hold its experts, and their results back.

    Every rank of the group `tp_ep` calls the same methods, with as many rows as it has; none is fine.
    """

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor:
        """The numbers of rows, on the host; on a CPU, where Megatron's has no stream, they are there."""
        if torch.cuda.is_available():
            return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == self.cuda_dtoh_point:
            for name in _SPLITS:
                splits = getattr(self, name)
                setattr(self, name, splits if splits is None else splits.numpy())
        return tokens_per_expert

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As Megatron's; see `_of_all_expert_tp_ranks`.

        Returns:
            Rows sorted by local expert, [rows, h]; how many each expert has, [local experts], int64; and the
            experts' weights in them, [rows].
        """
        rows, probs = map(self._of_all_expert_tp_ranks, (global_input_tokens, global_probs))
        tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_2", self.tokens_per_expert)
        if self.num_local_experts > 1:
            rows, probs = sort_chunks_by_idxs(
                rows,
                self.num_global_tokens_per_local_expert.ravel(),
                self.sort_input_by_local_experts,
                probs=probs,
                fused=self.config.moe_permute_fusion,
            )
        tokens_per_expert = self._maybe_dtoh_and_synchronize("before_finish", tokens_per_expert)
        self.tokens_per_expert = None
        return rows, tokens_per_expert, probs

    def _of_all_expert_tp_ranks(self, rows: Tensor) -> Tensor:
        """What all these ranks were sent, of which each holds a part of every expert here.

        Megatron gathers these rows. They differ in number, and gloo gathers only tensors of one size, but
        sends any.
        """
        if self.tp_size == 1:
            return rows
        sent = rows.repeat(self.tp_size, *[1] * (rows.dim() - 1))
        splits = self.output_splits_tp.tolist()
        return all_to_all(self.tp_group, sent, splits, [rows.size(0)] * self.tp_size)
