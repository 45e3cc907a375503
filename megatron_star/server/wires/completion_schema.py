"""What a request to /v1/completions may contain."""

from typing import Literal

from megatron_star.server.body import PositiveTokens
from megatron_star.server.wires.generation_fields import GenerationFields
from megatron_star.server.wires.prompt_fields import PromptRequest


class CompletionRequest(GenerationFields, PromptRequest):
    """POST /v1/completions."""

    max_tokens: PositiveTokens | None = None
    suffix: Literal[""] | None = None
