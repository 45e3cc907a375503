"""How much goes into a command so that no sequence waits long for its next token, learned from past ones."""

import sys
from collections.abc import Mapping

from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.config import StarConfig
from megatron_star.engine.answer import Answer
from megatron_star.engine.cached_context import CachedContext
from megatron_star.engine.command import Command
from megatron_star.engine.scheduler import Scheduler
from megatron_star.planning.pace import FEWEST_MEASURED_TOKENS
from megatron_star.planning.plan import ContextPlan
from megatron_star.planning.planner import Planner


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

    def note(self, command: Command, seconds: float, contexts: Mapping[int, EncodedContext]) -> None:
        """A command took so long.

        contexts: by their ids, as after it.
        """
        if command.score_wave or any(fed.num_scored for fed in command.feed):
            return  # logits of all tokens take longer than what they cost otherwise
        costs, pace = self.planner.costs, self.planner.pace
        fed = [(self.scheduler.running[fed.sequence_id], len(fed.token_ids)) for fed in command.feed]
        queries = [(answer, num_tokens) for answer, num_tokens in fed if not answer.is_answering]
        cost = sum(num_tokens * self._query_cost(answer) for answer, num_tokens in queries)
        if command.encode_wave:
            context_id, wave = command.encode_wave
            cost += contexts[context_id].plan.wave_cost(wave, costs)
        if cost >= FEWEST_MEASURED_TOKENS * costs.linear_per_token:
            pace.note(cost, seconds, decoded=len(queries) < len(fed))
        elif command.feed and not (command.encode_wave or command.restore_context):
            pace.note_decoding(seconds)

    def _query_cost(self, answer: Answer) -> float:
        return self.planner.query_token_cost(answer.plan.num_tokens)
