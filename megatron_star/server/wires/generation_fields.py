"""How answers are made: fields of both OpenAI routes."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from megatron_star.config import FieldError
from megatron_star.engine.request import MOST_TOP_LOGPROBS
from megatron_star.server.ask import Generation, filters, stop_texts
from megatron_star.server.body import (
    LARGEST_SEED,
    Body,
    Share,
    StopTexts,
    TokenCount,
    TokenId,
    TopK,
)
from megatron_star.server.wires.context_fields import ContextFields
from megatron_star.server.wires.known_fields import NeutralFields, only
from megatron_star.server.wires.request_id_field import RequestIdField
from megatron_star.server.wires.structured_fields import StructuredFields
from megatron_star.server.wires.tenant_fields import TenantFields


class StreamOptions(Body):
    """`include_usage` adds a chunk with the usage at the end; `continuous_usage_stats`, counts to each."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class NeutralSamplingFields(BaseModel):
    """Fields that change how tokens are chosen, where they change nothing."""

    presence_penalty: only(0) = None
    frequency_penalty: only(0) = None
    repetition_penalty: only(1) = None
    length_penalty: only(1) = None
    min_p: only(0) = None
    typical_p: only(1) = None
    logit_bias: only({}) = None
    logits_processors: only([]) = None
    allowed_token_ids: only() = None
    bad_words: only([]) = None
    use_beam_search: only(False) = None
    early_stopping: only(False) = None
    include_stop_str_in_output: only(False) = None
    skip_special_tokens: only(True) = None
    spaces_between_special_tokens: only(True, False) = None
    add_special_tokens: only(False) = None
    truncate_prompt_tokens: only() = None
    return_token_ids: only(False) = None
    return_tokens_as_token_ids: only(False) = None


class GenerationFields(
    NeutralSamplingFields,
    StructuredFields,
    TenantFields,
    ContextFields,
    RequestIdField,
    NeutralFields,
    Body,
):
    """How tokens are chosen, on both OpenAI routes."""

    model: Annotated[str, Field(max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="go on after an end token")
    min_tokens: TokenCount | None = Field(None, description="no end token and no stop text before so many")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = Field(
        None, description="further end tokens"
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = Field(
        None, description="of the prompt's tokens, and of so many of the likeliest ones in the place of each"
    )
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: StopTexts | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: it needs stream=true")
        return self

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See `Generation.prompt_logprobs`."""
        return self.prompt_logprobs

    def generation(self, num_tokens: int | None, *, default: int, num_top_logprobs: int = 0) -> Generation:
        """How an answer is made, of at most so many tokens. Raises FieldError.

        Args:
            num_tokens: that were asked for; None leaves it to `default`, and to the room that there is.
        """
        if self.stream and self.num_prompt_logprobs is not None:
            raise FieldError("stream: log-probabilities of a prompt come with whole answers only", "stream")
        return Generation(
            num_tokens=default if num_tokens is None else num_tokens,
            cut_to_room=num_tokens is None,
            min_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            filters=filters(self.top_k, self.top_p, zero_is_off=False),
            stop=stop_texts(self.stop),
            end_tokens=() if self.ignore_eos else None,
            more_end_tokens=tuple(self.stop_token_ids or ()),
            seed=self.seed,
            grammar=self.grammar(),
            num_top_logprobs=num_top_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
        )
