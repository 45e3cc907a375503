"""How many tokens KV memory is taken for, of a context and of a sequence's tail: integers, known to the
scheduler before anything is allocated."""

TAIL_CHUNK_TOKENS = 256


def tail_capacity(num_tokens: int) -> int:
    """Tokens that a tail of `num_tokens` takes memory for."""
    return -(-num_tokens // TAIL_CHUNK_TOKENS) * TAIL_CHUNK_TOKENS


def spare_capacity(num_tokens: int) -> int:
    """Tokens that a rank takes memory for after the `num_tokens` that it holds of a context."""
    return min(2 * TAIL_CHUNK_TOKENS, num_tokens // 8)
