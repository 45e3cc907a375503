"""Items of an answer of /v1/responses, and the events that tell of them as they grow."""

import secrets
from collections.abc import Callable, Iterator
from typing import Any

Event = dict[str, Any]


class OutputItem:
    """One item, while it grows.

    A subclass says how the item looks (`begun`), what its events are called, and how it ends.
    """

    prefix, delta_type = "", ""

    def __init__(self, index: int, **fields: Any) -> None:
        self.index, self.id = index, f"{self.prefix}_{secrets.token_hex(12)}"
        self.text, self.item = "", {"id": self.id, "status": "in_progress"} | self.begun(**fields)

    def begun(self) -> dict[str, Any]:
        """The item, with nothing in it."""
        raise NotImplementedError

    def opening(self) -> Iterator[Event]:
        """Events at its begin."""
        yield {"type": "response.output_item.added", "output_index": self.index, "item": dict(self.item)}

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Events about more of it."""
        self.text += text
        yield self.event(f"{self.delta_type}.delta", delta=text)

    def closing(self, status: str) -> Iterator[Event]:
        """Events at its end; then `item` is whole."""
        yield from self.ended()
        self.item["status"] = status
        yield {"type": "response.output_item.done", "output_index": self.index, "item": self.item}

    def ended(self) -> Iterator[Event]:
        """Events about all of it."""
        raise NotImplementedError

    def event(self, name: str, /, **fields: Any) -> Event:
        """One about this item."""
        return {"type": f"response.{name}", "item_id": self.id, "output_index": self.index} | fields


class _WithPart(OutputItem):
    """One whose text is a part of it."""

    def part(self) -> dict[str, Any]:
        """With the text so far."""
        raise NotImplementedError

    def opening(self) -> Iterator[Event]:
        """Events at its begin."""
        yield from super().opening()
        yield self.event("content_part.added", part=self.part())

    def event(self, name: str, /, **fields: Any) -> Event:
        """One about this item, and its only part."""
        return super().event(name, content_index=0, **fields)

    def ended(self) -> Iterator[Event]:
        """Events about all of it."""
        yield self.event(f"{self.delta_type}.done", text=self.text, **self.logprobs_of_all())
        self.item["content"] = [self.part()]
        yield self.event("content_part.done", part=self.part())

    def logprobs_of_all(self) -> dict[str, Any]:
        """A field for them, where there is one."""
        return {}


class ReasoningOutput(_WithPart):
    """What an answer thought."""

    prefix, delta_type = "rs", "reasoning_text"

    def begun(self) -> dict[str, Any]:
        """The item, with nothing in it."""
        return {"type": "reasoning", "summary": [], "content": []}

    def part(self) -> dict[str, Any]:
        """With the text so far."""
        return {"type": "reasoning_text", "text": self.text}


class MessageOutput(_WithPart):
    """What an answer says."""

    prefix, delta_type = "msg", "output_text"

    def begun(self) -> dict[str, Any]:
        """The item, with nothing in it."""
        self.logprobs: list[dict[str, Any]] = []
        return {"type": "message", "role": "assistant", "content": []}

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Events about more of it."""
        self.logprobs += logprobs
        for event in super().add(text, logprobs):
            yield event | {"logprobs": logprobs}

    def part(self) -> dict[str, Any]:
        """With the text so far."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def logprobs_of_all(self) -> dict[str, Any]:
        """A field for them."""
        return {"logprobs": list(self.logprobs)}


class CallOutput(OutputItem):
    """A call of a function."""

    prefix, delta_type = "fc", "function_call_arguments"

    def begun(self, *, call_id: str, name: str) -> dict[str, Any]:
        """The item, with nothing in it."""
        return {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}

    def ended(self) -> Iterator[Event]:
        """Events about all of it."""
        self.item["arguments"] = self.text
        yield self.event(f"{self.delta_type}.done", name=self.item["name"], arguments=self.text)


class Output:
    """All items of an answer, which come one after the other, from what a chat's answer tells."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.reasoning = ""
        self._open: OutputItem | None = None

    def add(self, delta: dict[str, Any], logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Events about more of the answer.

        Args:
            delta: of a message, as a chunk of a chat has it.
            logprobs: of the tokens that it is made of.
        """
        if thought := delta.get("reasoning_content"):
            self.reasoning += thought
            yield from self._add(ReasoningOutput, thought, [])
        if (said := delta.get("content")) or (logprobs and not thought and not delta.get("tool_calls")):
            yield from self._add(MessageOutput, said or "", logprobs)
        for call in delta.get("tool_calls") or ():
            function = call["function"]
            if "id" in call:
                yield from self._close()
                yield from self._begin(CallOutput, call_id=call["id"], name=function["name"])
            if function.get("arguments"):
                yield from self._open.add(function["arguments"], [])

    def end(self, status: str) -> Iterator[Event]:
        """Events at the end of the answer; an answer of nothing is an empty message."""
        if not self.items:
            yield from self._begin(MessageOutput)
        yield from self._close(status)

    def _add(self, kind: type[OutputItem], text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if type(self._open) is not kind:
            yield from self._close()
            yield from self._begin(kind)
        yield from self._open.add(text, logprobs)

    def _begin(self, kind: Callable[..., OutputItem], **fields: Any) -> Iterator[Event]:
        self._open = kind(len(self.items), **fields)
        self.items.append(self._open.item)
        yield from self._open.opening()

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if self._open:
            yield from self._open.closing(status)
            self._open = None
