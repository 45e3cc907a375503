"""Fields about the chat template: what it is told beside the messages."""

from inspect import signature
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator
from transformers import PreTrainedTokenizerBase

from megatron_star.server.body import Text
from megatron_star.server.wires.message_schema import Messages, Name
from megatron_star.text.chat_template import Chat, Template

MOST_VARIABLES, MOST_DOCUMENTS = 64, 1024
LONGEST_TEMPLATE = 1 << 16
TAKEN = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
"""Names that mean something to whoever calls a template, or that have fields of their own."""


def _free_name(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f"{name[:100]!r} is no name that a template could ask for")
    if name in TAKEN:
        raise ValueError(f"{name}: it has a field of its own, or none")
    return name


Variables = Annotated[
    dict[Annotated[Name, AfterValidator(_free_name)], Any], Field(max_length=MOST_VARIABLES)
]
Document = Annotated[dict[Name, Text], Field(max_length=16)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def effort_variables(effort: Effort | None, variables: dict[str, Any]) -> dict[str, Any]:
    """`variables`, and what templates call an effort at reasoning, where they do not say it already."""
    if effort is None:
        return variables
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"} | variables


class TemplateFields(BaseModel):
    """On all routes that take messages."""

    messages: Messages
    add_generation_prompt: bool | None = Field(
        None, description="true, unless the final message is continued"
    )
    continue_final_message: bool | None = Field(None, description="the answer goes on with the last message")
    chat_template: Annotated[Text, Field(min_length=1, max_length=LONGEST_TEMPLATE)] | None = Field(
        None, description="in place of the model's own, where the server takes them"
    )
    chat_template_kwargs: Variables | None = Field(None, description="for the template, if it asks for them")

    @model_validator(mode="after")
    def _continues_or_begins(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: it needs add_generation_prompt=false")
        return self

    def chat(
        self,
        tools: list[dict[str, Any]] | None,
        *,
        effort: Effort | None = None,
        documents: list[dict[str, str]] | None = None,
        template: Template | None = None,
    ) -> Chat:
        """What the template writes: this one, or the model's own."""
        continues = bool(self.continue_final_message)
        return Chat(
            [message.for_template() for message in self.messages],
            tools=tools,
            documents=documents or None,
            variables=effort_variables(effort, self.chat_template_kwargs or {}),
            template=template,
            add_generation_prompt=not continues and self.add_generation_prompt is not False,
            continue_final_message=continues,
        )
