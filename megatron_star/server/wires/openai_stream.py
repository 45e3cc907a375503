"""Answers for OpenAI's clients: whole, and in chunks."""

import asyncio
import json
from collections.abc import AsyncIterator
from time import time
from typing import Any, NamedTuple

from megatron_star.engine.answer import NewToken
from megatron_star.engine.request import StarResult
from megatron_star.server.answering import star_report
from megatron_star.server.batch import Batch, EncodingProgress
from megatron_star.server.errors import RequestError, error_body
from megatron_star.server.wires.chat_answers import ChatAnswers
from megatron_star.server.wires.completion_answers import CompletionAnswers
from megatron_star.server.wires.generation_fields import StreamOptions
from megatron_star.server.wires.token_ids import TokenIds

Answers = CompletionAnswers | ChatAnswers


class AnswerNames(NamedTuple):
    """What an answer calls the request that it is of, and the model."""

    request_id: str
    model: str


def usage(batch: Batch) -> dict[str, Any]:
    """Token counts of all answers, and what Star Attention did for the first."""
    results = batch.results
    return _counts(batch, sum(len(result.tokens) for result in results)) | {
        "prompt_tokens_details": {
            "cached_tokens": sum(r.num_cached_tokens for r in results[:: batch.num_choices])
        },
        "star": star_report(batch),
    }


def _counts(batch: Batch, generated: int) -> dict[str, int]:
    prompt_tokens = sum(len(split.context_tokens) + len(split.query_tokens) for split in batch.splits)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


def render_whole(
    batch: Batch, answers: Answers, names: AnswerNames, *, token_ids: bool = False
) -> dict[str, Any]:
    """The body of an answer; with the ids of all tokens, if they are asked for."""
    choices = [answers.choice(index, answer) for index, answer in enumerate(batch.shown())]
    body = _envelope(answers, names, chunk=False) | {"choices": choices, "usage": usage(batch)}
    body |= answers.beside_choices()
    return TokenIds(batch, in_choices=answers.many_prompts).whole(body) if token_ids else body


def _envelope(answers: Answers, names: AnswerNames, *, chunk: bool) -> dict[str, Any]:
    """What every answer, or chunk of it, carries."""
    return {
        "id": f"{answers.prefix}-{names.request_id}",
        "object": answers.chunk_name if chunk else answers.name,
        "created": int(time()),
        "model": names.model,
    }


async def render_stream(
    batch: Batch, answers: Answers, names: AnswerNames, options: StreamOptions, *, token_ids: bool = False
) -> AsyncIterator[str]:
    """Server-sent events: chunks, progress as comments, and the end or an error.

    token_ids: chunks have those of their tokens.
    """
    head = _envelope(answers, names, chunk=True)
    num_generated = 0
    ids = TokenIds(batch, in_choices=answers.many_prompts) if token_ids else None

    async def chunk(choice: dict[str, Any]) -> str:
        counts = {}
        if options.continuous_usage_stats:
            counts = {"usage": _counts(batch, num_generated)}
        elif options.include_usage:
            counts = {"usage": None}
        body = head | {"choices": [choice]} | counts
        if ids:  # a prompt's may be a million
            return await asyncio.to_thread(lambda: _event(ids.chunk(body)))
        return _event(body)

    for index in range(len(batch.answers)):
        if choice := answers.first(index):
            yield await chunk(choice)
    try:
        async for event in batch.events():
            if isinstance(event, EncodingProgress):
                yield f": encoded {event.num_encoded} of {event.num_tokens} context tokens\n\n"
                continue
            index, part = event
            num_generated += isinstance(part, NewToken)
            if ids:
                ids.note(index, part)
            render = answers.last if isinstance(part, StarResult) else answers.piece
            for choice in render(index, part):
                yield await chunk(choice)
    except RequestError as error:
        yield _event(error_body(error.status, error.message))
        return
    if options.include_usage:
        yield _event(head | {"choices": [], "usage": usage(batch)})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
