"""How keys and values lie in memory, so that the kernels of their device read them fast; and as one message.

Keys and values may have different head sizes: of latent attention, values have none (`latent_kernel.py`).
"""

import math

from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


def empty_kv(num_tokens: int, like: Tensor) -> Tensor:
    """Uninitialised [num_tokens, b, ng, hn] for `like`, [.., b, ng, hn], of its dtype and device.

    In a CPU's memory a head's tokens lie side by side: one new token attends to them twice as fast.
    """
    b, ng, hn = like.shape[1:]
    if like.device.type == "cpu":
        return like.new_empty(b, ng, num_tokens, hn).permute(2, 0, 1, 3)
    return like.new_empty(num_tokens, b, ng, hn)


def empty_message(num_tokens: int, like: KeyValue) -> tuple[Tensor, KeyValue]:
    """Uninitialised memory in one piece for so many tokens, [n], and the key and the value in it.

    like: [.., b, ng, hn] each.
    """
    shapes = [(num_tokens, *each.shape[1:]) for each in like]
    sizes = [math.prod(shape) for shape in shapes]
    message = like[0].new_empty(sum(sizes))
    key, value = (part.view(shape) for part, shape in zip(message.split(sizes), shapes, strict=True))
    return message, (key, value)
