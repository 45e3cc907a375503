"""Megatron's layer of experts, whose experts are spread over ranks, in both phases.

To Megatron our CP ranks are data-parallel ranks, so experts spread over CP x TP: the ranks of the group
`tp_ep` hold all experts of a layer together. In token generation they all have the same rows, so each
computes its own experts, and one sum gives the output. In context encoding rows differ, and travel to their
experts.

Shapes: n rows (tokens of this forward pass), b = 1, h hidden size, E experts, of which L are on this rank.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_star.model.attention import ForwardPass
from megatron_star.model.dispatcher import RowDispatcher
from megatron_star.parallel.exchange import Exchange
from megatron_star.parallel.groups import StarGroups, are_same_ranks


class ExpertRows:
    """What the expert layers of a model share: which rows the running forward pass has on which ranks.

    Attributes:
        exchange: sums over the ranks that hold all experts together.
        are_within_cp_rank: whether these are the ranks of one CP rank, and so have the same rows in any pass.
        are_same: whether these ranks have the same rows.
        is_filler: whether the only row stands for no token.
        are_counted: whether this rank counts its rows as load, so that of the same rows one rank does.
    """

    def __init__(self, groups: StarGroups, exchange: Exchange) -> None:
        """exchange: of the CP group."""
        tp, tp_ep = groups.model.tp, groups.model.tp_ep
        self.exchange = exchange if are_same_ranks(tp_ep, groups.cp) else Exchange(tp_ep)
        self.are_within_cp_rank = are_same_ranks(tp_ep, tp)
        self._tp_rank: int = tp.rank()
        self._cp_rank: int = groups.cp.rank()
        self.are_same = self.is_filler = self.are_counted = False

    def begin(self, forward_pass: ForwardPass) -> None:
        """Called before each forward pass."""
        is_replicated = forward_pass.is_replicated
        self.are_same = is_replicated or self.are_within_cp_rank
        self.is_filler = forward_pass.is_filler
        self.are_counted = not self.are_same or (self._tp_rank == 0 and not (is_replicated and self._cp_rank))


class StarMoELayer(MoELayer):
    """A layer of experts of which each rank holds some, or a part of each, and computes no row twice.

    Rows that are the same on several ranks must be so to the last bit: each rank asks its own router.

    Attributes:
        rows: shared by the layers of a model, from `share_rows`.
        load: [E], int64, rows that chose an expert since the model was made. The sum over all ranks counts
            each row of each forward pass once.
    """

    rows: ExpertRows

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        **options: Any,
    ) -> None:
        super().__init__(config, *args, pg_collection=pg_collection, **options)
        self.token_dispatcher = RowDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        load = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=device)
        self.register_buffer("load", load, persistent=False)

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """[n, 1, h] of this rank to the experts' output, [n, 1, h]; called on all ranks of `tp_ep`."""
        rows = hidden_states[:0] if self.rows.is_filler else hidden_states
        output = self._sum_of_own_experts(rows) if self.rows.are_same else self._dispatched(rows)
        output = F.pad(output, (0, 0, 0, 0, 0, hidden_states.size(0) - rows.size(0)))
        shared = self.shared_experts_compute(hidden_states)
        return output if shared is None else output + shared, None

    def _sum_of_own_experts(self, rows: Tensor) -> Tensor:
        """Of the same rows on all ranks: each computes its own experts in the rows that chose them."""
        output = self._added_up(self._part_of_own_experts(rows, *self._routed(rows))).unsqueeze(1)
        return self.fc2_latent_proj(output)[0] if self.config.moe_latent_size else output

    def _part_of_own_experts(self, rows: Tensor, probs: Tensor, chosen: Tensor) -> Tensor:
        """[n, 1, h] to this rank's part of the experts' output, [n, h] or as latents."""
        own = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        probs, chosen = probs[:, own], chosen[:, own]
        most = min(self.config.moe_router_topk, self.num_local_experts)
        is_unknown = rows.is_cuda and getattr(self.experts, "ignores_rows_of_no_expert", False)
        expert, row = rows_by_expert(chosen, most * rows.size(0) if is_unknown else None)
        if self.config.moe_latent_size:
            rows = self.fc1_latent_proj(rows)[0]
        outs, _ = self.experts(rows.flatten(1)[row], chosen.sum(0), probs[row, expert])
        if outs.is_cpu:
            return sum_in_order(outs, row, rows.size(0))
        return sum_by_row(outs, expert, row, chosen, most)

    def _added_up(self, part: Tensor) -> Tensor:
        exchange = self.rows.exchange
        return part if exchange.cp_size == 1 else exchange.add_up(part)

    def _dispatched(self, rows: Tensor) -> Tensor:
        """Of rows that differ: those of a CP rank are cut over its TP ranks, which all have them."""
        num_rows, tp_size = rows.size(0), self.attn_tp_group.size()
        num_own = -(-num_rows // tp_size)
        start = self.attn_tp_group.rank() * num_own
        own = rows[start : start + num_own]
        if rows.is_cpu and self.rows.exchange.cp_size <= self.config.moe_router_topk:
            output = self._by_ranks_with_all_rows(own)
        else:
            output, probs = self.dispatch(*self.preprocess(own, *self._routed(own)))
            output = self.combine(self.routed_experts_compute(output, probs)[0])
            output = self.postprocess(output, None)
        if tp_size == 1 or not num_rows:
            return output
        output = F.pad(output, (0, 0, 0, 0, 0, num_own - output.size(0)))
        return gather_from_sequence_parallel_region(output, group=self.attn_tp_group)[:num_rows]

    def _by_ranks_with_all_rows(self, own: Tensor) -> Tensor:
        """The same, where every rank gets all rows, and computes its own experts in them.

        Each row goes to a rank once, however many experts it has there; and one sum of these comes back. So
        fewer bytes are sent and copied where a row has more experts than there are ranks.
        """
        exchange, num_own = self.rows.exchange, own.size(0)
        group, rank, num_ranks = exchange.cp_group, exchange.cp_rank, exchange.cp_size
        sizes = exchange.gather(torch.tensor([num_own])).flatten().tolist()
        splits = [num_own] * num_ranks
        rows = all_to_all(group, own.repeat(num_ranks, 1, 1), sizes, splits)
        first = sum(sizes[:rank])
        routed = self._routed(rows, counted=slice(first, first + num_own))
        parts = all_to_all(group, self._part_of_own_experts(rows, *routed), splits, sizes)
        output = parts.unflatten(0, (num_ranks, num_own)).sum(0, dtype=torch.float32)
        output = output.to(own.dtype).unsqueeze(1)
        return self.fc2_latent_proj(output)[0] if self.config.moe_latent_size else output

    def _routed(self, rows: Tensor, counted: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Weights of the experts, [n, E] in float32, and which are chosen, [n, E] in bool.

        counted: the rows that are this rank's load, if it counts any.
        """
        some = rows if rows.size(0) else rows.new_zeros(1, *rows.shape[1:])  # routers cannot reshape none
        probs, chosen = (routed[: rows.size(0)] for routed in self.route(some))
        if self.rows.are_counted:
            self.load += chosen[counted].sum(0)
        return probs, chosen


def rows_by_expert(chosen: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """The experts that rows chose, and these rows: sorted by expert, then by row.

    Args:
        chosen: [n, L], bool.
        size: the length of the results, with -1 behind; None where it is read from `chosen`, on the host.

    Returns:
        Twice [pairs], int64.
    """
    by_expert = chosen.t()
    if size is None:
        return by_expert.nonzero(as_tuple=True)
    return torch.nonzero_static(by_expert, size=size).unbind(1)


def sum_by_row(outs: Tensor, expert: Tensor, row: Tensor, chosen: Tensor, most: int) -> Tensor:
    """[n, h], of each row's results the sum in float32; the same on every run, unlike atomic sums.

    Args:
        outs: [pairs, h], the results of `rows_by_expert`'s pairs; ignored where an expert is -1.
        chosen: [n, L], bool, with at most `most` in a row.
    """
    num_rows = chosen.size(0)
    place = row * most + (chosen.cumsum(1) - 1)[row, expert]
    nowhere = num_rows * most
    slots = outs.new_zeros(nowhere + 1, outs.size(1))
    slots[torch.where(expert < 0, nowhere, place)] = outs
    return slots[:-1].view(num_rows, most, outs.size(1)).sum(1, dtype=torch.float32).to(outs.dtype)


def sum_in_order(outs: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """The same on a CPU, which adds one result after the other: it needs no room for each a row may have."""
    total = torch.zeros(num_rows, outs.size(1), dtype=torch.float32)
    return total.index_add_(0, row, outs.float()).to(outs.dtype)


def moe_layers(model: torch.nn.Module) -> list[StarMoELayer]:
    """In the order of the layers.

    Raises:
        ValueError: a layer of experts is another one than `with_star_attention` puts there.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    for layer in layers:
        if not isinstance(layer, StarMoELayer):
            raise ValueError(
                f"the experts of layer {layer.layer_number} are {type(layer).__name__}, not StarMoELayer: "
                "build it with a layer specification that went through megatron_star.with_star_attention"
            )
    return layers


def share_rows(layers: Iterable[StarMoELayer], rows: ExpertRows) -> ExpertRows:
    """Tell the expert layers of a model which rows they have."""
    for layer in layers:
        layer.rows = rows
    return rows
