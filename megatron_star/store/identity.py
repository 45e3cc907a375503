"""What must be equal for an encoded context to be used again: its name in a store is a hash of all of it.

Of a text, only token ids count: another tokenizer gives other ids, or the same context. The number of
context-parallel ranks, waves and owners are not in it: they change no result but, in 8 bits, the rounding.
"""

import hashlib
import json
from collections.abc import Mapping

from megatron_star.planning.mask import Mask
from megatron_star.store.manifest import FORMAT

NAME_DIGITS = 40

Identity = dict[str, str | int]


def context_identity(
    facts: Mapping[str, str | int], tokens: bytes, mask: Mask, start: int, num_tokens: int
) -> Identity:
    """Of a context's tokens [start, num_tokens); those before belong to the context that it extends.

    Args:
        facts: of the job: the model's weights and arguments, dtypes, tensor-parallel size, and the code.
        tokens: a hash of all token ids and of how they are rotated.
        mask: what they see.
    """
    return {
        **facts,
        "format": FORMAT,
        "tokens": tokens.hex(),
        "mask": hashlib.sha256(repr(mask).encode()).hexdigest(),
        "start": start,
        "num_tokens": num_tokens,
    }


def entry_name(identity: Identity) -> str:
    """Of the folder of a context of this identity."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]
