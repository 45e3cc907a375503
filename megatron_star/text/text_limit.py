"""Texts that are too long for the model are refused before much of them is tokenized."""

from megatron_star.text.text_stream import Tokenizer

USUAL_TOKEN_CHARACTERS = 8
"""No prose has so many in a token: a longer text may still fit, but is looked at piece by piece first."""
PIECE_CHARACTERS = 1 << 16
TOKENS_AT_A_CUT = 8
"""That a piece may have more than its share of the whole, since it is cut out anywhere."""


class TextLimit:
    """Refuses texts with more tokens than any request may have. It never refuses one that fits."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer, self.max_tokens = tokenizer, max_tokens
        self._longest_token = max(len(piece) for piece in tokenizer.get_vocab())
        self._piece = min(PIECE_CHARACTERS, max(64 * TOKENS_AT_A_CUT, max_tokens))

    def check(self, text: str) -> None:
        """Raises ValueError if the text is too long; tokenizes at most `max_tokens` tokens of it, or so."""
        if len(text) > self.max_tokens * USUAL_TOKEN_CHARACTERS and self._is_too_long(text):
            raise ValueError(
                f"a text of {len(text)} characters has more tokens than the model's limit, {self.max_tokens}"
            )

    def _is_too_long(self, text: str) -> bool:
        if len(text) > self.max_tokens * self._longest_token:
            return True
        num_tokens = 0
        for start in range(0, len(text), self._piece):
            piece = self._tokenizer.encode(text[start : start + self._piece], add_special_tokens=False)
            num_tokens += max(0, len(piece) - TOKENS_AT_A_CUT)
            if num_tokens > self.max_tokens:
                return True
        return False
