"""What requests to /v1/contexts may contain, and what they are told."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from megatron_star.config import MOST_TOKENS_IN_REQUEST
from megatron_star.server.body import Body, Text, TokenId
from megatron_star.server.errors import RequestError
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.message_schema import Message
from megatron_star.server.wires.template_fields import Effort, Variables, effort_variables
from megatron_star.server.wires.tenant_fields import TenantFields
from megatron_star.server.wires.tool_fields import MOST_TOOLS, Tool
from megatron_star.text.chat_template import Chat

DAY = 86_400
MOST_DAYS = 30
TEXT_FIELDS = ("name", "text", "cache_salt")
"""That a form has as they are; its other fields are JSON."""
OF_CHATS = ("messages", "tools", "chat_template_kwargs", "reasoning_effort")


class ContextRequest(TenantFields, Body):
    """POST /v1/contexts. A form has the same fields, and `file` in the place of `text`."""

    text: Text | None = None
    tokens: Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS_IN_REQUEST)] | None = None
    name: Annotated[Text, Field(max_length=256)] | None = None
    for_chat: bool | None = Field(
        None, description="encode it for chats, not completions; true where the model has a template"
    )
    messages: Annotated[list[Message], Field(max_length=64)] | None = Field(
        None, description="with which those chats begin, of the role system or developer"
    )
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = Field(
        None, description="of those chats, like the next two"
    )
    chat_template_kwargs: Variables | None = None
    reasoning_effort: Effort | None = None
    star: StarOptions | None = None
    ttl_seconds: Annotated[int, Field(ge=1, le=MOST_DAYS * DAY)] | None = Field(
        None, description=f"after its last use; {DAY} if left out"
    )
    wait: bool | None = Field(None, description="answer when it is encoded")

    @model_validator(mode="after")
    def _one_content_and_one_beginning(self) -> Self:
        if (self.text is None) == (self.tokens is None):
            raise ValueError("text: give text, tokens or, in a form, a file: one of them")
        if any(message.role not in ("system", "developer") for message in self.messages or ()):
            raise ValueError("messages: before the context, only the roles system and developer are read")
        if self.for_chat is False and self._says_how_chats_begin:
            raise ValueError(f"for_chat: {', '.join(OF_CHATS)} are of chats")
        if self.star and (self.star.query_tokens is not None or self.star.separator is not None):
            raise ValueError("star: query_tokens and separator have no meaning here: there is no query")
        return self

    @classmethod
    def values_of_form(cls, fields: dict[str, str]) -> dict[str, Any]:
        """What a JSON body with these fields would say. Raises RequestError."""
        values = {}
        for name, text in fields.items():
            try:
                values[name] = text if name in TEXT_FIELDS else json.loads(text)
            except (ValueError, RecursionError) as error:
                raise RequestError(400, f"{name[:100]}: it is no JSON: {error}", name[:100]) from error
        return values

    def opening(self, *, has_template: bool) -> Chat | None:
        """What comes before it in chats; None if it is for completions."""
        for_chat = self._says_how_chats_begin or (has_template and self.text is not None)
        if not (for_chat if self.for_chat is None else self.for_chat):
            return None
        messages = [message.for_template() for message in self.messages or ()]
        return Chat(
            messages,
            tools=[tool.model_dump(exclude_none=True) for tool in self.tools or ()] or None,
            variables=effort_variables(self.reasoning_effort, self.chat_template_kwargs or {}),
        )

    @property
    def _says_how_chats_begin(self) -> bool:
        return any(getattr(self, name) is not None for name in OF_CHATS)


class ContextObject(BaseModel):
    """A context. Times are seconds since 1970.

    `tokens` and `encoded_tokens` count those of the context with what a chat begins with. `bytes` is memory
    of the server, `kv_bytes` memory of all ranks by kind of layer.
    """

    id: str
    object: Literal["context"] = "context"
    name: str | None
    created: int
    last_used: int
    expires: int
    status: Literal["queued", "encoding", "encoded", "dropped", "failed"]
    error: str | None
    for_chat: bool
    tokens: int
    encoded_tokens: int
    blocks: int
    mode: Literal["star", "exact"]
    sizes: dict[str, int]
    kv_bytes: dict[str, int]
    bytes: int


class ContextList(BaseModel):
    """Of one API key, the oldest first."""

    object: Literal["list"] = "list"
    data: list[ContextObject]


class DeletedContext(BaseModel):
    """It is not there any more."""

    id: str
    object: Literal["context"] = "context"
    deleted: Literal[True] = True
