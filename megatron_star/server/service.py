"""From an `Ask` to its answers: admission, tokenization and submission."""

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_star.config import FieldError, StarConfig
from megatron_star.engine.answer import Answer
from megatron_star.engine.grammar import Grammar
from megatron_star.engine.request import StarRequest
from megatron_star.engine.thread import EngineThread
from megatron_star.planning.mask import most_sources
from megatron_star.planning.sizes import length_for_sizes, with_sizes
from megatron_star.server.ask import Ask, Content, Generation
from megatron_star.server.attention_report import excerpts
from megatron_star.server.batch import Batch
from megatron_star.server.context_rules import PromptSplitter
from megatron_star.server.contexts import ContextRegistry
from megatron_star.server.errors import RequestError, refusal
from megatron_star.server.grammars import Grammars
from megatron_star.server.key_usage import KeyUsage, tokens_in_flight
from megatron_star.server.keys import KeyLimits
from megatron_star.server.metrics import ServerMetrics
from megatron_star.server.settings import ServerSettings
from megatron_star.server.star_options import StarOptions
from megatron_star.server.tools.formats import answer_formats
from megatron_star.server.tools.tool_use import ToolUse
from megatron_star.text.bad_words import bad_word_tokens
from megatron_star.text.end_tokens import end_tokens, stop_tokens
from megatron_star.text.foreign_template import ForeignTemplate, TemplateProcess
from megatron_star.text.prompt import SplitPrompt, truncated
from megatron_star.text.token_bytes import TokenBytes

MOST_BLOCK_SOURCES = 1 << 15
MOST_PROMPT_LOGPROBS = 1 << 21
TOKENIZER_THREADS = 2
NO_TEMPLATES = (
    "chat_template: this server takes none from requests: it would have to be started with "
    "--trust-request-chat-template"
)


class _Submitted(NamedTuple):
    """See `Batch`."""

    splits: list[SplitPrompt]
    answers: list[Answer]
    echoes: list[str]


