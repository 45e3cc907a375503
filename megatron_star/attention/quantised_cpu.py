"""Few rows attend to int8 keys and values on a CPU: a kernel in C++, compiled when it is asked for.

torch has none that reads int8, and widening all of it to float32 takes as long as reading float32 does
(docs/journal.md, "KV in 8 bits"). The compiler is the one that `--compile-decode` takes. The kernel runs on
torch's own threads: it is not linked with an OpenMP library, but finds torch's.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from megatron_star.attention.partial import Partial
from megatron_star.attention.quantised_kv import AttendQuantised, QuantisedTensor

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = "g++"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp")
COMPILE_SECONDS = 120
MOST_ROWS = 64
"""Of a KV head: its query heads times the rows of each. The kernel has no room for more."""
LANES, MOST_SIZE = 16, 256
TASKS_PER_THREAD = 8
TILE = 64

_Sizes = ctypes.c_int64 * 11


def takes(size: int) -> bool:
    """Whether the kernel takes heads of this size."""
    return size % LANES == 0 and size <= MOST_SIZE


def load() -> AttendQuantised | None:
    """The kernel; None where it cannot be compiled."""
    compiled = _compiled()
    if compiled is None:
        return None

    def attend(
        query: Tensor, key: QuantisedTensor, value: QuantisedTensor, softmax_scale: float, _: torch.dtype
    ) -> Partial:
        return _attend(compiled, query * softmax_scale, key, value)

    return attend


def _compiled() -> Callable[..., None] | None:
    """The function `attend` of the source."""
    if not shutil.which(COMPILER):
        return None
    with TemporaryDirectory() as folder:
        compiled, library = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        commands = (
            [COMPILER, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            [COMPILER, "-shared", str(compiled), "-o", str(library)],
        )
        try:
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
            function = ctypes.CDLL(str(library)).attend
        except (subprocess.SubprocessError, OSError):
            return None
    function.restype, function.argtypes = None, [ctypes.c_void_p] * 9
    return function


def _attend(
    compiled: Callable[..., None], query: Tensor, key: QuantisedTensor, value: QuantisedTensor
) -> Partial:
    """Scaled query [sq, 1, np, hn] to [1, np, sq, hv] and LSE [1, np, sq]."""
    sq, _, np, key_size = query.shape
    num_tokens, _, ng, value_size = value.numbers.shape
    rows = query.view(sq, ng, np // ng, key_size).transpose(0, 1).contiguous()
    stored = *key, *value
    # A head's tokens lie side by side.
    assert all(each.stride(0) == each.size(3) and each.stride(3) == 1 for each in stored)
    num_threads = torch.get_num_threads()
    chunks = max(1, min(TASKS_PER_THREAD * num_threads // ng, num_tokens // TILE))
    per_chunk = -(-num_tokens // chunks)
    num_tasks = ng * -(-num_tokens // per_chunk)
    of_head = [each.stride(2) for each in stored]
    sizes = _Sizes(
        ng, sq * np // ng, num_tokens, per_chunk, key_size, value_size, *of_head, num_threads
    )  # as in the source
    partials = query.new_empty(num_tasks * (sq * np // ng) * (value_size + 2))
    out, lse = query.new_empty(ng, sq, np // ng, value_size), query.new_empty(ng, sq, np // ng)
    tensors = (rows, *stored, partials, out, lse)
    compiled(ctypes.byref(sizes), *(each.data_ptr() for each in tensors))
    return Partial(out.transpose(1, 2).reshape(1, np, sq, value_size), lse.transpose(1, 2).reshape(1, np, sq))
