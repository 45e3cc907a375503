"""The tokenizer in a directory: loaded without running code from there, without asking, without a network."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

_LFS_POINTER = b"version https://git-lfs"
_LONGEST_ERROR = 300  # characters of what transformers says


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory.

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; convert the checkpoint again")
    for path in sorted(directory.glob("*")):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(_LFS_POINTER):
            raise ValueError(f"{path}: a pointer of Git LFS, not the file; get it with `git lfs pull`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        usable = tokenizer is not None and bool(tokenizer.encode("text"))
    except Exception as error:  # whatever transformers and tokenizers make of the files is about the files
        said = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_ERROR]
        raise ValueError(f"{directory}: its tokenizer cannot be loaded ({said})") from error
    if not usable:
        raise ValueError(f"{directory}: its tokenizer makes no tokens of a text")
    return tokenizer
