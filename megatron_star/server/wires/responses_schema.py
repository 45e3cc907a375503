"""What a request to /v1/responses may contain: the part of OpenAI's that keeps nothing."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from megatron_star.server.body import Body, PositiveTokens, Text
from megatron_star.server.errors import describe_validation
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.chat_schema import ChatRequest
from megatron_star.server.wires.generation_fields import GenerationFields
from megatron_star.server.wires.known_fields import only
from megatron_star.server.wires.message_schema import MOST_MESSAGES, Name
from megatron_star.server.wires.responses_items import InputItem, messages_of
from megatron_star.server.wires.template_fields import Effort, Variables

MOST_TOOLS = 128
LOGPROBS = "message.output_text.logprobs"
TOLD_IN_FULL = "no effect: reasoning is told in full"
HERE = {
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
}
"""What a chat's fields are called on this route, where that is another name."""


class FunctionTool(Body):
    """A function that an answer may call."""

    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        """As a chat has it."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class ToolOfChoice(Body):
    """The name of a tool."""

    type: Literal["function"]
    name: Name

    def for_chat(self) -> dict[str, Any]:
        """As a chat has it."""
        return {"type": "function", "function": {"name": self.name}}


class AllowedTools(Body):
    """Tools of which an answer may call some, or must."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolOfChoice], Field(min_length=1, max_length=MOST_TOOLS)]

    def for_chat(self) -> dict[str, Any]:
        """As a chat has it."""
        tools = [tool.for_chat() for tool in self.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": tools}}


class TextFormat(Body):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        """As a chat has it."""
        if self.type != "json_schema":
            return {"type": self.type}
        schema = self.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": self.type, "json_schema": schema}


class TextOptions(Body):
    """About the text of an answer."""

    format: TextFormat | None = None
    verbosity: only("medium") = None


class Reasoning(Body):
    """How much an answer thinks."""

    effort: Effort | None = None
    summary: only("auto", "concise", "detailed") = Field(None, description=TOLD_IN_FULL)
    generate_summary: only("auto", "concise", "detailed") = Field(None, description=TOLD_IN_FULL)


class ResponsesRequest(GenerationFields):
    """POST /v1/responses."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: Text | None = Field(None, description="a system message in front of the input")
    max_output_tokens: PositiveTokens | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolOfChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None, description="`reasoning.encrypted_content` has no effect: reasoning is told as it is"
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    star: StarOptions | None = None
    chat_template_kwargs: Variables | None = None
    n: only(1) = None
    response_format: only() = None
    prompt_logprobs: only() = None
    background: only(False) = None
    background_options: only() = None
    conversation: only() = None
    context_management: only() = None
    previous_response_id: only() = None
    prompt: only() = None
    prompt_cache_options: only() = None
    max_tool_calls: only() = None
    moderation: only() = None
    access_programs: only() = None
    image: only() = None
    truncation: only("disabled") = None
    _chat: ChatRequest | None = None

    @model_validator(mode="after")
    def _is_a_chat(self) -> Self:
        try:
            self._chat = ChatRequest(**self._for_chat())
        except ValidationError as error:
            message, field = describe_validation(error.errors(include_url=False, include_input=False))
            head, dot, rest = (field or "").partition(".")
            here = HERE.get(head, head) + dot + rest
            raise ValueError(here + message.removeprefix(field or "")) from None
        return self

    @property
    def chat(self) -> ChatRequest:
        """The same, asked of /v1/chat/completions."""
        assert self._chat is not None
        return self._chat

    def _for_chat(self) -> dict[str, Any]:
        items = [] if isinstance(self.input, str) else self.input
        messages = messages_of(items) or [{"role": "user", "content": self.input}]
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        wants_logprobs = LOGPROBS in (self.include or ())
        choice = self.tool_choice
        found = {
            "messages": messages,
            "continue_final_message": bool(items and items[-1].is_begun),
            "max_completion_tokens": self.max_output_tokens,
            "tools": [tool.for_chat() for tool in self.tools or ()] or None,
            "tool_choice": choice if isinstance(choice, str | None) else choice.for_chat(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": self.text.format.for_chat() if self.text and self.text.format else None,
            "logprobs": wants_logprobs,
            "top_logprobs": self.top_logprobs if wants_logprobs else None,
            "star": self.star,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        names = (self.model_fields_set & GenerationFields.model_fields.keys()) - found.keys()
        return {name: getattr(self, name) for name in names} | found
