"""Where the rows of a sequence look in its context: the attention of the layers that see all of it.

A context token's *mass* is the attention probability that a head of a row gives it: exp(s - softmax_lse),
with its scaled score s and the log-sum-exp of all that the row sees, on whatever rank that is. Two numbers
come of the masses of a piece of the context.

- `mass`: their sum, as the mean of layers, heads and rows. All pieces' are 1 less what goes to the query,
  to the answer, and to sinks.
- `peak`: the largest of any token of the piece in any head of any layer, as the mean of rows. Most heads
  look at the first token or at what is near; few find what is asked for. So peaks show a needle that is not
  above others in the mean.

The first token takes a quarter of all mass, whatever it is: it is a piece of its own. Layers with a mask of
their own (windows, chunks) see the end of a context at most, and are left out.

Shapes: sq packed new tokens, b = 1, np query heads and ng KV heads of this TP rank, hn head size.
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import NewTokens, Sequence, TokenGenerationStep
from megatron_star.attention.partial import Partial
from megatron_star.model.attention import LayerAttention, StarCoreAttention
from megatron_star.model.transformer_config import own_field

TOKENS_OF_A_PIECE = 16
MOST_SCORES = 1 << 22
"""That are in memory at a time."""


class Looks(NamedTuple):
    """Of rows, at pieces of a context (`piece_edges`); of what one rank holds, or of all ranks.

    Attributes:
        masses: [pieces], float32: the sum of the rows' masses, as the mean of layers and heads.
        peaks: [rows, pieces], float32.
    """

    masses: Tensor
    peaks: Tensor


def num_pieces(num_tokens: int) -> int:
    """Of a context of so many tokens: the first token, and then each `TOKENS_OF_A_PIECE`."""
    return len(range(1, num_tokens, TOKENS_OF_A_PIECE)) + (num_tokens > 0)


def piece_edges(num_tokens: int) -> list[int]:
    """Where the pieces begin, and where the last one ends."""
    return [*range(min(1, num_tokens)), *range(1, num_tokens, TOKENS_OF_A_PIECE), num_tokens]


def pieces_of(start: int, end: int, device: torch.device) -> Tensor:
    """[end - start], int64: which piece each of these tokens is in."""
    return (torch.arange(start, end, device=device) + TOKENS_OF_A_PIECE - 1) // TOKENS_OF_A_PIECE


def full_attentions(model: GPTModel) -> list[StarCoreAttention]:
    """Of the layers that see all of a context."""
    attentions = (module for module in model.modules() if isinstance(module, StarCoreAttention))
    return [attention for attention in attentions if attention.layer.mask is None]


def observe(
    star_model: StarModel, sequence: Sequence, token_ids: SequenceOf[int], rows: SequenceOf[int]
) -> Looks:
    """Feed a sequence these tokens, and tell where these rows of them look; on all ranks together.

    The sequence has been fed by this function only.

    Returns:
        Of the context's tokens and the heads that this rank holds. Masses are to be added up over all ranks,
        of peaks the largest are to be taken.
    """
    step = ObservedStep(star_model, [NewTokens(sequence, token_ids, 0)], rows)
    star_model.forward(token_ids, step)
    sequence.num_tail_tokens += len(token_ids)
    return Looks(step.looks.masses.cpu(), step.looks.peaks.cpu())


class ObservedStep(TokenGenerationStep):
    """A step of one sequence that notes where some of its rows look.

    Attributes:
        observed: which rows.
    """

    may_be_compiled = False

    def __init__(
        self, star_model: StarModel, packed: SequenceOf[NewTokens], observed: SequenceOf[int]
    ) -> None:
        super().__init__(star_model, packed)
        (new,) = packed
        config, attentions = star_model.model.config, full_attentions(star_model.model)
        self.context, self.observed = new.sequence.context, star_model.on_device(observed)
        self.sinks = {each.layer.number: each.softmax_offset for each in attentions}
        self.softcap = own_field(config, "attention_softcap")
        self.share = 1.0 / (len(attentions) * config.num_attention_heads)
        pieces = num_pieces(self.context.plan.num_tokens)
        self.looks = Looks(
            torch.zeros(pieces, device=star_model.device),
            torch.zeros(len(observed), pieces, device=star_model.device),
        )

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """See `ForwardPass.attend`."""
        part = super().attend(layer, query, key, value)
        if layer.mask is None and len(self.observed):
            self._note(layer, query[self.observed], part.softmax_lse[0, :, self.observed])
        return part

    def _note(self, layer: LayerAttention, query: Tensor, softmax_lse: Tensor) -> None:
        """Of query [rows, 1, np, hn] and softmax_lse [np, rows] over all that the rows see."""
        sinks = self.sinks[layer.number]
        if sinks is not None:
            softmax_lse = torch.logaddexp(softmax_lse, sinks.to(torch.float32)[:, None])
        as_stored = layer.of_few_rows(self.kernel, query).query
        most = max(1, MOST_SCORES // (as_stored.size(0) * as_stored.size(2)))
        for start, end, key in keys_held(self.context, layer.number, most):
            scores = layer.softmax_scale * scores_of(as_stored, key)
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            masses = torch.exp(scores - softmax_lse.unsqueeze(-1))
            pieces = pieces_of(start, end, masses.device)
            self.looks.masses.index_add_(0, pieces, self.share * masses.sum((0, 1)))
            highest = masses.amax(0)
            self.looks.peaks.scatter_reduce_(1, pieces.expand_as(highest), highest, "amax")


def keys_held(context: EncodedContext, layer_number: int, most: int) -> Iterator[tuple[int, int, Tensor]]:
    """Start, end and keys [end - start, 1, ng, hn], as stored, of the tokens that this rank holds.

    most: tokens at a time.
    """
    for source in context.plan.stored:
        if source.owner != context.cp_rank:
            continue
        for start in range(source.start, source.end, most):
            end = min(start + most, source.end)
            yield start, end, context.read(layer_number, source._replace(start=start, end=end))[0]


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """[np, sq, sk], float32, of query [sq, 1, np, hn] and key [sk, 1, ng, hn]: not scaled."""
    by_group = query.squeeze(1).to(torch.float32).unflatten(1, (key.size(2), -1))
    scores = torch.einsum("sgrh,tgh->grst", by_group, key.squeeze(1).to(torch.float32))
    return scores.flatten(0, 1)
