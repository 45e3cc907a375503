"""The tokenizer of a checkpoint."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in this folder; no code of it is run, nothing is fetched, and nobody is asked.

    Raises:
        ValueError: there is none, or its files are damaged.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; convert the checkpoint again")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise anything on a damaged file
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{directory}: no usable tokenizer: {type(error).__name__}: {reason}") from error
