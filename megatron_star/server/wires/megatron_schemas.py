"""What requests to Megatron's routes may contain."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_star.server.body import (
    LARGEST_SEED,
    Body,
    PositiveTokens,
    Prompts,
    Share,
    TokenId,
    TopK,
    Zero,
)
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.context_fields import ContextFields
from megatron_star.server.wires.generation_fields import NeutralSamplingFields
from megatron_star.server.wires.known_fields import NeutralFields, only
from megatron_star.server.wires.prompt_fields import PromptRequest
from megatron_star.server.wires.rule_fields import RuleFields


class MegatronGenerateRequest(ContextFields, Body):
    """PUT /api: the fields of Megatron's server; `contexts` and `star` are ours."""

    prompts: Prompts
    contexts: Prompts | None = Field(None, description="one for all prompts, or one for each")
    tokens_to_generate: PositiveTokens | None = Field(None, description="64, or what is left for them")
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_k: TopK = 0
    top_p: Share = 0.0
    top_p_decay: Zero = 0.0
    top_p_bound: Zero = 0.0
    logprobs: bool = False
    add_BOS: bool = False
    random_seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    stop_token: TokenId | None = None
    stop_on_eol: bool = False
    stop_on_double_eol: bool = False
    prevent_newline_after_colon: Literal[False] = False
    beam_width: only() = None
    no_log: only(True, False) = Field(None, description="no text is logged in any case")
    length_penalty: Annotated[float, Field(ge=1.0, le=1.0)] = 1.0
    star: StarOptions = Field(default_factory=StarOptions)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            key: value for key, value in values.items() if value is not None or key not in cls.model_fields
        }

    @model_validator(mode="after")
    def _one_context_or_one_each(self) -> Self:
        count = len(self.prompts)
        if self.contexts and len(self.contexts) not in (1, count):
            raise ValueError(f"contexts: {len(self.contexts)} given for {count} prompts: give 1 or {count}")
        return self


class MegatronCompletionRequest(
    RuleFields, NeutralSamplingFields, ContextFields, NeutralFields, PromptRequest
):
    """POST /completions: as Megatron's server reads it."""

    max_tokens: PositiveTokens
    stream: only(False) = None
    model: str | None = Field(None, description="ignored, as by Megatron's server")
    truncate_prompt_tokens: only() = None
    return_token_ids: only(False) = None
    return_tokens_as_token_ids: only(False) = None
