"""How keys and values lie in memory, so that the kernels of their device read them fast."""

from torch import Tensor


def empty_kv(num_tokens: int, like: Tensor) -> Tensor:
    """Uninitialised [num_tokens, b, ng, hn] for `like`, [.., b, ng, hn], of its dtype and device.

    In a CPU's memory a head's tokens lie side by side: one new token attends to them twice as fast.
    """
    b, ng, hn = like.shape[1:]
    if like.device.type == "cpu":
        return like.new_empty(b, ng, num_tokens, hn).permute(2, 0, 1, 3)
    return like.new_empty(num_tokens, b, ng, hn)
