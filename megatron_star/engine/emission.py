"""What comes of a step's logits: tokens that are chosen and kept, and answers that have come to their end."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

import torch
from torch import Tensor

from megatron_star.engine.answer import Answer
from megatron_star.engine.command import Command, Fed
from megatron_star.engine.finite import why_not_finite
from megatron_star.engine.guide import Guide
from megatron_star.engine.prompt_scoring import PromptScoring
from megatron_star.engine.row_to_sample import Choice
from megatron_star.engine.sampling import sample_rows
from megatron_star.engine.scheduled_request import Stage
from megatron_star.engine.scheduler import Scheduler

MASK_THREADS = 4
"""A mask takes a fraction of a millisecond, and holds up nothing else of Python."""


class Emission:
    """Gives each answer its next tokens; lives on the driver, in the engine's thread."""

    def __init__(self, scheduler: Scheduler[Answer], end: Callable[[Answer, str], None]) -> None:
        """end: called with an answer that has its last token, and why it ends."""
        self.scheduler, self._end = scheduler, end
        self._mask_workers = ThreadPoolExecutor(MASK_THREADS, "mask")
        self._scoring = PromptScoring(scheduler)

    def guide(self, answer: Answer) -> None:
        """Keep an answer to the grammar of its request, if that has one; from any thread."""
        request = answer.request
        if request.grammar:
            matcher = request.grammar.matcher(request.all_end_tokens)
            answer.guide = Guide(matcher, self._mask_workers, proposes=request.speculate != "off")

    def look_ahead(self, command: Command) -> None:
        """This command is about to run: begin what its logits will need."""
        for fed in command.feed:
            answer = self.scheduler.running[fed.sequence_id]
            if answer.guide:
                answer.guide.follow(answer.fed_proposals)

    def close(self) -> None:
        """No further steps come."""
        self._mask_workers.shutdown(wait=False, cancel_futures=True)

    def emit(self, command: Command, logits: Tensor | None) -> None:
        """Say how far contexts are; sample for each sequence that has no tokens left to feed.

        logits: as `RankExecutor.execute` returns them.
        """
        running = list(self.scheduler.running.values())
        for answer in running:
            answer.note_encoding()
        if logits is not None:
            self._sample(command, logits)
        for answer in running:
            if answer.error and answer.stage < Stage.ENDED:
                self._end(answer, "error")
            elif answer.stage < Stage.ENDED and answer.ends_without_tokens:
                self._end(answer, "length")

    def note_scores(self, command: Command, scores: Tensor) -> None:
        """How likely what follows a wave's tokens is: of `sum_on_driver`."""
        self._scoring.note_wave(command, scores)

    def _sample(self, command: Command, logits: Tensor) -> None:
        answers = [self.scheduler.running[fed.sequence_id] for fed in command.feed]
        parts = list(logits.split([fed.num_logits for fed in command.feed]))
        if any(answer.scores_query for answer in answers):
            parts = self._without_scored(command.feed, answers, parts)
            logits = torch.cat(parts)
        pairs = [(answer, part) for answer, part in zip(answers, parts, strict=True) if len(part)]
        rows = [answer.rows_to_sample(len(part), logits.size(1)) for answer, part in pairs]
        choices = iter(sample_rows(logits, list(chain.from_iterable(rows))))
        for answer, part in pairs:
            self._add_tokens(answer, list(islice(choices, len(part))), part)

    def _without_scored(
        self, feed: Sequence[Fed], answers: Sequence[Answer], parts: Sequence[Tensor]
    ) -> list[Tensor]:
        """Logits that tokens are chosen from; the others have said how likely queries are."""
        to_sample = []
        for fed, answer, part in zip(feed, answers, parts, strict=True):
            scored, rest = part.split([fed.num_scored, fed.num_logits - fed.num_scored])
            if fed.num_scored:
                self._scoring.note_query(answer, fed, scored)
            to_sample.append(rest if answer.generates and not answer.error else rest[:0])
        return to_sample

    def _add_tokens(self, answer: Answer, choices: Sequence[Choice], logits: Tensor) -> None:
        """Keep what was chosen from logits [tokens, vocab_size], as long as it was proposed: what comes next
        follows other tokens. End the answer where that is its last one."""
        answer.stage = Stage.ANSWERING
        proposals, answer.fed_proposals = answer.fed_proposals, []
        for choice, row, proposal in zip(choices, logits, [*proposals, None], strict=True):
            if not choice.is_finite:
                answer.error = why_not_finite(row, len(answer.tokens))
            elif not choice.is_possible:
                answer.end_without_token()
            elif not answer.error:
                answer.add_token(choice)
            if answer.error or answer.finish_reason:
                self._end(answer, "error" if answer.error else answer.finish_reason)
                return
            answer.pending = [choice.token]
            if choice.token != proposal:
                break
        if answer.guide:
            answer.guide.look_ahead()
        if proposal is not None:
            self.scheduler.rewind(answer, answer.num_fed_tokens)
