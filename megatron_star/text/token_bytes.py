"""What a single token is in bytes, also where it is a part of a character."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_star.text.text_stream import UNFINISHED


class TokenBytes:
    """The bytes of each token of a tokenizer, in the middle of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {token: str(piece) for token, piece in tokenizer.added_tokens_decoder.items()}
        self._read = _reader(set(_decoders(tokenizer)))

    def of(self, token: int) -> bytes | None:
        """None if it is not known: a part of a character, of a tokenizer that does not say which."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is not None and self._read:
            return self._read(piece)
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        return None if UNFINISHED in text else text.encode()

    def of_all(self, num_tokens: int) -> list[bytes | None]:
        """Of the first so many ids; no bytes where an id has no token."""
        return [self.of(token) for token in range(num_tokens)]

    def piece(self, token: int) -> str:
        """Its text; U+FFFD for bytes that are no whole character."""
        value = self.of(token)
        return UNFINISHED if value is None else value.decode(errors="replace")

    def pieces(self, tokens: Sequence[int], *, at_start: bool = False) -> list[str]:
        """The text of each token; `at_start`, without the space that a tokenizer puts before a text."""
        pieces = [self.piece(token) for token in tokens]
        if at_start and pieces and UNFINISHED not in pieces[0]:
            pieces[0] = self._tokenizer.decode(tokens[:1], skip_special_tokens=False)
        return pieces


def _decoders(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The types of the steps by which tokens become a text."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    steps: list[Any] = [json.loads(decoder.__getstate__())] if decoder else []
    while steps:
        step = steps.pop()
        yield step["type"]
        steps += step.get("decoders", [])


def _reader(decoders: set[str]) -> Callable[[str], bytes] | None:
    if "ByteLevel" in decoders:
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return lambda piece: (
            bytes(map(byte_of.__getitem__, piece)) if byte_of.keys() >= set(piece) else piece.encode()
        )
    if "ByteFallback" in decoders:
        return _bytes_of_fallback
    return None


def _bytes_of_fallback(piece: str) -> bytes:
    """`<0x0A>` is a byte, and U+2581 a space, as SentencePiece writes them."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("\u2581", " ").encode()
