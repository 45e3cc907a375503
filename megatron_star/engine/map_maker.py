"""Attention maps of answers that have their last token.

A map is made by feeding query and answer once more, to a sequence that takes the place of the answer's own,
and the memory of its tail. So layers with windows see what they saw, and nothing is kept twice. The tokens
are fed piece by piece beside what else runs, no more at once than other sequences may wait for.
"""

from collections import deque
from dataclasses import dataclass, field

from megatron_star.algorithm.attention_map import Looks
from megatron_star.engine.answer import Answer
from megatron_star.engine.attention_map import AttentionMap
from megatron_star.engine.command import Command, Observed
from megatron_star.engine.fair_queue import MAX_TOKENS_FED_AT_ONCE
from megatron_star.engine.pacing import OBSERVED_ROW_TOKENS, Pacing
from megatron_star.engine.scheduled_request import Stage

MOST_OBSERVED_ROWS = 64
"""Of an answer: of a longer one each second row, or third, .. is observed."""


@dataclass
class _Making:
    """A map on its way.

    Attributes:
        token_ids: of the query, and of the answer but its last.
        observed: which of them are observed: those that chose the answer's tokens, or some of these.
        num_fed: tokens that have been fed.
    """

    answer: Answer
    token_ids: list[int]
    observed: frozenset[int]
    num_fed: int = 0
    looks: list[Looks] = field(default_factory=list)

    @classmethod
    def of(cls, answer: Answer) -> "_Making":
        query, tokens = answer.request.query_tokens, answer.tokens
        every = -(-len(tokens) // MOST_OBSERVED_ROWS)
        rows = range(len(query) - 1, len(query) + len(tokens) - 1, every)
        return cls(answer, [*query, *tokens[:-1]], frozenset(rows))

    def next_tokens(self, most: int) -> Observed:
        """That are fed next, worth so many tokens of a query; at least one."""
        start, worth, rows = self.num_fed, 0, []
        while self.num_fed < len(self.token_ids):
            is_observed = self.num_fed in self.observed
            worth += OBSERVED_ROW_TOKENS if is_observed else 1
            if worth > most and self.num_fed > start:
                break
            if is_observed:
                rows.append(self.num_fed - start)
            self.num_fed += 1
        return Observed(self.answer.id, self.token_ids[start : self.num_fed], rows)

    @property
    def is_whole(self) -> bool:
        return self.num_fed == len(self.token_ids)


class MapMaker:
    """Makes maps one after the other; lives on the driver, in the engine's thread."""

    def __init__(self, pacing: Pacing) -> None:
        self.pacing = pacing
        self._making: deque[_Making] = deque()

    def begin(self, answer: Answer) -> None:
        """Of an answer with at least one token, which goes on running until `note` returns it."""
        answer.stage = Stage.MAPPING
        answer.pending = []  # it may have a token before the last, if several came in one step
        self._making.append(_Making.of(answer))

    def forget(self, answer: Answer) -> None:
        """It ends without a map, if it has none yet."""
        self._making = deque(making for making in self._making if making.answer is not answer)

    def add_to(self, command: Command) -> None:
        """Let the ranks feed the next tokens of a map, if any is on its way."""
        if not self._making:
            return
        making = self._making[0]
        answer = making.answer
        if not making.num_fed:
            command.drop_sequences.append(answer.id)
            command.open_sequences.append((answer.id, answer.context.id, answer.tail_rank))
        most = min(MAX_TOKENS_FED_AT_ONCE, self.pacing.most_tokens_beside(command))
        command.observe = making.next_tokens(most)

    def note(self, looks: Looks) -> Answer | None:
        """What all ranks have seen in a command with `observe`. Returns the answer whose map is now whole."""
        making = self._making[0]
        if len(looks.peaks):
            making.looks.append(looks)
        if not making.is_whole:
            return None
        self._making.popleft()
        num_tokens = making.answer.plan.num_tokens
        making.answer.attention_map = AttentionMap.of_looks(num_tokens, making.looks)
        return making.answer
