"""One rank's contexts and sequences. Every rank applies the driver's commands in the same order."""

import math

import torch
from torch import Tensor

from megatron_star.algorithm.attention_map import Looks, observe
from megatron_star.algorithm.context_encoding import encode_wave, score_wave
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import NewTokens, Sequence, generate_step
from megatron_star.engine.command import Command, OpenedContext
from megatron_star.engine.rank_store import RankStore, Trouble
from megatron_star.planning.planner import Planner
from megatron_star.planning.scoring import Scoring


def planner_of(star_model: StarModel, max_wait_seconds: float = math.inf) -> Planner:
    """The planner of a model on its ranks; see `Planner.of_model`."""
    return Planner.of_model(
        star_model.model.config,
        cp_size=star_model.exchange.cp_size,
        device_type=star_model.device.type,
        max_wait_seconds=max_wait_seconds,
    )


class RankExecutor:
    """Applies commands on one rank.

    Attributes:
        trouble: with what was to be restored.
        scores: of the last wave that was scored; the sum over all ranks has each once.
    """

    def __init__(self, star_model: StarModel, store: RankStore | None = None) -> None:
        """store: where contexts are saved and restored; without one, no command says so."""
        self.star_model, self.planner, self.store = star_model, planner_of(star_model), store
        self.trouble = Trouble.NONE
        self.scores: Tensor | None = None
        self.looks: Looks | None = None
        self.contexts: dict[int, EncodedContext] = {}
        self._token_ids: dict[int, list[int]] = {}
        self.sequences: dict[int, Sequence] = {}

    def execute(self, command: Command) -> Tensor | None:
        """Apply a command.

        Returns:
            Logits [sum of num_logits, vocab_size], float32, after the last `num_logits` tokens of each fed
            sequence; None if nothing was fed.
        """
        for sequence_id in command.drop_sequences:
            del self.sequences[sequence_id]
        for context_id in command.drop_contexts:
            self._drop_context(context_id)
        if command.open_context:
            self._open_context(command.open_context)
        if command.restore_context:
            context_id, *what = command.restore_context
            self.trouble = self.store.restore(self.contexts[context_id], *what)
        if command.encode_wave:
            self._encode_wave(*command.encode_wave, command.score_wave)
        for context_id, folder in command.save_contexts:
            self.store.save(self.contexts[context_id], folder)
        for sequence_id, context_id, tail_rank in command.open_sequences:
            self.sequences[sequence_id] = Sequence(self.contexts[context_id], tail_rank)
        for sequence_id, num_tail_tokens in command.rewind:
            self.sequences[sequence_id].rewind(num_tail_tokens)
        if command.observe:
            sequence_id, *observed = command.observe
            self.looks = observe(self.star_model, self.sequences[sequence_id], *observed)
        if not command.feed:
            return None
        return generate_step(
            self.star_model,
            [
                NewTokens(self.sequences[fed.sequence_id], fed.token_ids, fed.num_logits)
                for fed in command.feed
            ],
        )

    def close(self) -> None:
        """Wait until contexts are saved that a command has named."""
        if self.store:
            self.store.close()

    def _drop_context(self, context_id: int) -> None:
        context = self.contexts.pop(context_id)
        del self._token_ids[context_id]
        if self.store:
            self.store.forget(context)

    def _open_context(self, opened: OpenedContext) -> None:
        token_ids, parent, base = opened.token_ids, None, None
        if opened.parent:
            parent_id, num_reused = opened.parent
            parent = self.contexts[parent_id]
            base = parent.plan.prefix(num_reused)
            token_ids = self._token_ids[parent_id][:num_reused] + token_ids
        plan = self.planner.of_turns(opened.edges, opened.star, base)
        assert plan.num_tokens == len(token_ids)
        cp_rank = self.star_model.exchange.cp_rank
        self.contexts[opened.context_id] = EncodedContext(
            plan, cp_rank, parent, is_long=opened.is_long, kv_format=self.star_model.kv_format
        )
        self._token_ids[opened.context_id] = token_ids

    def _encode_wave(self, context_id: int, index: int, scoring: Scoring | None) -> None:
        context, token_ids = self.contexts[context_id], self._token_ids[context_id]
        wave = context.plan.waves[index]
        if scoring is None:
            encode_wave(self.star_model, token_ids, wave, context)
        else:
            scores = score_wave(self.star_model, token_ids, wave, context, scoring)
            # Every TP rank of a CP rank has them, and one of them counts.
            self.scores = scores if self.star_model.is_first_of_tp else torch.zeros_like(scores)
        self.star_model.synchronize()
