"""Token ids in answers, for clients that ask: vLLM's `return_token_ids` and `return_tokens_as_token_ids`."""

from collections.abc import Sequence
from typing import Any

from megatron_star.engine.answer import NewToken
from megatron_star.engine.request import StarResult
from megatron_star.server.batch import Batch
from megatron_star.server.service import CompletionService
from megatron_star.text.token_bytes import TokenBytes


class _TokensById:
    """As `TokenBytes`, but tokens are written as their ids: no two look the same."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self.of = token_bytes.of

    def piece(self, token: int) -> str:
        return f"token_id:{token}"

    def pieces(self, tokens: Sequence[int], *, at_start: bool = False) -> list[str]:
        return [self.piece(token) for token in tokens]


TokenNames = TokenBytes | _TokensById


def token_bytes(service: CompletionService, as_ids: bool | None) -> TokenNames:
    """What log-probabilities write tokens with."""
    return _TokensById(service.token_bytes) if as_ids else service.token_bytes


class TokenIds:
    """Adds to an answer's choices the ids of their tokens, and those of the prompts.

    Those of prompts stand in each choice where there may be several prompts, else beside the choices.
    """

    def __init__(self, batch: Batch, *, in_choices: bool) -> None:
        """in_choices: prompts' ids stand there."""
        self._batch, self._in_choices = batch, in_choices
        self._new: list[list[int]] = [[] for _ in batch.answers]
        self._has_prompt = [False] * len(batch.answers)

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """A body with all of them."""
        shown, of_prompts = self._batch.shown(), self._of_prompts()
        for index, (choice, answer) in enumerate(zip(body["choices"], shown, strict=True)):
            if self._in_choices:
                choice["prompt_token_ids"] = of_prompts[index // self._batch.num_shown]
            choice["token_ids"] = answer.tokens
        return body if self._in_choices else body | {"prompt_token_ids": of_prompts[0]}

    def note(self, index: int, part: NewToken | StarResult) -> None:
        """A token that the next chunk of this answer has, whatever its text."""
        if isinstance(part, NewToken):
            self._new[index].append(part.token)

    def chunk(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chunk of one choice, with the ids that came since its last one; the first has the prompt's."""
        (choice,) = body["choices"]
        index = choice["index"]
        choice = choice | {"token_ids": self._new[index]}
        self._new[index] = []
        if self._in_choices and not self._has_prompt[index]:
            choice["prompt_token_ids"] = self._of_prompts()[index // self._batch.num_choices]
        elif not self._in_choices and not any(self._has_prompt):
            body = body | {"prompt_token_ids": self._of_prompts()[0]}
        self._has_prompt[index] = True
        return body | {"choices": [choice]}

    def _of_prompts(self) -> list[list[int]]:
        return [split.context_tokens + split.query_tokens for split in self._batch.splits]
