"""How much of exact attention star would hide, measured without running star.

Star hides nothing from the query: it hides context tokens from each other. Of what context token p attends to
under exact attention, a mask hides a few ranges: star, what lies between the anchor and the first block seen.
The share of the softmax that lies in them is

    hidden mass = exp(LSE over the hidden keys - LSE over all keys up to p),

for each head of the layers whose mask the user's options choose. Keys in these ranges that a mask passes to p
are not hidden: their share is taken off. Which keys those are is found in exact attention's KV (`NamedKeys`).
Shapes: P probed tokens, S masks, b = 1, np query heads, ng KV heads, hn head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.kv_pieces import pieces_within
from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.attention.merge import PartialSum
from megatron_star.attention.partial import Partial
from megatron_star.evaluation.named_keys import NamedKeys
from megatron_star.model.attention import ForwardPass, LayerAttention, PassIsComplete
from megatron_star.planning.layer_mask import LayerMask
from megatron_star.planning.mask import Mask, Range
from megatron_star.planning.segment import Source

Ranges = tuple[Range, ...]


def hidden_masses(
    star_model: StarModel,
    token_ids: Sequence[int],
    exact: EncodedContext,
    masks: Sequence[Mask],
    positions: Sequence[int],
) -> list[float]:
    """For each mask, the mean hidden mass over these positions, all layers and this TP rank's heads.

    Args:
        token_ids: the whole context.
        exact: the context as exact attention encodes it, on every rank, with all of it kept.
        positions: of the context tokens that are looked at; at least one.
    """
    probing = ProbingPass(star_model, exact, positions, masks)
    star_model.forward([token_ids[position] for position in positions], probing)
    return torch.stack(probing.masses).mean(0).tolist() if probing.masses else [0.0] * len(masks)


class ProbingPass(ForwardPass):
    """Context tokens once more, each seeing the stored KV up to itself: exactly what exact attention did."""

    def __init__(
        self,
        star_model: StarModel,
        context: EncodedContext,
        positions: Sequence[int],
        masks: Sequence[Mask],
    ) -> None:
        position_ids = torch.tensor(positions, dtype=torch.int64, device=star_model.device)
        super().__init__(position_ids, (context.is_long,))
        self.exchange, self.kernel, self.context = star_model.exchange, star_model.kernel, context
        self.num_layers: int = star_model.model.config.num_layers
        self.positions = positions
        # One row for what each token sees, then one for what each mask hides from it.
        seen = [(Range(0, position + 1),) for position in positions]
        self.keys: list[Ranges] = [
            *seen,
            *(mask.hidden(position) for mask in masks for position in positions),
        ]
        self.named = NamedKeys(context, star_model.exchange, masks, positions)
        self.masses: list[Tensor] = []

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Note each mask's mean hidden mass [S] of this layer; see `ForwardPass.attend`."""
        if layer.mask:
            return self._attend_in_bands(layer, layer.mask, query)
        num_probed = query.size(0)
        rows = query.repeat(len(self.keys) // num_probed, 1, 1, 1)
        attention = layer.of_few_rows(self.kernel, rows)
        for row, ranges in enumerate(self.keys):
            for source in self._held(ranges):
                attention.add([(row, row + 1)], *self.context.read(layer.number, source))
        found = attention.merged()
        merged_lse = self.exchange.gather(found.softmax_lse).logsumexp(0)
        lses = merged_lse[0].unflatten(-1, (-1, num_probed))  # [np, 1 + S, P]
        hidden = (lses[:, 1:] - lses[:, :1]).exp() - self._passed(layer, query, (key, value), lses[:, 0])
        self.masses.append(hidden.clamp(min=0).mean(dim=(0, 2)).cpu())
        if layer.number == self.num_layers:
            raise PassIsComplete
        out, lse = self.exchange.merge(found)
        return Partial(out[:, :, :num_probed], lse[:, :, :num_probed])

    def _passed(self, layer: LayerAttention, query: Tensor, like: KeyValue, lse_of_all: Tensor) -> Tensor:
        """[np, S, P]: the share of the softmax that the keys have which each mask passes to each token.

        lse_of_all: [np, P].
        """
        shares = lse_of_all.new_zeros(lse_of_all.size(0), self.named.num_masks, len(self.positions))
        for mask, row, passed in self.named.passed(layer.number, like):
            attention = layer.of_few_rows(self.kernel, query[row : row + 1])
            attention.add([(0, 1)], *passed)
            shares[:, mask, row] = (attention.merged().softmax_lse[0, :, 0] - lse_of_all[:, row]).exp()
        return shares

    def _attend_in_bands(self, layer: LayerAttention, mask: LayerMask, query: Tensor) -> Partial:
        """A layer with a mask of its own, of which no other mask hides anything."""
        partials, pieces = PartialSum(query), self.context.recent(layer.number)
        for row, position in enumerate(self.positions):
            for seen in pieces_within(pieces, mask.first_seen(position), position + 1):
                part = self.kernel(
                    query[row : row + 1], *seen[2:], causal=False, softmax_scale=layer.softmax_scale
                )
                partials.add_rows(row, row + 1, part)
        if layer.number == self.num_layers:
            raise PassIsComplete
        return self.exchange.merge(partials.merged())

    def _held(self, ranges: Ranges) -> list[Source]:
        """The parts of these ranges that this rank stores."""
        plan, rank = self.context.plan, self.exchange.cp_rank
        return [source for keys in ranges for source in plan.owners_of(keys) if source.owner == rank]
