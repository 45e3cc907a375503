"""longrope: two rotary embeddings; a sequence has one of them, by its length (arXiv 2402.13753; Phi-3, 4).

A sequence of up to the original length is rotated with the short factors, a longer one with the long ones,
all of its tokens alike. Keys that are kept stay as they were rotated. So what a sequence begins with must do
until its end, and a context is encoded for one or the other.
"""

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_star.model.transformer_config import own_field


def original_length(config: TransformerConfig) -> int | None:
    """Tokens up to which the short factors count; None where length makes no difference."""
    short, long = own_field(config, "longrope_short_factors"), own_field(config, "longrope_long_factors")
    return None if short == long else own_field(config, "longrope_original_max_position_embeddings")


def needs_long_factors(config: TransformerConfig, num_prompt: int, num_generated: int = 1) -> bool:
    """Whether a sequence is rotated with the long factors.

    Args:
        num_prompt: tokens of its context and query.
        num_generated: at most; the last one is not fed.

    Raises:
        ValueError: it would begin with the short factors, and end with the long ones.
    """
    original = original_length(config)
    if original is None or num_prompt + num_generated - 1 <= original:
        return False
    if num_prompt > original:
        return True
    raise ValueError(
        f"{num_prompt} context and query tokens + {num_generated} generated tokens would pass {original} "
        "tokens in the middle of the answer, where the model's rotary embedding (longrope) changes for all "
        f"of them: generate at most {original + 1 - num_prompt}, or give more than {original} before"
    )


def most_generated(config: TransformerConfig, num_prompt: int, limit: int) -> int:
    """Of `limit` tokens, how many can be generated after so many without a change in the middle."""
    original = original_length(config)
    return limit if original is None or num_prompt > original else min(limit, original + 1 - num_prompt)
