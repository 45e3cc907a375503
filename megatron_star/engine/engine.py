"""The engine: one process group answers many requests at once.

The driver schedules; every step it sends one command to all ranks, samples from the logits, and streams the
tokens to whoever asked. Workers apply commands until they are told to stop.
"""

import math
import sys
import threading
from collections.abc import Callable, Iterable
from itertools import count
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from megatron_star.algorithm.star_model import StarModel
from megatron_star.config import StarConfig
from megatron_star.engine.answer import Answer
from megatron_star.engine.executor import Command, RankExecutor, planner_of
from megatron_star.engine.finite import why_not_finite
from megatron_star.engine.job import CachedContext, Job, context_key
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.engine.scheduler import Scheduler
from megatron_star.parallel.control import broadcast_json
from megatron_star.parallel.watch import RankWatch
from megatron_star.planning.cost_model import kv_bytes_per_token
from megatron_star.planning.pace import FEWEST_MEASURED_TOKENS
from megatron_star.planning.plan import ContextPlan
from megatron_star.text.text_stream import Tokenizer

HEARTBEAT_SECONDS = 1.0
SECONDS_OF_SILENCE = 5.0
"""Of a rank that sends a beat every second."""
SECONDS_OF_A_STEP = 60.0
"""Idle steps take a heartbeat, others are cut to the longest wait; this is for the slowest of CPUs."""
CALIBRATION_TOKENS = 512
CALIBRATION_CONTEXT = -1


def run_worker(star_model: StarModel, control: dist.ProcessGroup) -> None:
    """Apply the driver's commands until it stops; for every rank but the driver."""
    executor = RankExecutor(star_model)
    while True:
        command = Command.from_json(broadcast_json(None, control))
        if command.stop:
            return
        executor.execute(command)


