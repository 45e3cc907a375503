"""Answers of /v1/responses, whole and as events."""

import json
from collections.abc import AsyncIterator, Iterator
from time import time
from typing import Any

from megatron_star.engine.request import StarResult
from megatron_star.server.answering import star_report
from megatron_star.server.batch import Batch, EncodingProgress
from megatron_star.server.errors import RequestError
from megatron_star.server.service import CompletionService
from megatron_star.server.wires.chat_answers import ChatAnswers
from megatron_star.server.wires.openai_stream import AnswerNames
from megatron_star.server.wires.responses_output import Event, Output
from megatron_star.server.wires.responses_schema import LOGPROBS, ResponsesRequest


class ResponseAnswer:
    """One answer: what is said of it beside its items."""

    def __init__(self, body: ResponsesRequest, names: AnswerNames, service: CompletionService) -> None:
        self.body, self.names, self.service = body, names, service
        self.created, self.output = int(time()), Output()

    async def whole(self, batch: Batch, answers: ChatAnswers) -> dict[str, Any]:
        """The answer, which has ended."""
        return await self.service.in_tokenizer_thread(self._whole, batch, answers)

    def _whole(self, batch: Batch, answers: ChatAnswers) -> dict[str, Any]:
        choice = answers.choice(0, batch.answers[0])
        logprobs = (choice["logprobs"] or {}).get("content") or []
        for _ in self.output.add(choice["message"], logprobs):
            pass
        return self.ended(batch)[1]

    async def stream(self, batch: Batch, answers: ChatAnswers) -> AsyncIterator[str]:
        """Server-sent events: the answer as it comes, progress as comments, and the end or an error."""
        number = -1

        def sent(events: Iterator[Event]) -> Iterator[str]:
            nonlocal number
            for event in events:
                number += 1
                yield f"event: {event['type']}\ndata: {json.dumps(event | {'sequence_number': number})}\n\n"

        for line in sent(self._begun()):
            yield line
        try:
            async for event in batch.events():
                if isinstance(event, EncodingProgress):
                    yield f": encoded {event.num_encoded} of {event.num_tokens} context tokens\n\n"
                    continue
                part = event[1]
                render = answers.last if isinstance(part, StarResult) else answers.piece
                for line in sent(self._more(render(0, part))):
                    yield line
        except RequestError as error:
            failure = {"code": "server_error", "message": error.message}
            for line in sent(iter([self._event("failed", self._response("failed") | {"error": failure})])):
                yield line
            return
        events, response = await self.service.in_tokenizer_thread(self.ended, batch)
        for line in sent(iter([*events, self._event(response["status"], response)])):
            yield line

    def _begun(self) -> Iterator[Event]:
        for name in ("created", "in_progress"):
            yield self._event(name, self._response("in_progress"))

    def _more(self, chunks: list[dict[str, Any]]) -> Iterator[Event]:
        for chunk in chunks:
            logprobs = (chunk["logprobs"] or {}).get("content") or []
            yield from self.output.add(chunk["delta"], logprobs)

    def _event(self, name: str, response: dict[str, Any]) -> Event:
        return {"type": f"response.{name}", "response": response}

    def ended(self, batch: Batch) -> tuple[list[Event], dict[str, Any]]:
        """The last events of its items, and all of it."""
        status = "completed" if batch.results[0].finish_reason == "stop" else "incomplete"
        events = list(self.output.end(status))
        return events, self._response(status) | {
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "completed_at": int(time()) if status == "completed" else None,
            "usage": self._usage(batch.results[0], batch),
        }

    def _usage(self, result: StarResult, batch: Batch) -> dict[str, Any]:
        split, cached, generated = batch.splits[0], result.num_cached_tokens, len(result.tokens)
        asked = len(split.context_tokens) + len(split.query_tokens)
        thought = self.service.tokenizer.encode(self.output.reasoning, add_special_tokens=False)
        return {
            "input_tokens": asked,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": len(split.context_tokens) - cached,
            },
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": len(thought)},
            "total_tokens": asked + generated,
            "star": star_report(batch),
        }

    def _response(self, status: str) -> dict[str, Any]:
        """As OpenAI's reference has it: what was asked is said again."""
        body = self.body
        dump = body.model_dump(
            include={"instructions", "max_output_tokens", "metadata", "top_p", "temperature", "user"}
            | {"safety_identifier", "prompt_cache_key", "tools", "tool_choice", "text", "reasoning"},
            by_alias=True,
        )
        return dump | {
            "id": f"resp_{self.names.request_id}",
            "object": "response",
            "created_at": self.created,
            "model": self.names.model,
            "status": status,
            "output": [dict(item) for item in self.output.items],
            "error": None,
            "incomplete_details": None,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "tools": dump["tools"] or [],
            "tool_choice": dump["tool_choice"] or "auto",
            "text": {"format": (dump["text"] or {}).get("format") or {"type": "text"}},
            "reasoning": {"effort": (dump["reasoning"] or {}).get("effort"), "summary": None},
            "top_logprobs": (body.top_logprobs or 0) if LOGPROBS in (body.include or ()) else 0,
            "metadata": dump["metadata"] or {},
            "background": False,
            "store": False,
            "previous_response_id": None,
            "truncation": "disabled",
            "service_tier": "default",
            "usage": None,
        }
