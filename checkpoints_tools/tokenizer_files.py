"""The tokenizer and configuration files that travel with a checkpoint."""

import shutil
import sys
from pathlib import Path

from megatron_star.model.checkpoint import TOKENIZER_DIRECTORY
from megatron_star.text.tokenizer import load_tokenizer

_CONFIGURATION = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
# Tokenizers of a kind that is not copied, since nothing here can load it.
_OF_OTHER_KINDS = ("tekken.json", "tokenization_*.py", "*.model", "*.spm")


def copy_tokenizer(source: Path, destination: Path) -> list[Path]:
    """Copy the tokenizer and the configuration files; return the copies."""
    destination.mkdir(exist_ok=True)
    patterns = (*_CONFIGURATION, *_TOKENIZER_FILES)
    found = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    return [Path(shutil.copyfile(path, destination / path.name)) for path in sorted(found)]


def check_tokenizer(source: Path, copies: Path, *, wanted: bool) -> None:
    """The copied tokenizer can be loaded; where the source has none at all, or none is wanted, say so.

    Raises:
        ValueError: it cannot be loaded, and is wanted.
    """
    if wanted and _has_any(copies, _TOKENIZER_FILES):
        try:
            load_tokenizer(copies)
        except ValueError as error:
            said = str(error).replace(str(copies), str(source))
            raise ValueError(f"{said}; --no-tokenizer converts without it") from error
    elif wanted and (other := _has_any(source, _OF_OTHER_KINDS)):
        raise ValueError(f"{other}: not a tokenizer that can be loaded; --no-tokenizer converts without it")
    else:
        print(
            f"note: without a tokenizer: generate and the server need one in {TOKENIZER_DIRECTORY}/",
            file=sys.stderr,
        )


def _has_any(directory: Path, patterns: tuple[str, ...]) -> Path | None:
    return next((path for pattern in patterns for path in sorted(directory.glob(pattern))), None)
