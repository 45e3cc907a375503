"""Fields of completions, on OpenAI's and on Megatron's wire."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from megatron_star.config import MOST_TOKENS_IN_REQUEST
from megatron_star.engine.request import MOST_TOP_LOGPROBS
from megatron_star.server.body import (
    LARGEST_SEED,
    MOST_PROMPTS,
    Body,
    Prompts,
    Share,
    StopTexts,
    Text,
    TokenId,
    TopK,
)
from megatron_star.server.star_options import StarOptions


class PromptRequest(Body):
    """What both servers' completions have in common."""

    prompt: (
        Text
        | Prompts
        | Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS_IN_REQUEST)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(max_length=MOST_PROMPTS)]
    )
    contexts: Prompts | None = Field(None, description="one for all prompts, or one for each")
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = Field(
        None, description="so many answers are made, and the n likeliest given"
    )
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: StopTexts | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = Field(
        None, description="of the chosen tokens, and of so many of the likeliest ones in the place of each"
    )
    echo: bool | None = None
    star: StarOptions | None = None

    @model_validator(mode="after")
    def _one_context_or_one_each(self) -> Self:
        count = len(self.prompts())
        if count == 0:
            raise ValueError("prompt: it is empty")
        if self.contexts and len(self.contexts) not in (1, count):
            raise ValueError(f"contexts: {len(self.contexts)} given for {count} prompts: give 1 or {count}")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of: it is {self.best_of}, less than n, which is {self.n}")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompt, as a list of prompts."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return self.prompt

    @property
    def num_echoed_logprobs(self) -> int | None:
        """Of the prompt, too, where it is repeated: see `Generation.prompt_logprobs`."""
        return self.logprobs if self.echo else None
