"""What a request to /v1/completions may contain."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_star.server.body import TokenCount
from megatron_star.server.wires.generation_fields import GenerationFields
from megatron_star.server.wires.prompt_fields import PromptRequest


class CompletionRequest(GenerationFields, PromptRequest):
    """POST /v1/completions."""

    max_tokens: TokenCount | None = Field(None, description="0 only looks at the prompt")
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _stream_cannot_be_chosen_from(self) -> Self:
        if self.stream and self.num_best is not None:
            raise ValueError("best_of: the best is known at the end only, so it cannot be streamed")
        if self.echo and self.truncate_prompt_tokens is not None:
            raise ValueError("truncate_prompt_tokens: with echo=true the whole prompt is given back")
        return self

    @property
    def num_best(self) -> int | None:
        """Answers that are given, if more are made."""
        return None if self.best_of in (None, self.n or 1) else self.n or 1

    @property
    def has_context(self) -> bool:
        """A context stands before the prompt, of which it is no part."""
        return bool(self.contexts or self.context_id)

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See `GenerationFields`; with `echo`, those of the prompt are as many as of the answer."""
        return self.num_echoed_logprobs if self.prompt_logprobs is None else self.prompt_logprobs