class StarEngine:
    """Answers requests on all ranks; lives on the driver.

    `step` advances everything by one command. Either call it (`generate` does), or let `start` run it in a
    thread; `submit`, `cancel` and `stats` may be called from any thread.
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
        watch: RankWatch | None = None,
    ) -> None:
        """
        Args:
            max_sequence_length: context, query and generated tokens of one request, at most.
            budget_bytes_per_rank: KV that a rank may hold.
            max_running: requests that run at the same time, at most.
            max_wait_seconds: between two tokens of a running sequence while another request's context is
                encoded, at most; waves are cut to it.
            watch: of the ranks, for `trouble`.
        """
        config = star_model.model.config
        self.star_model, self.tokenizer, self.control = star_model, tokenizer, control
        self.max_sequence_length = max_sequence_length
        self.executor = RankExecutor(star_model)
        self.planner = planner_of(star_model, max_wait_seconds)
        dtype_bytes = torch.empty(0, dtype=config.params_dtype).element_size()
        tp_size = config.tensor_model_parallel_size
        self.scheduler = Scheduler(
            self.planner,
            kv_bytes_per_token=kv_bytes_per_token(config, tp_size=tp_size, bytes_per_value=dtype_bytes),
            budget_bytes_per_rank=budget_bytes_per_rank,
            max_running=max_running,
        )
        self._answers: dict[int, Answer] = {}
        self._submitted: list[Answer] = []
        self._ids = count()
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.num_context_encodings = 0
        self._watch, self._last_step_at = watch, monotonic()

    def check(self, request: StarRequest) -> None:
        """Raises ValueError if this request cannot be answered here, ever."""
        self._job(-1, request)

    def submit(self, request: StarRequest) -> Answer:
        """Queue a request; its answer streams from the result.

        Raises:
            ValueError: it cannot be answered here, ever.
            RuntimeError: the engine has stopped.
        """
        return self._enqueue(self._job(next(self._ids), request))

    def _enqueue(self, job: Job) -> Answer:
        with self._lock:
            if self._stopping:
                raise RuntimeError("the engine has stopped")
            answer = Answer(job, self.tokenizer)
            self._answers[job.id] = answer
            self._submitted.append(answer)
            self._lock.notify_all()
        return answer

    def cancel(self, request_id: int) -> None:
        """End a request at the next step; nothing happens if it has ended already."""
        with self._lock:
            answer = self._answers.get(request_id)
            if answer:
                answer.cancelled = True
                self._lock.notify_all()

    def generate(self, requests: Iterable[StarRequest]) -> list[StarResult]:
        """Answer these requests, in their order; steps the engine itself where no thread does.

        Raises:
            ValueError: one of them cannot be answered; none was submitted.
        """
        jobs = [self._job(next(self._ids), request) for request in requests]
        answers = [self._enqueue(job) for job in jobs]
        while not self._thread and not all(answer.ended.is_set() for answer in answers):
            self.step()
        return [answer.result() for answer in answers]

    def step(self) -> None:
        """Advance by one command."""
        self._take_submitted()
        self._end_cancelled_and_late()
        for job in self.scheduler.admit():
            self._answers[job.id].note_admitted()
            if job.context.encoded or not job.plan.num_tokens:
                self._answers[job.id].note_encoded()
        self.scheduler.recut_next(self._bounded_by_now)
        command = self.scheduler.next_command(self._most_query_tokens())
        logits = self._run(command)
        self._note_encoding(command)
        if logits is not None:
            self._emit(command, logits)
        self._last_step_at = monotonic()

    def trouble(self) -> str | None:
        """Why nothing goes on at present, although the engine was started: a rank that is stopped, say."""
        silent = self._watch.silent_ranks(SECONDS_OF_SILENCE) if self._watch else []
        if silent:
            ranks = ", ".join(map(str, silent))
            return f"rank {ranks} has not been heard of for {SECONDS_OF_SILENCE:.0f} s: is it stopped?"
        seconds = monotonic() - self._last_step_at
        if self._thread and seconds > SECONDS_OF_A_STEP:
            return f"the ranks have not finished a step for {seconds:.0f} s"
        return None

    def start(self, on_failure: Callable[[Exception], None]) -> None:
        """Run `step` in a thread of its own until `stop`.

        `on_failure` is called in that thread with what `step` raises; the engine does no more then.
        """
        self._calibrate()
        self._last_step_at = monotonic()
        self._thread = threading.Thread(target=self._loop, args=(on_failure,), name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs, and let the workers go."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        if self._thread:
            self._thread.join()
        with self._lock:
            answers = list(self._answers.values())
        for answer in answers:
            self._end(answer, "cancelled")
        broadcast_json(Command(stop=True).to_json(), self.control)

    def stats(self) -> dict[str, Any]:
        """Numbers for a person or a monitor."""
        with self._lock:
            return {
                "waiting": len(self.scheduler.waiting) + len(self._submitted),
                "running": len(self.scheduler.running),
                "cached_contexts": len(self.scheduler.contexts),
                "context_encodings": self.num_context_encodings,
                "kv_bytes_per_rank": list(self.scheduler.used),
                "kv_budget_bytes_per_rank": self.scheduler.memory.budget,
            }

    def _calibrate(self) -> None:
        """Learn how fast waves are from one of a made-up context, before anybody waits for one."""
        tokens = [0] * min(CALIBRATION_TOKENS, self.max_sequence_length)
        star = StarConfig(mode="exact")
        self._run(
            Command(
                open_context=(CALIBRATION_CONTEXT, tokens, star, None), encode_wave=(CALIBRATION_CONTEXT, 0)
            )
        )
        self._run(Command(drop_contexts=[CALIBRATION_CONTEXT]))

    def _loop(self, on_failure: Callable[[Exception], None]) -> None:
        try:
            self._step_until_stopped()
        except Exception as error:
            on_failure(error)

    def _step_until_stopped(self) -> None:
        while True:
            with self._lock:
                if self.scheduler.idle and not self._submitted and not self._stopping:
                    self._lock.wait(HEARTBEAT_SECONDS)
                if self._stopping:
                    return
            # Idle or not: a command that says nothing is the heartbeat of the control group.
            self.step()

    def _run(self, command: Command) -> torch.Tensor | None:
        broadcast_json(command.to_json(), self.control)
        start = monotonic()
        logits = self.executor.execute(command)
        self._note_pace(command, monotonic() - start)
        return logits

    def _note_pace(self, command: Command, seconds: float) -> None:
        query_ids = [(i, tokens) for i, tokens in command.feed if not self._is_answering(i)]
        costs, pace = self.planner.costs, self.planner.pace
        cost = sum(len(tokens) * self._query_cost(self.scheduler.running[i]) for i, tokens in query_ids)
        if command.encode_wave:
            context_id, wave = command.encode_wave
            cost += self.executor.contexts[context_id].encoded.plan.wave_cost(wave, costs)
        if cost >= FEWEST_MEASURED_TOKENS * costs.linear_per_token:
            pace.note(cost, seconds, decoded=len(query_ids) < len(command.feed))
        elif command.feed and not command.encode_wave:
            pace.note_decoding(seconds)

    def _is_answering(self, job_id: int) -> bool:
        return self.scheduler.running[job_id].is_answering

    def _query_cost(self, job: Job) -> float:
        return self.planner.query_token_cost(job.plan.num_tokens)

    def _most_query_tokens(self) -> int:
        if not self.scheduler.answering:
            return sys.maxsize
        largest = max(map(self._query_cost, self.scheduler.running.values()))
        return self.planner.pace.most_query_tokens(largest, beside_wave=self.scheduler.encoding)

    def _bounded_by_now(self, context: CachedContext) -> tuple[StarConfig, ContextPlan]:
        base = context.parent.plan if context.parent else None
        return self.planner.bounded(context.star, context.plan, base)

    def _job(self, job_id: int, request: StarRequest) -> Job:
        request = request.copy()
        request.check(vocab_size=self.star_model.vocab_size, max_sequence_length=self.max_sequence_length)
        star, plans = self.planner.plan(len(request.context_tokens), request.star, request.turn_edges)
        keys = tuple(context_key(request.context_tokens[: p.num_tokens], p) for p in plans)
        job = Job(job_id, request, star.mode, star, plans, keys, pending=list(request.query_tokens))
        self.scheduler.check_fits(job)
        return job

    def _take_submitted(self) -> None:
        with self._lock:
            submitted, self._submitted = self._submitted, []
        for answer in submitted:
            self.scheduler.add(answer.job)

    def _end_cancelled_and_late(self) -> None:
        now = monotonic()
        with self._lock:
            answers = list(self._answers.values())
        for answer in answers:
            if answer.cancelled:
                self._end(answer, "cancelled")
            elif now > answer.deadline:
                self._end(answer, "deadline")

    def _note_encoding(self, command: Command) -> None:
        self.num_context_encodings += command.open_context is not None
        for job in self.scheduler.running.values():
            if job.context.encoded:
                self._answers[job.id].note_encoded()
            else:
                self._answers[job.id].note_waves(job.context.next_wave)

    def _emit(self, command: Command, logits: torch.Tensor) -> None:
        """Sample for each sequence that has no tokens left to feed, and retire those that end."""
        rows = logits.cpu()
        for (job_id, _), row in zip(command.feed, rows, strict=True):
            answer = self._answers[job_id]
            if answer.job.pending:
                continue
            answer.error = why_not_finite(row, len(answer.tokens))
            if answer.error:
                self._end(answer, "error")
                continue
            answer.job.pending = [answer.add_token(row)]
            answer.job.is_answering = True
            if answer.finish_reason:
                self._end(answer, answer.finish_reason)

    def _end(self, answer: Answer, reason: str) -> None:
        if answer.job in self.scheduler.waiting or answer.job.id in self.scheduler.running:
            self.scheduler.remove(answer.job)
        with self._lock:
            self._answers.pop(answer.job.id, None)
            if answer in self._submitted:
                self._submitted.remove(answer)
        answer.end(reason, self._kv_bytes(answer.job))

    def _kv_bytes(self, job: Job) -> list[int]:
        """Bytes of the context and the tail on each CP rank; the same on each TP rank of it."""
        sizes = [0] * len(self.scheduler.used)
        sizes[job.tail_rank] += job.tail_bytes
        for context in job.context.chain() if job.context else ():
            sizes = [size + more for size, more in zip(sizes, context.bytes_per_rank, strict=True)]
        return sizes
