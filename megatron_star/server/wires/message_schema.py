"""Messages of a chat, as a request has them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_star.server.body import Body, Text
from megatron_star.server.wires.known_fields import NeutralMessageFields

MOST_MESSAGES, MOST_PARTS, MOST_CALLS = 4096, 1024, 128
Name = Annotated[Text, Field(max_length=512)]


class TextPart(Body):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class FunctionOfCall(Body):
    """Which function an answer called, and with what, as a JSON text."""

    name: Name
    arguments: Text = ""
    parsed_arguments: Any = Field(None, description="no effect: a client's reading of `arguments`")


class ToolCall(Body):
    """A call of a message of the assistant."""

    id: Name | None = None
    type: Literal["function"] | None = "function"
    function: FunctionOfCall
    index: int | None = Field(None, description="no effect: a stream's count")

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id or "", "type": "function", "function": function}


class Message(NeutralMessageFields, Body):
    """One message of a chat.

    Those with the role `function`, and `function_call`, are what tools were before they had this name.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Field(max_length=MOST_PARTS)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS)] | None = None
    tool_call_id: Name | None = None
    function_call: FunctionOfCall | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = Field(None, description="the same as reasoning_content")

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role != "assistant":
            if self.content is None:
                raise ValueError("content: it may be null in messages of the assistant only")
            for field in ("tool_calls", "function_call"):
                if getattr(self, field):
                    raise ValueError(f"{field}: only messages of the assistant have it")
        if self.tool_calls and self.function_call:
            raise ValueError("function_call: leave it out where there are tool_calls")
        if self.tool_call_id is not None and self.role not in ("tool", "function"):
            raise ValueError("tool_call_id: only messages with the role 'tool' have it")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it; what it does not have is left out. Parts are lines."""
        calls = [call.for_template() for call in self.tool_calls or ()]
        if self.function_call:
            calls = [ToolCall(function=self.function_call).for_template()]
        more = {
            "name": self.name,
            "tool_calls": calls or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning,
        }
        message = {"role": "tool" if self.role == "function" else self.role, "content": self._text()}
        return message | {key: value for key, value in more.items() if value}

    def _text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
