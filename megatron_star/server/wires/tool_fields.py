"""Fields about tools that an answer may call, and about its reasoning."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from megatron_star.server.body import Body, Text
from megatron_star.server.tools.offer import Offer
from megatron_star.server.tools.reader import LONGEST_NAME
from megatron_star.server.wires.known_fields import only

MOST_TOOLS = 128
MOST_SCHEMA_BYTES = 1 << 16
DEEPEST_SCHEMA = 32
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=LONGEST_NAME)]


def _check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError if it is too large or too deep, has half characters, or is not about objects."""
    _check_depth(schema)
    size = len(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
    if size > MOST_SCHEMA_BYTES:
        raise ValueError(f"it has {size} bytes as JSON; the limit is {MOST_SCHEMA_BYTES}")
    if schema.get("type", "object") != "object":
        raise ValueError("its type must be 'object'")
    return schema


def _check_depth(schema: Any) -> None:
    """Level by level: what is too deep for us is too deep for whatever else walks through it."""
    level: list[Any] = [schema]
    for _ in range(DEEPEST_SCHEMA):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        if not (level := [inner for part in parts for inner in part if isinstance(inner, dict | list)]):
            return
    raise ValueError(f"it is more than {DEEPEST_SCHEMA} levels deep")


class FunctionOfTool(Body):
    """What may be called; `parameters` is the JSON schema of an object."""

    name: Name
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_schema)] | None = None
    strict: bool | None = Field(None, description="no effect unless a call is asked for, which always is")


class Tool(Body):
    """Only functions are known."""

    type: Literal["function"]
    function: FunctionOfTool


class FunctionName(Body):
    """Of a tool."""

    name: Name


class NamedTool(Body):
    """One of the tools."""

    type: Literal["function"]
    function: FunctionName


class NamedChoice(NamedTool):
    """This tool must be called, once."""

    one_call: ClassVar[bool] = True

    def names(self) -> list[str]:
        """Of the tools that may be called."""
        return [self.function.name]

    @property
    def must_call(self) -> bool:
        """The answer must be a call."""
        return True


class AllowedTools(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS)]


class AllowedChoice(Body):
    """Which tools may be called, and whether one must be."""

    one_call: ClassVar[bool] = False
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    def names(self) -> list[str]:
        """Of the tools that may be called."""
        return [tool.function.name for tool in self.allowed_tools.tools]

    @property
    def must_call(self) -> bool:
        """The answer must be a call."""
        return self.allowed_tools.mode == "required"


class ToolFields(BaseModel):
    """On the chat route."""

    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None = Field(
        None, description="`required` or a tool's name: the answer is a call that its schema allows"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    include_reasoning: bool | None = Field(None, description="false: the answer is told without it")
    functions: only([]) = None
    function_call: only("none", "auto") = None

    @model_validator(mode="after")
    def _tools_are_known(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two of them have the same name")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: there are no tools")
        if unknown := [name for name in self._chosen() or () if name not in names]:
            raise ValueError(f"tool_choice: there is no tool {unknown[0]!r}")
        return self

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """As chat templates know them, those that may be called; None where there is none."""
        return [tool.model_dump(exclude_none=True) for tool in self._callable()] or None

    def offer(self) -> Offer:
        """What answers may call, and must."""
        choice, one = self.tool_choice, self.parallel_tool_calls is False
        must_call = choice == "required"
        if not isinstance(choice, str | None):
            must_call, one = choice.must_call, one or choice.one_call
        functions = [tool.function for tool in self._callable()]
        return Offer(
            tools={function.name: function.parameters or {} for function in functions},
            most_calls=1 if one else None,
            must_call=must_call,
            with_reasoning=self.include_reasoning is not False,
        )

    def _callable(self) -> list[Tool]:
        chosen = self._chosen()
        tools = [] if self.tool_choice == "none" else self.tools or []
        return [tool for tool in tools if chosen is None or tool.function.name in chosen]

    def _chosen(self) -> list[str] | None:
        """Names of the tools that may be called; None is all."""
        return None if isinstance(self.tool_choice, str | None) else self.tool_choice.names()
