"""How much goes into a command so that no sequence waits long for its next token, learned from past ones."""

import sys
from collections.abc import Mapping

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.config import StarConfig
from megatron_star.engine.answer import Answer
from megatron_star.engine.cached_context import CachedContext
from megatron_star.engine.command import Command
from megatron_star.engine.scheduler import Scheduler
from megatron_star.planning.pace import FEWEST_MEASURED_TOKENS, FEWEST_QUERY_TOKENS
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.planner import Planner

OBSERVED_ROW_TOKENS = 8
"""Tokens of a query that take as long as one whose attention is observed."""


class Pacing:
    """Bounds waves and queries beside running sequences; lives on the driver, in the engine's thread."""

    def __init__(self, planner: Planner, scheduler: Scheduler[Answer]) -> None:
        self.planner, self.scheduler = planner, scheduler

    def bounded(self, context: CachedContext) -> tuple[StarConfig, ContextPlan]:
        """The context with waves that are not too long by what is known now."""
        return self.planner.bounded(context.star, context.plan, context.base_plan)

    def most_query_tokens(self) -> int:
        """That sequences which begin may be fed in the next command, together."""
        if not self.scheduler.answering:
            return sys.maxsize
        largest = max(map(self._query_cost, self.scheduler.running.values()))
        return self.planner.pace.most_query_tokens(largest, beside_wave=self.scheduler.encoding)

    def most_tokens_beside(self, command: Command) -> int:
        """Of a query that may be fed beside all that a command has; a few always may."""
        queries = sum(num_tokens for _, num_tokens in self._queries(command))
        return max(FEWEST_QUERY_TOKENS, self.most_query_tokens() - queries)

    def note(self, command: Command, seconds: float, contexts: Mapping[int, EncodedContext]) -> None:
        """A command took so long.

        contexts: by their ids, as after it.
        """
        if command.score_wave or any(fed.num_scored for fed in command.feed):
            return  # logits of all tokens take longer than what they cost otherwise
        costs, pace = self.planner.costs, self.planner.pace
        queries = self._queries(command)
        num_decoded = len(command.feed) - len(queries)
        if command.observe:
            sequence_id, token_ids, rows = command.observe
            num_tokens = len(token_ids) + (OBSERVED_ROW_TOKENS - 1) * len(rows)
            queries.append((self.scheduler.running[sequence_id], num_tokens))
        cost = sum(num_tokens * self._query_cost(answer) for answer, num_tokens in queries)
        if command.encode_wave:
            context_id, wave = command.encode_wave
            cost += contexts[context_id].plan.wave_cost(wave, costs)
        if cost >= FEWEST_MEASURED_TOKENS * costs.linear_per_token:
            pace.note(cost, seconds, decoded=num_decoded > 0)
        elif command.feed and not (command.encode_wave or command.restore_context or command.observe):
            pace.note_decoding(seconds)

    def _queries(self, command: Command) -> list[tuple[Answer, int]]:
        """Whose query is fed, and how many tokens of it."""
        fed = [(self.scheduler.running[fed.sequence_id], len(fed.token_ids)) for fed in command.feed]
        return [(answer, num_tokens) for answer, num_tokens in fed if not answer.is_answering]

    def _query_cost(self, answer: Answer) -> float:
        return self.planner.query_token_cost(answer.plan.num_tokens)
