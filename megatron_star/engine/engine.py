"""The engine: one process group answers many requests at once.

The driver schedules; in every turn it sends one command to all ranks, samples from the logits, and streams
the tokens to whoever asked. Workers apply commands until they are told to stop.
"""

import math
from collections.abc import Iterable
from itertools import count
from time import monotonic, sleep
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_star.algorithm.attention_map import full_attentions
from megatron_star.algorithm.star_model import StarModel
from megatron_star.config import FieldError, StarConfig
from megatron_star.engine.answer import Answer
from megatron_star.engine.attention_map import gather_looks
from megatron_star.engine.command import Command, OpenedContext
from megatron_star.engine.context_store import ContextStore
from megatron_star.engine.emission import Emission
from megatron_star.engine.executor import RankExecutor, planner_of
from megatron_star.engine.expert_load import ExpertLoad, gather_expert_load
from megatron_star.engine.forced_tokens import ForcedTokens
from megatron_star.engine.map_maker import MapMaker
from megatron_star.engine.pacing import Pacing
from megatron_star.engine.prompt_lookup import PromptLookup
from megatron_star.engine.proposer import Proposer
from megatron_star.engine.rank_store import RankStore, Trouble
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.engine.scheduled_request import Stage
from megatron_star.engine.scheduler import Scheduler
from megatron_star.engine.speculation import Speculation
from megatron_star.model.longrope import most_generated, needs_long_factors
from megatron_star.parallel.control import broadcast_json, gather_integers, sum_on_driver
from megatron_star.planning.cost_model import kv_layers
from megatron_star.text.text_stream import Tokenizer

CALIBRATION_TOKENS = 512
CALIBRATION_CONTEXT = -1
SECONDS_FOR_THE_STORE = 60.0
"""For which an engine that is stopped goes on writing contexts."""
SECONDS_OF_A_PAUSE = 0.01


def run_worker(star_model: StarModel, control: dist.ProcessGroup, store: RankStore | None = None) -> None:
    """Apply the driver's commands until it stops; for every rank but the driver.

    store: this rank's part of the driver's context store.
    """
    executor = RankExecutor(star_model, store)
    while True:
        command = Command.from_json(broadcast_json(None, control))
        if command.stop:
            executor.close()
            return
        executor.execute(command)
        if command.score_wave:
            sum_on_driver(executor.scores, control)
        if command.restore_context:
            gather_integers(executor.trouble, control)
        if command.observe:
            gather_looks(executor.looks, control)
        if command.read_expert_load:
            gather_expert_load(star_model, control)


