"""What comes of a step's logits: tokens that are chosen and kept, and answers that have come to their end."""

from collections.abc import Callable, Sequence
from itertools import chain, islice

from torch import Tensor

from megatron_star.engine.answer import Answer
from megatron_star.engine.command import Command
from megatron_star.engine.finite import why_not_finite
from megatron_star.engine.row_to_sample import Choice
from megatron_star.engine.sampling import sample_rows
from megatron_star.engine.scheduled_request import Stage
from megatron_star.engine.scheduler import Scheduler


class Emission:
    """Gives each answer its next tokens; lives on the driver, in the engine's thread."""

    def __init__(self, scheduler: Scheduler[Answer], end: Callable[[Answer, str], None]) -> None:
        """end: called with an answer that has its last token, and why it ends."""
        self.scheduler, self._end = scheduler, end

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
            if answer.stage < Stage.ENDED and answer.ends_without_tokens:
                self._end(answer, "length")

    def _sample(self, command: Command, logits: Tensor) -> None:
        fed = [(self.scheduler.running[fed.sequence_id], fed.num_logits) for fed in command.feed]
        rows = [answer.rows_to_sample(num_logits, logits.size(1)) for answer, num_logits in fed]
        choices = iter(sample_rows(logits, list(chain.from_iterable(rows))))
        for (answer, num_logits), its_logits in zip(fed, logits.split([n for _, n in fed]), strict=True):
            if num_logits:
                self._add_tokens(answer, list(islice(choices, num_logits)), its_logits)

    def _add_tokens(self, answer: Answer, choices: Sequence[Choice], logits: Tensor) -> None:
        """Keep what was chosen from logits [tokens, vocab_size], as long as it was proposed: what comes next
        follows other tokens. End the answer where that is its last one."""
        answer.stage = Stage.ANSWERING
        proposals, answer.fed_proposals = answer.fed_proposals, []
        for choice, row, proposal in zip(choices, logits, [*proposals, None], strict=True):
            if not choice.is_finite:
                answer.error = why_not_finite(row, len(answer.tokens))
            elif not choice.is_possible:
                answer.error_is_of_request = True
                answer.error = (
                    f"token {len(answer.tokens)}: what was asked of the answer leaves no token for it"
                )
            else:
                answer.add_token(choice)
            if answer.error or answer.finish_reason:
                self._end(answer, "error" if answer.error else answer.finish_reason)
                return
            answer.pending = [choice.token]
            if choice.token != proposal:
                break
        if proposal is not None:
            self.scheduler.rewind(answer, answer.num_fed_tokens)
