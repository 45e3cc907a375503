"""Fields that clients send and that have nothing to do here: accepted where they ask for nothing.

They are those of OpenAI's routes, and what vLLM and other servers added. A value that would change the answer
is refused by name; a field that is in no class of this package is not known.
"""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema


def only(*values: Any) -> Any:
    """The type of a field that may be null or one of these values."""
    shown = " or ".join(["null", *map(json.dumps, values)])

    def check(value: Any) -> Any:
        same = (value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)
        if value is not None and not any(same):
            raise ValueError(f"only {shown} is supported here")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [None, *values]})]


Label = Annotated[str, Field(max_length=512)]
"""A text that is for logs and caches elsewhere, and has no effect."""


class NeutralFields(BaseModel):
    """On both OpenAI routes."""

    service_tier: only("auto", "default") = None
    store: only(False) = None
    kv_transfer_params: only() = None
    user: Label | None = Field(None, description="no effect")
    safety_identifier: Label | None = Field(None, description="no effect")
    prompt_cache_key: Label | None = Field(None, description="no effect")
    prompt_cache_retention: Label | None = Field(None, description="no effect")
    metadata: Annotated[dict[str, Label], Field(max_length=16)] | None = Field(None, description="no effect")


class NeutralChatFields(NeutralFields):
    """On the chat route."""

    audio: only() = None
    modalities: only(["text"]) = None
    prediction: only() = None
    moderation: only() = None
    prompt_cache_options: only() = None
    verbosity: only("medium") = None
    web_search_options: only() = None
    echo: only(False) = None
    mm_processor_kwargs: only({}) = None


class NeutralMessageFields(BaseModel):
    """Of a message: what an answer carries, so that it can be sent back as it is."""

    refusal: only() = None
    annotations: only([]) = None
    audio: only() = None
    parsed: Any = Field(None, description="no effect: a client's reading of the content")
