"""How many tokens KV memory is taken for, of a context and of a sequence's tail: integers, known to the
scheduler before anything is allocated."""

TAIL_CHUNK_TOKENS = 256


def tail_capacity(num_tokens: int) -> int:
    """Tokens that a tail of `num_tokens` takes memory for."""
    return -(-num_tokens // TAIL_CHUNK_TOKENS) * TAIL_CHUNK_TOKENS


def recent_tail_capacity(num_kept: int) -> int:
    """Tokens that a layer with a mask of its own takes memory for, when it keeps so many of a tail.

    It has room for about as many again, at most a chunk: so what is kept is moved seldom.
    """
    return tail_capacity(num_kept + min(num_kept, TAIL_CHUNK_TOKENS) + 1)


def spare_capacity(num_tokens: int) -> int:
    """Tokens that a rank takes memory for after the `num_tokens` that it holds of a context."""
    return min(2 * TAIL_CHUNK_TOKENS, num_tokens // 8)
