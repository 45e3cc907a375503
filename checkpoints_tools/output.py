"""An output directory that appears whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MARGIN = 64_000_000  # bytes for everything that is not a weight
_TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


@contextmanager
def new_directory(output: Path, *, force: bool, num_bytes: int) -> Iterator[Path]:
    """A temporary directory beside `output`, renamed to it at the end, or removed if anything fails.

    Raises:
        ValueError: `output` exists and not `force`, or the disk has no room for `num_bytes`.
    """
    output = output.absolute()
    check_can_write(output, force=force)
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < num_bytes + _MARGIN:
        raise ValueError(f"{output.parent}: {free:,} bytes free, {num_bytes + _MARGIN:,} needed")
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        _replace(output, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_can_write(output: Path, *, force: bool) -> None:
    """Raises ValueError if `output` exists and not `force`."""
    if output.exists() and not force:
        raise ValueError(f"{output} exists; --force replaces it")


def _replace(output: Path, temporary: Path) -> None:
    if not output.exists():
        temporary.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.replaced-", dir=output.parent))
    output.rename(old / output.name)
    temporary.rename(output)
    shutil.rmtree(old)


def copy_tokenizer(source: Path, destination: Path) -> list[Path]:
    """Copy the tokenizer and the configuration files; return the copies."""
    destination.mkdir(exist_ok=True)
    found = {path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}
    return [Path(shutil.copyfile(path, destination / path.name)) for path in sorted(found)]
