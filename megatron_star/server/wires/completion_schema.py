"""What a request to /v1/completions may contain."""

from typing import Literal

from pydantic import Field

from megatron_star.server.body import TokenCount
from megatron_star.server.wires.generation_fields import GenerationFields
from megatron_star.server.wires.prompt_fields import PromptRequest


class CompletionRequest(GenerationFields, PromptRequest):
    """POST /v1/completions."""

    max_tokens: TokenCount | None = Field(None, description="0 only looks at the prompt")
    suffix: Literal[""] | None = None

    @property
    def has_context(self) -> bool:
        """A context stands before the prompt, of which it is no part."""
        return bool(self.contexts or self.context_id)

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See `GenerationFields`; with `echo`, those of the prompt are as many as of the answer."""
        return self.num_echoed_logprobs if self.prompt_logprobs is None else self.prompt_logprobs
