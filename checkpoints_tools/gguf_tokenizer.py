"""The tokenizer inside a GGUF file, as tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from megatron_star.checked_input import shown

Field = Callable[..., Any]

_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _smollm() -> list[Any]:
    """Digits one by one, then GPT-2's words."""
    return [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _llama3() -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _gpt2() -> list[Any]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False)]


# `tokenizer.ggml.pre` -> how text is divided before the merges.
_PRE_TOKENIZERS = {"smollm": _smollm, "llama-bpe": _llama3, "gpt-2": _gpt2}


def write_tokenizer(field: Field, directory: Path) -> None:
    """Write the tokenizer of a GGUF file.

    Args:
        field: gives the value of a GGUF field by its name, or a default.

    Raises:
        ValueError: the kind of tokenizer is not in the table above.
    """
    tokenizer = _byte_level_bpe(field)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = field("tokenizer.ggml.tokens")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        **_named_tokens(field, tokens),
    }
    if template := field("tokenizer.chat_template"):
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _byte_level_bpe(field: Field) -> Tokenizer:
    model, pre = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.model={model!r} with tokenizer.ggml.pre={pre!r} is not supported; "
            f"gpt2 with {', '.join(_PRE_TOKENIZERS)} is"
        )
    tokens, merges = _texts(field, "tokenizer.ggml.tokens"), _texts(field, "tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ")) for merge in merges]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"tokenizer.ggml.merges has {shown(' '.join(wrong))}, which is not two pieces")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre]())
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, _token_types(field, len(tokens)))
    if field("tokenizer.ggml.add_bos_token", False):
        bos = _token_id(field, "bos", tokens)
        if bos is None:
            raise ValueError(
                "tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id is missing"
            )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _texts(field: Field, name: str) -> list[str]:
    values = field(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name}={shown(values)}: it must be a list of texts")
    return values


def _token_types(field: Field, num_tokens: int) -> list[int]:
    types = field("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != num_tokens:
        raise ValueError(f"tokenizer.ggml.token_type={shown(types)}: it must be a number for each token")
    return types


def _token_id(field: Field, kind: str, tokens: list[str]) -> int | None:
    name = f"tokenizer.ggml.{kind}_token_id"
    token_id = field(name)
    if token_id is not None and (type(token_id) is not int or not 0 <= token_id < len(tokens)):
        raise ValueError(f"{name}={shown(token_id)}: it must be from 0 to {len(tokens) - 1:,}")
    return token_id


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    def of_type(wanted: int) -> list[str]:
        return [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]

    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in of_type(_CONTROL)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in of_type(_USER_DEFINED)])


def _named_tokens(field: Field, tokens: list[str]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _token_id(field, kind, tokens) for name, kind in names.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None}
