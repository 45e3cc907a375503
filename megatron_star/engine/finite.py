"""Logits that are no numbers: of damaged weights, or of activations that the dtype cannot hold."""

from torch import Tensor


def why_not_finite(logits: Tensor, num_generated: int) -> str | None:
    """What is wrong with the logits [vocab_size] of the token after `num_generated` ones, if anything is."""
    finite = logits.isfinite()
    if finite.all():
        return None
    kind = "NaN" if logits.isnan().any() else "infinite"
    return (
        f"the logits of token {num_generated + 1} of the answer are not finite ({kind} for "
        f"{int((~finite).sum())} of {logits.numel()} tokens): the weights are damaged, or the dtype "
        "(--fp16?) cannot hold what the model computes"
    )
