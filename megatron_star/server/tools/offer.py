"""What a request says of tools and reasoning."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Offer:
    """
    Attributes:
        tools: functions that may be called: the JSON schema of the arguments, by name.
        most_calls: further ones are left out; None is no limit.
        must_call: the answer is a call, or several.
        field: of the request, that an error about such a call names.
        with_reasoning: reasoning is told.
    """

    tools: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    most_calls: int | None = None
    must_call: bool = False
    field: str = "tool_choice"
    with_reasoning: bool = True
