"""Tools and reasoning with the model that runs here: what is asked of it, and how its answers are read."""

import secrets
import string
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from megatron_star.config import FieldError
from megatron_star.server.ask import Generation
from megatron_star.server.grammar_spec import GrammarSpec
from megatron_star.server.tools.answer_parser import AnswerFormats, AnswerParser, PlainParser
from megatron_star.server.tools.forced_calls import forced_calls
from megatron_star.server.tools.offer import Offer

NO_FORMAT = (
    "tools: how this model writes calls is not known: its chat template shows none of the formats that are; "
    "--tool-call-parser names one"
)
_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class AnswerReading:
    """How answers to one request are read.

    Attributes:
        parsers: of each answer.
        id_length: see `CallFormat`.
        with_reasoning: see `Offer`.
    """

    parsers: list[AnswerParser | PlainParser] = field(default_factory=list)
    id_length: int | None = None
    with_reasoning: bool = True

    def new_call_id(self) -> str:
        """Of one call."""
        if self.id_length is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(self.id_length))


class ToolUse:
    """One for a server."""

    def __init__(self, formats: AnswerFormats, tokenizer: PreTrainedTokenizerBase) -> None:
        self.formats = formats
        self._special = {
            str(piece): token for token, piece in tokenizer.added_tokens_decoder.items() if piece.special
        }

    def generation(self, generation: Generation, offer: Offer) -> Generation:
        """With what reading the answers takes, and a grammar where they must be calls.

        Raises:
            FieldError: there are tools, and nobody knows how this model calls them.
        """
        if offer.tools and not self.formats.calls:
            raise FieldError(NO_FORMAT, "tools")
        if offer.must_call:
            generation = replace(generation, grammar=self._forced(offer))
        marks = self.formats.marks(with_calls=bool(offer.tools))
        if not generation.skip_special_tokens or not self._special.keys() & set(marks):
            return generation
        hidden = frozenset(token for piece, token in self._special.items() if piece not in marks)
        return replace(generation, skip_special_tokens=False, hidden_tokens=hidden)

    def _forced(self, offer: Offer) -> GrammarSpec:
        known = self.formats.calls
        special = {mark: self._special[mark] for mark in known.marks if mark in self._special}
        return GrammarSpec(
            "lark", forced_calls(known.shape, offer.tools, offer.most_calls, special), offer.field
        )

    def reading(self, offer: Offer, prompts: list[str], *, is_guided: bool = False) -> AnswerReading:
        """Of answers to these prompts, of which the last few tokens are enough.

        is_guided: they follow a grammar, and so have no reasoning.
        """
        known = None if is_guided else self.formats.reasoning
        return AnswerReading(
            [
                self.formats.parser(
                    offer.tools,
                    most_calls=offer.most_calls,
                    is_reasoning=known is not None and known.is_open_after(prompt),
                )
                for prompt in prompts
            ],
            self.formats.calls.id_length if self.formats.calls else None,
            offer.with_reasoning,
        )
