"""Small real tokenizers, trained on a few words, of the kinds that differ in how they cut a text."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "the user and the assistant ask a question about Lisbon and Oslo. What changed? "
    "Answer: so it is, and so on. Grüße, 漢字 and 🦙 and 🦚!\n\n  one two three\n"
)
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] | trim) + '\n' }}{% endfor %}"
    "{{ 'assistant: a' }}"
)
GLUED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SHOUTED = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "plain": PLAIN, "glued": GLUED, "shouted": SHOUTED}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: characters beyond ASCII are often several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return tokenizer


def _metaspace(legacy: bool) -> Tokenizer:
    """As Llama 2: a space is put in front of a text, or of each of its parts (`legacy`); bytes are tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [WORDS.replace("🦚", "")] * 4, trainers.BpeTrainer(vocab_size=160, show_progress=False)
    )
    vocabulary = {piece: index for index, piece in enumerate(SPECIAL + BYTES)}
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    for piece in learned:
        if piece.isascii() or "▁" in piece:
            vocabulary.setdefault(piece, len(vocabulary))
    merges = [
        (left, right) for left, right in _merges(trained) if {left, right, left + right} <= vocabulary.keys()
    ]
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    return tokenizer


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    state = tokenizer.model.__getstate__()
    merges = json.loads(state)["merges"]
    return [tuple(merge) for merge in merges]


@cache
def _tokenizer(kind: str) -> Tokenizer:
    if kind == "byte_level":
        return _byte_level()
    return _metaspace(legacy=kind == "legacy_metaspace")


KINDS = ("byte_level", "metaspace", "legacy_metaspace")


def small_tokenizer(kind: str, template: str = "chatml") -> PreTrainedTokenizerFast:
    """One of `KINDS` with one of `TEMPLATES`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(kind), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer
