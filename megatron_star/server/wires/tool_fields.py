"""Fields about tools that an answer may call."""

from typing import Any

from pydantic import BaseModel

from megatron_star.server.wires.known_fields import only


class ToolFields(BaseModel):
    """On the chat route."""

    tools: only([]) = None
    tool_choice: only("none", "auto") = None
    parallel_tool_calls: only(True, False) = None
    functions: only([]) = None
    function_call: only("none", "auto") = None

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """As chat templates know them."""
        return None
