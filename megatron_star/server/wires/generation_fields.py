"""How answers are made: fields of both OpenAI routes."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from megatron_star.config import MOST_TOKENS_IN_REQUEST, FieldError
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
from megatron_star.server.wires.rule_fields import RuleFields
from megatron_star.server.wires.structured_fields import StructuredFields
from megatron_star.server.wires.tenant_fields import TenantFields


def _not_zero(number: int) -> int:
    if number == 0:
        raise ValueError("a prompt of no tokens has no answer")
    return number


class StreamOptions(Body):
    """`include_usage` adds a chunk with the usage at the end; `continuous_usage_stats`, counts to each."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class NeutralSamplingFields(BaseModel):
    """Fields that change how tokens are chosen, where they change nothing."""

    length_penalty: only(1) = None
    typical_p: only(1) = None
    logits_processors: only([]) = None
    use_beam_search: only(False) = None
    early_stopping: only(False) = None
    spaces_between_special_tokens: only(True, False) = None
    add_special_tokens: only(False) = None


class GenerationFields(
    RuleFields,
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
    truncate_prompt_tokens: (
        Annotated[int, Field(ge=-1, le=MOST_TOKENS_IN_REQUEST), AfterValidator(_not_zero)] | None
    ) = Field(
        None, description="only the last so many tokens of the prompt; -1: those that there is room for"
    )
    return_token_ids: bool | None = Field(None, description="of the prompt and of the answer")
    return_tokens_as_token_ids: bool | None = Field(None, description="in log-probabilities")

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
            rules=self.rules(),
            bad_words=tuple(self.bad_words or ()),
            include_stop_text=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
            num_top_logprobs=num_top_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
        )
