"""From an `Ask` to its answers: admission, tokenization and submission."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from megatron_star.config import FieldError
from megatron_star.engine.answer import Answer
from megatron_star.engine.thread import EngineThread
from megatron_star.server.ask import Ask
from megatron_star.server.attention_report import excerpts
from megatron_star.server.batch import Batch
from megatron_star.server.contexts import ContextRegistry
from megatron_star.server.errors import RequestError, refusal
from megatron_star.server.grammars import Grammars
from megatron_star.server.key_usage import KeyUsage, tokens_in_flight
from megatron_star.server.keys import KeyLimits
from megatron_star.server.metrics import ServerMetrics
from megatron_star.server.settings import ServerSettings
from megatron_star.server.submission import Submission, Submitted, cancel
from megatron_star.server.tools.formats import answer_formats
from megatron_star.server.tools.tool_use import ToolUse
from megatron_star.text.end_tokens import end_tokens
from megatron_star.text.foreign_template import ForeignTemplate, TemplateProcess
from megatron_star.text.token_bytes import TokenBytes

TOKENIZER_THREADS = 2
NO_TEMPLATES = (
    "chat_template: this server takes none from requests: it would have to be started with "
    "--trust-request-chat-template"
)


class CompletionService:
    """Admits, tokenizes and submits; knows what may still come in."""

    def __init__(self, engine: EngineThread, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.tokenizer = engine.tokenizer
        if settings.chat_template is not None:
            self.tokenizer.chat_template = settings.chat_template
        self._template_process = TemplateProcess()
        self.token_bytes = TokenBytes(engine.tokenizer)
        self.grammars = Grammars(engine.tokenizer, end_tokens(engine.tokenizer), engine.vocab_size)
        self.tool_use = ToolUse(
            answer_formats(engine.tokenizer, settings.tool_call_parser, settings.reasoning_parser),
            engine.tokenizer,
        )
        self._num_sequences, self.usage = 0, KeyUsage()
        self.submission = Submission(engine, settings, self.usage)
        self._answers: set[Answer] = set()
        self._lock = threading.Lock()
        self._tokenizers = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")
        self._waiters = ThreadPoolExecutor(settings.max_sequences, "answer")
        self.contexts = ContextRegistry(
            engine, most=settings.max_contexts, most_bytes=settings.max_context_bytes
        )
        self.encodings: set[asyncio.Task] = set()
        metrics.watch(engine, each_expert=settings.metrics_per_expert)
        metrics.watch_contexts(self.contexts)
        metrics.watch_keys(self.usage)

    @asynccontextmanager
    async def answer(self, ask: Ask, tenant: str = "") -> AsyncIterator[Batch]:
        """Submit what is asked; what has not ended at exit is cancelled.

        tenant: who asks, see `StarRequest`.

        Raises:
            RequestError: a prompt cannot be answered; none is then left running.
        """
        ask = self.contexts.resolved(ask, tenant)
        count, limits = len(ask.prompts) * ask.num_choices, self._limits(tenant)
        _check_priority(ask.priority, limits)
        self._reserve(count, limits)
        submitted = asyncio.ensure_future(self._compile_and_submit(ask, limits))
        try:
            batch = Batch(*await asyncio.shield(submitted), num_best=ask.num_best)
        except BaseException as error:
            submitted.add_done_callback(lambda future: self._abandon(future, count, tenant))
            if isinstance(error, ValueError):
                raise refusal(error) from error
            raise
        with self._lock:
            self._answers.update(batch.answers)
        for index, answer in enumerate(batch.answers):
            self._waiters.submit(self._follow, batch, index, answer)
        try:
            yield batch
        finally:
            cancel(batch.answers)

    def cancel_all(self) -> None:
        """End everything that runs or waits."""
        with self._lock:
            answers = list(self._answers)
        cancel(answers)

    async def in_tokenizer_thread[T](self, function: Callable[..., T], *args: Any) -> T:
        """What `function` returns; for work that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, function, *args)

    def template(self, text: str | None) -> ForeignTemplate | None:
        """The chat template that a request has, if it has one. Raises FieldError if none may have one."""
        if text is None:
            return None
        if not self.settings.trust_request_chat_template:
            raise FieldError(NO_TEMPLATES, "chat_template")
        return ForeignTemplate(text, self._template_process)

    def _limits(self, tenant: str) -> KeyLimits:
        keys = self.settings.keys
        return keys.limits(tenant) if keys else KeyLimits(name=tenant)

    def _reserve(self, count: int, limits: KeyLimits) -> None:
        most = self.settings.max_sequences
        if count > most:
            raise RequestError(400, f"{count} prompts times n are more than the {most} that fit here")
        with self._lock:
            if self._num_sequences + count > most:
                raise RequestError(429, f"{self._num_sequences} of {most} places are taken: try again later")
            self.usage.take_sequences(limits, count)
            self._num_sequences += count

    def _release(self, count: int, tenant: str, num_tokens: int = 0) -> None:
        with self._lock:
            self._num_sequences -= count
        self.usage.give_back(tenant, sequences=count, tokens=num_tokens)

    def _abandon(self, submitted: asyncio.Future, count: int, tenant: str) -> None:
        """Whoever asked is gone, or the request was refused."""
        if not submitted.cancelled() and submitted.exception() is None:
            answers = submitted.result().answers
            cancel(answers)
            self._release(count, tenant, sum(tokens_in_flight(answer.request) for answer in answers))
        else:
            self._release(count, tenant)

    async def _compile_and_submit(self, ask: Ask, limits: KeyLimits) -> Submitted:
        spec = ask.generation.grammar
        grammar = await self.grammars.compiled(spec) if spec else None
        return await self.in_tokenizer_thread(self.submission.submit, ask, limits, grammar)

    def _follow(self, batch: Batch, index: int, answer: Answer) -> None:
        """In a thread of its own: the answer's events, then its result."""
        for token in answer:
            batch.post(index, token)
        result = answer.result()
        if result.attention_map:
            batch.excerpts[index] = excerpts(self.tokenizer, answer.context_tokens, result.attention_map)
        with self._lock:
            self._answers.discard(answer)
        self._release(1, answer.owner.tenant, tokens_in_flight(answer.request))
        self.metrics.note_result(result)
        self.usage.note_result(answer.owner.tenant, result)
        batch.post(index, result)


def _check_priority(priority: int, limits: KeyLimits) -> None:
    if priority < limits.highest_priority:
        raise RequestError(
            400,
            f"priority is {priority}: it must be at least {limits.highest_priority}"
            + (f" with key {limits.name!r}" if limits.name else ""),
            "priority",
        )
