"""How likely the tokens of prompts are, wave by wave and step by step, for answers that want to know it."""

import torch
from torch import Tensor

from megatron_star.algorithm.token_scores import score_rows
from megatron_star.engine.answer import Answer
from megatron_star.engine.command import Command, Fed
from megatron_star.engine.scheduler import Scheduler
from megatron_star.planning.scoring import offsets_in_wave

NOT_FINITE = (
    "log-probabilities of the prompt are not finite: the weights are damaged, or the dtype (--fp16?) cannot "
    "hold what the model computes"
)


class PromptScoring:
    """Sets `prompt_scores` of answers, and `error` where a score is not finite."""

    def __init__(self, scheduler: Scheduler[Answer]) -> None:
        self.scheduler = scheduler

    def note_wave(self, command: Command, scores: Tensor) -> None:
        """Of what follows the tokens of a wave [tokens, columns], in the order of the wave."""
        context_id, index = command.encode_wave
        running = self.scheduler.running.values()
        answer = next(answer for answer in running if answer.context.id == context_id)
        wave, num_context = answer.context.plan.waves[index], answer.plan.num_tokens
        for segment in wave:
            its = scores[offsets_in_wave(wave)[segment.start] :][: segment.num_tokens]
            if segment.end == num_context and not answer.request.query_tokens:
                its = its[:-1]  # nothing follows
            self._put(answer, segment.start + 1, its)

    def note_query(self, answer: Answer, fed: Fed, logits: Tensor) -> None:
        """Of logits [fed.num_scored, vocab_size] of query tokens that were fed."""
        query = answer.request.query_tokens
        after = len(query) - len(answer.pending) - len(fed.token_ids) + 1
        followers = logits.new_tensor(query[after : after + len(logits)], dtype=torch.int64)
        scores = score_rows(logits, followers, answer.prompt_scores.num_top)
        self._put(answer, answer.plan.num_tokens + after, scores.cpu())

    def _put(self, answer: Answer, first: int, scores: Tensor) -> None:
        if not answer.prompt_scores.put(first, scores):
            answer.error = NOT_FINITE
