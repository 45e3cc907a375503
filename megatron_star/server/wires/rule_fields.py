"""Which tokens are chosen, beyond temperature and filters: vLLM's and OpenAI's fields, on all completions."""

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

from megatron_star.config import FieldError
from megatron_star.engine.token_rules import LARGEST_BIAS, MOST_REPETITION, TokenRules
from megatron_star.server.body import Share, Text, TokenId

MOST_BIASES = 1024
MOST_BAD_WORDS = 256
MOST_ALLOWED_TOKENS = 1 << 18
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Bias = Annotated[float, Field(ge=-LARGEST_BIAS, le=LARGEST_BIAS)]
WrittenTokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
BadWord = Annotated[Text, Field(min_length=1, max_length=128, pattern=r"\S")]


class RuleFields(BaseModel):
    """See `TokenRules`."""

    min_p: Share | None = Field(None, description="least share of the likeliest token's probability")
    repetition_penalty: Annotated[float, Field(ge=1 / MOST_REPETITION, le=MOST_REPETITION)] | None = Field(
        None, description="of tokens that the prompt or the answer has; 1 is off"
    )
    presence_penalty: Penalty | None = Field(None, description="of tokens that the answer has")
    frequency_penalty: Penalty | None = Field(None, description="as many times as the answer has a token")
    logit_bias: Annotated[dict[WrittenTokenId, Bias], Field(max_length=MOST_BIASES)] | None = Field(
        None, description="token ids, and what is added to their logits"
    )
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MOST_ALLOWED_TOKENS)] | None
    ) = Field(None, description="no other tokens are chosen")
    bad_words: Annotated[list[BadWord], Field(max_length=MOST_BAD_WORDS)] | None = Field(
        None, description="texts that the answer does not have"
    )
    include_stop_str_in_output: bool | None = Field(None, description="the text has what ended it, too")
    skip_special_tokens: bool | None = Field(None, description="the text does not have them; true unless set")

    def rules(self) -> TokenRules:
        """All but `bad_words`, which are texts."""
        allowed = self.allowed_token_ids
        return TokenRules(
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple(biases_of(self.logit_bias or {}).items()),
            allowed_tokens=None if allowed is None else tuple(allowed),
        )


def biases_of(written: dict[str, float]) -> dict[int, float]:
    """With ids as numbers. Raises FieldError where one is written in two ways."""
    biases = {int(token): bias for token, bias in written.items()}
    if len(biases) < len(written):
        raise FieldError("logit_bias: a token id is there twice", "logit_bias")
    return biases
