"""Renders answers for OpenAI's clients: whole, and in chunks."""

import json
import secrets
from collections.abc import AsyncIterator
from time import time
from typing import Any

from megatron_star.engine.answer import Answer, NewToken
from megatron_star.engine.request import StarResult
from megatron_star.server.answering import star_report
from megatron_star.server.batch import Batch, EncodingProgress
from megatron_star.server.errors import RequestError, error_body
from megatron_star.server.service import CompletionService
from megatron_star.server.wires.openai_schemas import StreamOptions
from megatron_star.text.prompt import SplitPrompt
from megatron_star.text.text_stream import PROMPT_TOKENS, TextStream, text_offsets

LogprobOfToken = tuple[int, float, tuple[int, float]]
"""A token with its log-probability, and the same of the most likely one in its place."""


def prompt_end(split: SplitPrompt) -> list[int]:
    """As many of a prompt's last tokens as a `TextStream` looks at."""
    return split.context_tokens[-PROMPT_TOKENS:] + split.query_tokens[-PROMPT_TOKENS:]


def usage(batch: Batch) -> dict[str, Any]:
    """Token counts of all answers, and what Star Attention did for the first."""
    results, splits = batch.results, batch.splits
    return _counts(batch, sum(len(result.tokens) for result in results)) | {
        "prompt_tokens_details": {
            "cached_tokens": sum(r.num_cached_tokens for r in results[:: batch.num_choices])
        },
        "star": star_report(results[0], splits[0]),
    }


def _counts(batch: Batch, generated: int) -> dict[str, int]:
    prompt_tokens = sum(len(split.context_tokens) + len(split.query_tokens) for split in batch.splits)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


class CompletionAnswers:
    """`/v1/completions`: text, with `echo` in front of it."""

    name, prefix = "text_completion", "cmpl"
    chunk_name = name

    def __init__(self, service: CompletionService, batch: Batch, *, logprobs: int | None) -> None:
        self.token_bytes, self.logprobs = service.token_bytes, logprobs
        each = range(batch.num_choices)
        self.echoes = [echo for echo in batch.echoes for _ in each] or [""] * len(batch.answers)
        self._streams = []
        if logprobs is not None:
            ends = [prompt_end(split) for split in batch.splits]
            self._streams = [TextStream(service.tokenizer, end) for end in ends for _ in each]

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        tokens = zip(answer.tokens, answer.logprobs, answer.likeliest, strict=True)
        choice = self._choice(index, self.echoes[index] + answer.text, answer.finish_reason)
        return choice | {"logprobs": self._logprobs(index, list(tokens))}

    def first(self, index: int) -> dict[str, Any] | None:
        """What comes before the first token."""
        return self._choice(index, self.echoes[index]) if self.echoes[index] else None

    def piece(self, index: int, token: NewToken) -> dict[str, Any] | None:
        """One token, unless it says nothing."""
        if not token.text and self.logprobs is None:
            return None
        logprobs = self._logprobs(index, [(token.token, token.logprob, token.likeliest)])
        return self._choice(index, token.text) | {"logprobs": logprobs}

    def last(self, index: int, result: StarResult) -> dict[str, Any]:
        """The end of an answer."""
        return self._choice(index, "", result.finish_reason)

    def _choice(self, index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _logprobs(self, index: int, tokens: list[LogprobOfToken]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        piece = self.token_bytes.piece
        likeliest = None
        if self.logprobs:
            likeliest = [{piece(top): best, piece(token): value} for token, value, (top, best) in tokens]
        ids = [token for token, *_ in tokens]
        return {
            "tokens": self.token_bytes.pieces(ids),
            "token_logprobs": [value for _, value, _ in tokens],
            "text_offset": list(text_offsets(self._streams[index], ids)),
            "top_logprobs": likeliest,
        }


class ChatAnswers:
    """`/v1/chat/completions`: messages of the assistant."""

    name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: CompletionService, *, logprobs: bool, top_logprobs: bool = False) -> None:
        self.token_bytes, self.logprobs, self.top_logprobs = service.token_bytes, logprobs, top_logprobs

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        tokens = zip(answer.tokens, answer.logprobs, answer.likeliest, strict=True)
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(list(tokens)) if self.logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """The role comes before the first token."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, token: NewToken) -> dict[str, Any] | None:
        """One token, unless it says nothing."""
        if not token.text and not self.logprobs:
            return None
        tokens = [(token.token, token.logprob, token.likeliest)]
        logprobs = self._logprobs(tokens) if self.logprobs else None
        return self._chunk(index, {"content": token.text}) | {"logprobs": logprobs}

    def last(self, index: int, result: StarResult) -> dict[str, Any]:
        """The end of an answer."""
        return self._chunk(index, {}) | {"finish_reason": result.finish_reason}

    def _chunk(self, index: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: list[LogprobOfToken]) -> dict[str, Any]:
        content = [
            self._token(token, value)
            | {"top_logprobs": [self._token(*likeliest)] if self.top_logprobs else []}
            for token, value, likeliest in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        value = self.token_bytes.of(token)
        values = None if value is None else list(value)
        return {"token": self.token_bytes.piece(token), "logprob": logprob, "bytes": values}


Answers = CompletionAnswers | ChatAnswers


def render_whole(batch: Batch, answers: Answers, model: str) -> dict[str, Any]:
    """The body of an answer."""
    choices = [answers.choice(index, answer) for index, answer in enumerate(batch.answers)]
    return _envelope(answers, model, chunk=False) | {"choices": choices, "usage": usage(batch)}


def _envelope(answers: Answers, model: str, *, chunk: bool) -> dict[str, Any]:
    """What every answer, or chunk of it, carries."""
    return {
        "id": f"{answers.prefix}-{secrets.token_hex(12)}",
        "object": answers.chunk_name if chunk else answers.name,
        "created": int(time()),
        "model": model,
    }


async def render_stream(
    batch: Batch, answers: Answers, model: str, options: StreamOptions
) -> AsyncIterator[str]:
    """Server-sent events: chunks, progress as comments, and the end or an error."""
    head = _envelope(answers, model, chunk=True)
    num_generated = 0

    def chunk(choice: dict[str, Any]) -> str:
        counts = {}
        if options.continuous_usage_stats:
            counts = {"usage": _counts(batch, num_generated)}
        elif options.include_usage:
            counts = {"usage": None}
        return _event(head | {"choices": [choice]} | counts)

    for index in range(len(batch.answers)):
        if choice := answers.first(index):
            yield chunk(choice)
    try:
        async for event in batch.events():
            if isinstance(event, EncodingProgress):
                yield f": encoded {event.num_encoded} of {event.num_tokens} context tokens\n\n"
                continue
            index, part = event
            num_generated += isinstance(part, NewToken)
            choice = answers.last(index, part) if isinstance(part, StarResult) else answers.piece(index, part)
            if choice:
                yield chunk(choice)
    except RequestError as error:
        yield _event(error_body(error.status, error.message))
        return
    if options.include_usage:
        yield _event(head | {"choices": [], "usage": usage(batch)})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
