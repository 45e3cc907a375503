"""The bodies of OpenAI's answers: whole, and in chunks."""

import json
import secrets
from collections.abc import AsyncIterator
from time import time
from typing import Any

from megatron_star.inference.answer import NewToken
from megatron_star.inference.request import StarResult
from megatron_star.server.batch import Batch, Progress
from megatron_star.server.completion import CompletionService
from megatron_star.server.errors import RequestError, error_body
from megatron_star.server.requests import star_report


def completion_text(service: CompletionService, prompt: str | list[int]) -> str:
    """A prompt as text, for `echo`."""
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt, skip_special_tokens=False)


def token_logprobs(service: CompletionService, result: StarResult, offset: int = 0) -> dict[str, Any]:
    """Of all generated tokens, the one that ended the sequence included."""
    pieces = service.pieces(result.tokens)
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    return {"tokens": pieces, "token_logprobs": result.logprobs, "text_offset": offsets}


def usage(batch: Batch) -> dict[str, Any]:
    """Token counts of all answers, and what Star Attention did for the first."""
    results, splits = batch.results, batch.splits
    num_choices = len(results) // len(splits)
    prompt_tokens = sum(len(split.context_tokens) + len(split.query_tokens) for split in splits)
    generated = sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(r.num_cached_tokens for r in results[::num_choices])},
        "star": star_report(results[0], splits[0]),
    }


class CompletionAnswers:
    """`/v1/completions`: text, with `echo` in front of it."""

    name, prefix = "text_completion", "cmpl"
    chunk_name = name

    def __init__(self, service: CompletionService, *, logprobs: bool, echoes: list[str]) -> None:
        self.service, self.logprobs, self.echoes = service, logprobs, echoes
        self.offsets = [len(echo) for echo in echoes]

    def choice(self, index: int, result: StarResult) -> dict[str, Any]:
        """A whole answer."""
        echo = self.echoes[index]
        logprobs = None
        if self.logprobs:
            logprobs = token_logprobs(self.service, result, len(echo)) | {"top_logprobs": None}
        return {
            "index": index,
            "text": echo + result.text,
            "logprobs": logprobs,
            "finish_reason": result.finish_reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """What comes before the first token."""
        if not self.echoes[index]:
            return None
        return {"index": index, "text": self.echoes[index], "logprobs": None, "finish_reason": None}

    def piece(self, index: int, token: NewToken) -> dict[str, Any] | None:
        """One token, unless it says nothing."""
        if not token.text and not self.logprobs:
            return None
        choice = {"index": index, "text": token.text, "logprobs": None, "finish_reason": None}
        if self.logprobs:
            text = self.service.pieces([token.token])
            offset = self.offsets[index]
            self.offsets[index] += len(text[0])
            values = {"tokens": text, "token_logprobs": [token.logprob], "text_offset": [offset]}
            choice["logprobs"] = values | {"top_logprobs": None}
        return choice

    def last(self, index: int, result: StarResult) -> dict[str, Any]:
        """The end of an answer."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": result.finish_reason}


class ChatAnswers:
    """`/v1/chat/completions`: messages of the assistant."""

    name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: CompletionService, *, logprobs: bool) -> None:
        self.service, self.logprobs = service, logprobs

    def choice(self, index: int, result: StarResult) -> dict[str, Any]:
        """A whole answer."""
        logprobs = None
        if self.logprobs:
            logprobs = self._logprobs(list(zip(result.tokens, result.logprobs, strict=True)))
        return {
            "index": index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": result.finish_reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """The role comes before the first token."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, token: NewToken) -> dict[str, Any] | None:
        """One token, unless it says nothing."""
        if not token.text and not self.logprobs:
            return None
        logprobs = self._logprobs([(token.token, token.logprob)]) if self.logprobs else None
        return self._chunk(index, {"content": token.text}) | {"logprobs": logprobs}

    def last(self, index: int, result: StarResult) -> dict[str, Any]:
        """The end of an answer."""
        return self._chunk(index, {}) | {"finish_reason": result.finish_reason}

    def _chunk(self, index: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, pairs: list[tuple[int, float]]) -> dict[str, Any]:
        pieces = self.service.pieces([token for token, _ in pairs])
        content = [
            {"token": piece, "logprob": logprob, "bytes": list(piece.encode()), "top_logprobs": []}
            for piece, (_, logprob) in zip(pieces, pairs, strict=True)
        ]
        return {"content": content, "refusal": None}


Answers = CompletionAnswers | ChatAnswers


def envelope(answers: Answers, model: str, *, chunk: bool) -> dict[str, Any]:
    """What every answer, or chunk of it, carries."""
    return {
        "id": f"{answers.prefix}-{secrets.token_hex(12)}",
        "object": answers.chunk_name if chunk else answers.name,
        "created": int(time()),
        "model": model,
    }


async def stream_chunks(
    batch: Batch, answers: Answers, model: str, *, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: chunks, progress as comments, and the end or an error."""
    head = envelope(answers, model, chunk=True)
    for index in range(len(batch.answers)):
        if choice := answers.first(index):
            yield _event(head | {"choices": [choice]})
    try:
        async for event in batch.events():
            if isinstance(event, Progress):
                yield f": encoded {event.num_encoded} of {event.num_tokens} context tokens\n\n"
                continue
            index, part = event
            choice = answers.last(index, part) if isinstance(part, StarResult) else answers.piece(index, part)
            if choice:
                yield _event(head | {"choices": [choice]})
    except RequestError as error:
        yield _event(error_body(error.status, error.message))
        return
    if include_usage:
        yield _event(head | {"choices": [], "usage": usage(batch)})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
