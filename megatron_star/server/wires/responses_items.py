"""Items of /v1/responses, as a request has them, and the messages that they are."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from megatron_star.server.body import Body, Text
from megatron_star.server.wires.known_fields import only
from megatron_star.server.wires.message_schema import MOST_PARTS, Name

Status = Literal["in_progress", "completed", "incomplete"]


class Part(Body):
    """A text of a message; what an answer has beside it, so that it can be sent back as it is."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: only([]) = None
    logprobs: Any = Field(None, description="no effect")
    parsed: Any = Field(None, description="no effect: a client's reading of the text")


class Refusal(Body):
    """What an answer elsewhere may have in place of a text."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """What is said."""
        return self.refusal


Content = Text | Annotated[list[Part | Refusal], Field(max_length=MOST_PARTS)]


def _joined(content: str | list[Part | Refusal]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class Item(Body):
    """What all items may have."""

    id: Name | None = None
    status: Status | None = None

    @property
    def is_begun(self) -> bool:
        """It is to be continued."""
        return False


class MessageItem(Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    phase: Literal["commentary", "final_answer"] | None = Field(None, description="no effect")

    @property
    def is_begun(self) -> bool:
        """Of the assistant, and not ended."""
        return self.role == "assistant" and self.status in ("in_progress", "incomplete")

    def message(self) -> dict[str, Any]:
        """As a chat has it."""
        return {"role": self.role, "content": _joined(self.content)}


class CallItem(Item):
    """A call that an answer made."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Text
    async_: only(False) = Field(None, alias="async")
    caller: only({"type": "direct"}) = None
    namespace: only() = None
    parsed_arguments: Any = Field(None, description="no effect: a client's reading of `arguments`")

    def message(self) -> dict[str, Any]:
        """As a chat has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "tool_calls": [{"id": self.call_id, "function": function}]}


class ResultItem(Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Content

    def message(self) -> dict[str, Any]:
        """As a chat has it."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": _joined(self.output)}


class ReasoningPart(Body):
    """A text of a reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(Item):
    """What an answer thought; its text, or else the summary of it."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningPart], Field(max_length=MOST_PARTS)] | None = None
    content: Annotated[list[ReasoningPart], Field(max_length=MOST_PARTS)] | None = None
    encrypted_content: only() = None

    def message(self) -> dict[str, Any]:
        """As a chat has it."""
        parts = self.content or self.summary or []
        return {"role": "assistant", "reasoning_content": "\n".join(part.text for part in parts)}


def _kind(item: Any) -> str:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="only message, function_call, function_call_output and reasoning are known here",
    ),
]
ORDER_IN_A_MESSAGE = ("reasoning_content", "content", "tool_calls")


def messages_of(items: list[Any]) -> list[dict[str, Any]]:
    """A chat's messages: what the assistant thought, said and called without a break is one of them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        new = item.message()
        if messages and _go_together(messages[-1], new):
            calls = messages[-1].get("tool_calls", []) + new.get("tool_calls", [])
            messages[-1] |= new | ({"tool_calls": calls} if calls else {})
        else:
            messages.append(new)
    return messages


def _go_together(earlier: dict[str, Any], later: dict[str, Any]) -> bool:
    """Both are the assistant's, and the later one goes on where in a message the earlier one ended."""
    if not earlier["role"] == later["role"] == "assistant":
        return False
    last = max(ORDER_IN_A_MESSAGE.index(name) for name in earlier if name != "role")
    next_ = min(ORDER_IN_A_MESSAGE.index(name) for name in later if name != "role")
    return next_ > last or ORDER_IN_A_MESSAGE[next_] == "tool_calls"