class StarEngine:
    """Answers requests on all ranks; lives on the driver, in one thread.

    `step` advances everything by one command; `generate` steps until all is answered. For a program that does
    other things meanwhile, an `EngineThread` steps it. Any thread may call `prepare` and `stats`, no more.
    """

    def __init__(
        self,
        star_model: StarModel,
        tokenizer: Tokenizer,
        control: dist.ProcessGroup,
        *,
        max_sequence_length: int,
        budget_bytes_per_rank: int,
        max_running: int = 64,
        max_wait_seconds: float = math.inf,
        proposer: Proposer | None = None,
        stores: tuple[ContextStore, RankStore] | None = None,
    ) -> None:
        """
        Args:
            max_sequence_length: context, query and generated tokens of one request, at most.
            budget_bytes_per_rank: KV that a rank may hold.
            max_running: requests that run at the same time, at most.
            max_wait_seconds: between two tokens of a running sequence while another request's context is
                encoded, at most; waves are cut to it.
            proposer: who guesses tokens of requests that speculate; prompt lookup, unless given.
            stores: where encoded contexts are kept, and this rank's part of it.
        """
        config = star_model.model.config
        self.star_model, self.tokenizer, self.control = star_model, tokenizer, control
        self.max_sequence_length = max_sequence_length
        self.store, rank_store = stores or (None, None)
        self.executor = RankExecutor(star_model, rank_store)
        self.planner = planner_of(star_model, max_wait_seconds)
        self.planner.keeps_turns |= self.store is not None
        self.scheduler: Scheduler[Answer] = Scheduler(
            self.planner,
            kv_layers=kv_layers(
                config,
                tp_size=config.tensor_model_parallel_size,
                bytes_per_value=config.params_dtype.itemsize,
                kv_dtype=star_model.kv_format.name,
            ),
            budget_bytes_per_rank=budget_bytes_per_rank,
            max_running=max_running,
        )
        self._emission = Emission(self.scheduler, self._finish)
        self._pacing = Pacing(self.planner, self.scheduler)
        self._maps = MapMaker(self._pacing)
        self.speculation = Speculation(ForcedTokens(proposer or PromptLookup()), star_model.vocab_size)
        self.num_context_encodings = 0
        self.expert_load = ExpertLoad.of_model(config)
        self._ids = count()

    def prepare(self, request: StarRequest) -> Answer:
        """Check, plan and hash a request, once and for all; `enqueue` takes it as it is.

        Raises:
            ValueError: it cannot be answered here, ever.
        """
        request = request.copy()
        request.check(vocab_size=self.star_model.vocab_size, max_sequence_length=self.max_sequence_length)
        if request.attention_map and not full_attentions(self.star_model.model):
            raise FieldError("attention_map: no layer of the model sees all of a context", "attention_map")
        num_context, num_generated = len(request.context_tokens), request.sampling.num_tokens_to_generate
        num_prompt = num_context + len(request.query_tokens)
        is_long = needs_long_factors(self.star_model.model.config, num_prompt, num_generated)
        # What is scored is one context: the token after a turn of its own would not be known.
        edges = () if request.prompt_logprobs is not None else request.turn_edges
        planned = self.planner.plan(num_context, request.star, edges)
        answer = Answer(next(self._ids), request, planned, self.tokenizer, is_long)
        self.scheduler.check_fits(answer)
        self._emission.guide(answer)
        return answer

    def most_generated(self, num_prompt: int) -> int:
        """How many tokens can be generated after so many context and query tokens."""
        room = self.max_sequence_length - num_prompt
        return most_generated(self.star_model.model.config, num_prompt, room)

    def enqueue(self, answer: Answer) -> None:
        """Queue what was prepared, once."""
        assert answer.stage == Stage.PREPARED
        answer.note_submitted()
        self.scheduler.add(answer)

    def submit(self, request: StarRequest) -> Answer:
        """Prepare and queue a request; its answer streams from the result. Raises as `prepare` does."""
        answer = self.prepare(request)
        self.enqueue(answer)
        return answer

    def generate(self, requests: Iterable[StarRequest]) -> list[StarResult]:
        """Answer these requests, in their order.

        Raises:
            ValueError: one of them cannot be answered; none was queued.
        """
        answers = [self.prepare(request) for request in requests]
        for answer in answers:
            self.enqueue(answer)
        while not all(answer.ended.is_set() for answer in answers):
            self.step()
        return [answer.result() for answer in answers]

    def step(self, *, read_expert_load: bool = False) -> None:
        """One turn: a command to all ranks, and what comes of it; without work, one that says nothing.

        Args:
            read_expert_load: bring `expert_load` up to date; only of a model that has experts.
        """
        start = monotonic()
        self._end_cancelled_and_late()
        self._admit()
        command = self._next_command()
        command.read_expert_load = read_expert_load
        self._emission.look_ahead(command)
        logits = self._run(command)
        opened = command.open_context
        self.num_context_encodings += bool(opened and opened.token_ids and not command.restore_context)
        self._emission.emit(command, logits)
        if command.only_decodes:
            self.speculation.note_step(sum(fed.num_logits for fed in command.feed), monotonic() - start)
        if self.store and command == Command():
            sleep(SECONDS_OF_A_PAUSE)  # whoever waits does so for memory that is being written

    def stop(self) -> None:
        """Cancel what runs and waits, write what the store has not, and let the workers go."""
        for answer in self._unfinished():
            self._end(answer, "cancelled")
        self.finish_storing(SECONDS_FOR_THE_STORE)
        broadcast_json(Command(stop=True).to_json(), self.control)
        self.executor.close()
        self._emission.close()

    def finish_storing(self, seconds: float = math.inf) -> None:
        """Step until all contexts are in the store that are to be written, for at most so many seconds."""
        end = monotonic() + seconds
        while self.is_storing and monotonic() < end:
            self.step()

    @property
    def is_storing(self) -> bool:
        """Contexts are being written, or wait for it: that takes further steps."""
        return bool(self.store and self.store.is_busy)

    def stats(self) -> dict[str, Any]:
        """Numbers for a person or a monitor."""
        return {
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "cached_contexts": len(self.scheduler.contexts),
            "context_encodings": self.num_context_encodings,
            "proposed_tokens": self.speculation.num_proposed,
            "accepted_tokens": self.speculation.num_accepted,
            "kv_bytes_per_rank": list(self.scheduler.used),
            "kv_budget_bytes_per_rank": self.scheduler.memory.budget,
            "kv_dtype": self.star_model.kv_format.name,
            "context_store": self.store.counts.to_json() if self.store else {},
        }

    def calibrate(self) -> None:
        """Learn how fast waves are from one of a made-up context, before anybody waits for one."""
        tokens = [0] * min(CALIBRATION_TOKENS, self.max_sequence_length)
        opened = OpenedContext(CALIBRATION_CONTEXT, tokens, StarConfig(mode="exact"), (len(tokens),))
        self._run(Command(open_context=opened, encode_wave=(CALIBRATION_CONTEXT, 0)))
        self._run(Command(drop_contexts=[CALIBRATION_CONTEXT], read_expert_load=bool(self.expert_load)))
        self.expert_load = self.expert_load and self.expert_load.from_now_on()

    def _end_cancelled_and_late(self) -> None:
        for answer in self._unfinished():
            if answer.cancelled:
                self._end(answer, answer.finish_reason or "cancelled")
            elif answer.is_late:
                self._end(answer, answer.finish_reason or "deadline")

    def _admit(self) -> None:
        for answer in self.scheduler.admit():
            answer.note_admitted()

    def _next_command(self) -> Command:
        if not (self.store and self.store.look_up(self.scheduler, self.planner)):
            self.scheduler.recut_next(self._pacing.bounded)
        self.speculation.propose(self.scheduler.running.values())
        context = self.scheduler.next_to_encode
        command = self.scheduler.next_command(self._pacing.most_query_tokens())
        self._maps.add_to(command)
        if self.store:
            command.save_contexts = self.store.next_saves(self.scheduler, context)
        return command

    def _run(self, command: Command) -> Tensor | None:
        """On all ranks; logits as `RankExecutor.execute` returns them."""
        broadcast_json(command.to_json(), self.control)
        start = monotonic()
        logits = self.executor.execute(command)
        self._pacing.note(command, monotonic() - start, self.executor.contexts)
        if command.score_wave:
            self._emission.note_scores(command, sum_on_driver(self.executor.scores, self.control))
        if command.restore_context:
            self._note_restored(command, Trouble(max(gather_integers(self.executor.trouble, self.control))))
        if command.observe:
            mapped = self._maps.note(gather_looks(self.executor.looks, self.control))
            if mapped:
                self._end(mapped, mapped.finish_reason)
        if command.read_expert_load:
            assert self.expert_load
            self.expert_load = self.expert_load.read(gather_expert_load(self.star_model, self.control))
        return logits

    def _note_restored(self, command: Command, trouble: Trouble) -> None:
        *_, end_layer = command.restore_context
        self.store.note_restored(self.scheduler, self.scheduler.next_to_encode, end_layer, trouble)

    def _unfinished(self) -> list[Answer]:
        return [*self.scheduler.waiting, *self.scheduler.running.values()]

    def _finish(self, answer: Answer, reason: str) -> None:
        """It has its last token."""
        if answer.request.attention_map and answer.tokens and reason != "error":
            self._maps.begin(answer)
        else:
            self._end(answer, reason)

    def _end(self, answer: Answer, reason: str) -> None:
        self._maps.forget(answer)
        self.speculation.forget(answer)
        self.scheduler.remove(answer)
        kv_bytes = self.scheduler.bytes_per_rank(answer), self.scheduler.memory.by_kind(answer)
        answer.end(reason, *kv_bytes)