class CompletionService:
    """Admits, tokenizes and submits; knows what may still come in."""

    def __init__(self, engine: EngineThread, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.tokenizer = engine.tokenizer
        if settings.chat_template is not None:
            self.tokenizer.chat_template = settings.chat_template
        self._template_process = TemplateProcess()
        self.token_bytes = TokenBytes(engine.tokenizer)
        self.end_tokens = end_tokens(engine.tokenizer)
        self.grammars = Grammars(engine.tokenizer, self.end_tokens, engine.vocab_size)
        self.tool_use = ToolUse(
            answer_formats(engine.tokenizer, settings.tool_call_parser, settings.reasoning_parser),
            engine.tokenizer,
        )
        self.splitter = PromptSplitter(
            engine.tokenizer,
            settings.num_query_tokens,
            settings.separator,
            max_tokens=engine.max_sequence_length,
        )
        self._num_sequences, self.usage = 0, KeyUsage()
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
            self.cancel(batch.answers)

    def cancel(self, answers: list[Answer]) -> None:
        """End those that have not ended."""
        for answer in answers:
            if not answer.ended.is_set():
                answer.cancel()

    def cancel_all(self) -> None:
        """End everything that runs or waits."""
        with self._lock:
            answers = list(self._answers)
        self.cancel(answers)

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

    def star_config(self, options: StarOptions) -> StarConfig:
        """The server's, with what the request sets.

        Raises:
            FieldError: the two do not go together.
        """
        try:
            return replace(self.settings.star, **options.encoding())
        except FieldError as error:
            raise FieldError(str(error), f"star.{error.field}") from error

    def _star_of(self, ask: Ask) -> StarConfig:
        """Log-probabilities of a prompt are those of the model itself, if the request names no mode."""
        star = self.star_config(ask.star)
        is_exact = ask.generation.prompt_logprobs is not None and ask.star.mode is None
        return replace(star, mode="exact") if is_exact else star

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
            self.cancel(answers)
            self._release(count, tenant, sum(tokens_in_flight(answer.request) for answer in answers))
        else:
            self._release(count, tenant)

    async def _compile_and_submit(self, ask: Ask, limits: KeyLimits) -> _Submitted:
        spec = ask.generation.grammar
        grammar = await self.grammars.compiled(spec) if spec else None
        return await self.in_tokenizer_thread(self._submit, ask, limits, grammar)

    def _submit(self, ask: Ask, limits: KeyLimits, grammar: Grammar | None) -> _Submitted:
        """In a tokenizer's thread."""
        star = self._star_of(ask)
        common = {
            "speculate": ask.star.speculate or self.settings.speculate,
            "tenant": limits.name,
            "share": limits.share,
            "cache_salt": ask.cache_salt,
            "priority": ask.priority,
            "grammar": grammar,
        }
        splits = [self._truncated(prompt.split(self.splitter, ask.star), ask) for prompt in ask.prompts]
        echoes = [self._as_text(content) for content in ask.echoed]
        for split in splits:
            self._check_context(split, star)
            self._check_prompt_logprobs(split, ask.generation.prompt_logprobs)
        generation = self._with_bad_words(ask.generation)
        requests: list[StarRequest] = []
        for index, split in enumerate(split for split in splits for _ in range(ask.num_choices)):
            request = self._request(split, star, generation, index)
            # Only the first answer to a prompt says what was done for it.
            is_first = index % ask.num_choices == 0
            common["attention_map"] = bool(ask.star.attention_map) and is_first
            common["prompt_logprobs"] = ask.generation.prompt_logprobs if is_first else None
            requests.append(replace(request, **common))
        return _Submitted(splits, self._submit_all(requests, limits), echoes)

    def _submit_all(self, requests: list[StarRequest], limits: KeyLimits) -> list[Answer]:
        """All of them, or none: then their tokens are not in flight either."""
        answers: list[Answer] = []
        count = sum(map(tokens_in_flight, requests))
        self.usage.take_tokens(limits, count)
        try:
            with self._cancelled_on_error(answers):
                answers += map(self.engine.submit, requests)
        except BaseException:
            self.usage.give_back(limits.name, tokens=count)
            raise
        return answers

    def _truncated(self, split: SplitPrompt, ask: Ask) -> SplitPrompt:
        most = ask.truncate_prompt
        if most == -1:
            most = max(1, self.engine.max_sequence_length - ask.generation.num_tokens)
        return split if most is None else truncated(split, most)

    def _with_bad_words(self, generation: Generation) -> Generation:
        """As tokens, among the rules."""
        rules, words = generation.rules, bad_word_tokens(self.tokenizer, generation.bad_words)
        return replace(generation, rules=replace(rules, bad_words=rules.bad_words + words))

    def _as_text(self, content: Content) -> str:
        if isinstance(content, str):
            return content
        return self.tokenizer.decode(content, skip_special_tokens=False)

    @contextmanager
    def _cancelled_on_error(self, answers: list[Answer]) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.cancel(answers)
            if isinstance(error, RuntimeError):
                raise RequestError(503, str(error)) from error
            raise

    def _request(
        self, split: SplitPrompt, star: StarConfig, generation: Generation, index: int
    ) -> StarRequest:
        seed = secrets.randbits(62) if generation.seed is None else generation.seed + index
        ends = self.end_tokens if generation.end_tokens is None else generation.end_tokens
        room = self.engine.most_generated(len(split.context_tokens) + len(split.query_tokens))
        return StarRequest(
            context_tokens=split.context_tokens,
            query_tokens=split.query_tokens,
            star=star,
            sampling=generation.sampling(room),
            end_tokens=(*ends, *generation.more_end_tokens, *stop_tokens(self.tokenizer, generation.stop)),
            min_tokens=generation.min_tokens,
            rules=generation.rules,
            num_top_logprobs=generation.num_top_logprobs,
            include_stop_text=generation.include_stop_text,
            skip_special_tokens=generation.skip_special_tokens,
            hidden_tokens=generation.hidden_tokens,
            seed=seed,
            turn_edges=split.turn_edges,
        )

    def _check_prompt_logprobs(self, split: SplitPrompt, num_top: int | None) -> None:
        num_tokens = len(split.context_tokens) + len(split.query_tokens)
        if num_top is not None and num_tokens * (1 + num_top) > MOST_PROMPT_LOGPROBS:
            raise RequestError(
                400,
                f"log-probabilities of {num_tokens} prompt tokens, each with {num_top} others, are more "
                f"than the {MOST_PROMPT_LOGPROBS} of one answer",
                "prompt_logprobs",
            )

    def _check_context(self, split: SplitPrompt, star: StarConfig) -> None:
        num_tokens, most = len(split.context_tokens), self.settings.max_context_tokens
        if most is not None and num_tokens > most:
            raise RequestError(
                400, f"the context has {num_tokens} tokens, but the limit is {most}", "context"
            )
        star = with_sizes(star, length_for_sizes(num_tokens, split.turn_edges))
        if most_sources(star, num_tokens) > MOST_BLOCK_SOURCES:
            raise RequestError(
                400,
                f"star.block_size is {star.block_size}: too small for {num_tokens} context tokens with "
                f"neighbor_blocks {star.neighbor_blocks} and passed_keys {star.passed_keys}",
                "star.block_size",
            )

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
