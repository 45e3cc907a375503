"""The tokens that end an answer, as a checkpoint declares them in up to three places."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_star.checked_input import read_json_object

FILES = ("generation_config.json", "config.json")
KEY = "eos_token_id"


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's own end token, and those of the configuration files that it was loaded beside.

    Chat models often have several, of which the tokenizer knows one.

    Raises:
        ValueError, OSError: such a file cannot be read, or declares something else than token ids.
    """
    own = tokenizer.eos_token_id
    found = set() if own is None else {own}
    folder = getattr(tokenizer, "name_or_path", "")
    for path in (Path(folder) / name for name in FILES if folder):
        if path.is_file():
            found |= _declared(path)
    return tuple(sorted(found))


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stops: Iterable[str]) -> tuple[int, ...]:
    """Those stop texts that are special tokens: no answer's text has them, so it ends at the token."""
    if not (stops := list(stops)):
        return ()
    special = {str(piece): token for token, piece in tokenizer.added_tokens_decoder.items() if piece.special}
    return tuple(special[stop] for stop in stops if stop in special)


def _declared(path: Path) -> set[int]:
    config = read_json_object(path)
    text_config = config.get("text_config")
    values = [config.get(KEY), text_config.get(KEY) if isinstance(text_config, dict) else None]
    return {token for value in values for token in _token_ids(value, path)}


def _token_ids(value: Any, path: Path) -> list[int]:
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(f"{path}: {KEY} is {value!r}: it must be a token id or a list of them")
    return [token for token in tokens if token >= 0]  # some files say -1 for none
