"""Attention of few rows to many keys by a function of our own in C++ (`few_rows_attention.cpp`).

For one new token, torch's kernels for a CPU read keys and values at a third of the rate that memory has.
torch's inductor compiles it, as it does layers, and keeps it in the same cache.
"""

import ctypes
from dataclasses import replace
from importlib.resources import files

import torch
from torch import Tensor
from torch._inductor.codecache import CppCodeCache

from megatron_star.attention.partial import Partial
from megatron_star.planning.model_shape import latent_attention
from megatron_star.speed.cpu_attention import MOST_ROWS, FewRowsAttention
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.pieces import first_line

HEAD_SIZES = range(16, 513, 16)
ELEMENTS = {torch.float32: "float", torch.bfloat16: "uint16_t"}


def compile_attention(star_model: FastStarModel) -> FastStarModel:
    """With the function, where layers are compiled too and it takes their keys and values.

    Raises:
        ValueError: the compiler fails.
    """
    config = star_model.model.config
    if not star_model.compiled_rows or star_model.device.type != "cpu" or latent_attention(config):
        return star_model
    native = compile_few_rows_attention(config.kv_channels, config.params_dtype)
    return replace(star_model, native_attention=native)


def compile_few_rows_attention(head_size: int, dtype: torch.dtype) -> FewRowsAttention | None:
    """The function for keys and values of this head size and dtype; None if it does not take them.

    Raises:
        ValueError: the compiler fails.
    """
    if dtype not in ELEMENTS or head_size not in HEAD_SIZES:
        return None
    source = files("megatron_star.speed").joinpath("few_rows_attention.cpp").read_text()
    defined = f"#include <cstdint>\n#define HEAD_SIZE {head_size}\n#define ELEMENT {ELEMENTS[dtype]}\n"
    try:
        library = CppCodeCache.load(defined + source)
    except Exception as error:
        raise ValueError(f"attention could not be compiled: {first_line(error)}") from error
    attend_heads = library.attend_few_rows
    attend_heads.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 8
    attend_heads.restype = None

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Partial:
        rows, b, heads, hn = query.shape
        assert rows <= MOST_ROWS and hn == head_size == value.size(3) and key.dtype == value.dtype == dtype
        key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (key, value))
        scaled = query.permute(1, 2, 0, 3).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        scaled *= softmax_scale
        out, lse = torch.empty_like(scaled), scaled.new_empty(b, heads, rows)
        strides = key.stride(2), key.stride(0), value.stride(2), value.stride(0)
        for i in range(b):
            pointers = (each.data_ptr() for each in (scaled[i], key[:, i], value[:, i], out[i], lse[i]))
            attend_heads(*pointers, heads, rows, key.size(0), *strides, torch.get_num_threads())
        return Partial(out, lse)

    return attend
