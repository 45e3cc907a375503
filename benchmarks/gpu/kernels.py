"""The stages about attention alone: the contract of every kernel, the merge, and how fast each is."""

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import NamedTuple

import kernel_contract as contract  # of tests/, which scripts/gpu_check.py puts on the path
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.bench import Bench, written
from megatron_star.attention.kernels import KERNELS, select_kernel
from megatron_star.attention.merge import PartialSum, merge_into, merge_into_on
from megatron_star.attention.partial import AttentionKernel, Partial

NUM_HEADS, NUM_GROUPS, HEAD_SIZE = 32, 8, 128
HEADS = ((32, 8, 128), (9, 3, 64))
SPLIT_KEYS = [(1, 20_001), (4, 4_097)]
NEW_PLAN_SHAPES = [(1, 1), (1, 37), (65, 3), (70, 70)]
"""For kernels of cuDNN, which builds a plan for each: tenths of a second."""

SECONDS_OF_CALLS = 0.02
"""Calls behind each other that are timed as one, so that starting them does not show."""


class Shape(NamedTuple):
    """One attention call."""

    rows: int
    keys: int
    causal: bool = False
    window: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        """What a table calls it."""
        parts = [f"{written(self.rows)} x {written(self.keys)}", "causal" if self.causal else ""]
        parts.append(f"window {written(self.window)}" if self.window else "")
        parts.append("soft cap" if self.softcap else "")
        return " ".join(part for part in parts if part)

    @property
    def flops(self) -> float:
        """Of both products, without what the mask hides, but for the corner of a window."""
        pairs = self.rows * min(self.keys, self.window or self.keys)
        return 4.0 * pairs * NUM_HEADS * HEAD_SIZE / (2 if self.causal and not self.window else 1)


def kernels(bench: Bench) -> None:
    """Every kernel that is here keeps the contract, in each of its dtypes."""
    for name in bench.kernels():
        for dtype in KERNELS[name].dtypes:
            with bench.figure("kernels", f"{name}, {str(dtype).removeprefix('torch.')}") as found:
                start = monotonic()
                shapes = _contract_shapes(name, bench.device)
                failures = [
                    failure
                    for shape in shapes
                    for heads in HEADS
                    if (failure := _broken_contract(name, shape, heads, dtype, bench.device))
                ]
                cases = len(HEADS) * len(shapes)
                found |= {"cases": cases, "failed": len(failures), "first": failures[:3]}
                found["s"] = monotonic() - start


def _contract_shapes(name: str, device: torch.device) -> list[Shape]:
    bands = [Shape(sq, sk, True, window) for sq, sk, window in contract.BANDS]
    if KERNELS[name].min_keys > 1:
        return [Shape(*sizes) for sizes in NEW_PLAN_SHAPES] + bands[:3]
    sizes = contract.SHAPES + (SPLIT_KEYS if device.type == "cuda" else [])
    shapes = [Shape(*rows_and_keys) for rows_and_keys in sizes] + bands
    if KERNELS[name].load_capped:
        shapes += [shape._replace(softcap=contract.SOFTCAP) for shape in shapes]
    return shapes


def _broken_contract(
    name: str, shape: Shape, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> str | None:
    """What is wrong with the kernel's result for these rows and keys, in one line."""
    np, ng, hn = heads
    qkv = contract.tensors(shape.rows, shape.keys, np=np, ng=ng, hn=hn, b=2, dtype=dtype, device=device.type)
    check = contract.check_equals_reference
    if shape.causal:
        check = partial(contract.check_band, window=shape.window)
    try:
        kernel = select_kernel(name, device=device, dtype=dtype, head_size=hn, softcap=shape.softcap)
        check(kernel, *qkv, tolerance=contract.TOLERANCE[dtype], softcap=shape.softcap)
    except Exception as error:  # an assertion of the contract, or whatever a library raises
        lines = str(error).strip().splitlines() or [""]
        return f"{shape} {heads}: {type(error).__name__} {' '.join(lines[:4])[:200]}"
    return None


def merge(bench: Bench) -> None:
    """The merge of this device against torch's operations: the same values, and how fast each is."""
    for num_rows in (1, bench.unit):
        query = torch.empty(num_rows, 1, NUM_HEADS, HEAD_SIZE, device=bench.device, dtype=bench.dtype)
        part = Partial(
            torch.randn(query.shape, device=bench.device).to(bench.dtype).permute(1, 2, 0, 3),
            torch.randn(1, NUM_HEADS, num_rows, device=bench.device),
        )
        for name, function in (("torch", merge_into), ("ours", merge_into_on(bench.device))):
            with bench.figure("merge", f"{name}, rows: {num_rows}") as found:
                found |= _merge_figures(bench, query, part, function)


def _merge_figures(
    bench: Bench, query: Tensor, part: Partial, function: Callable[..., None]
) -> dict[str, float]:
    difference = _merged_once(query, part, function) - _merged_once(query, part, merge_into)
    running = PartialSum(query).merged()
    seconds = bench.seconds(lambda: function(*running, part), calls=20, repeats=3, warm=3)
    num_bytes = 2 * running.out.nbytes + part.out.nbytes
    rates = {"us": seconds * 1e6, "gb_per_s": num_bytes / seconds / 1e9}
    return rates | {"difference": difference.abs().max().item()}


def _merged_once(query: Tensor, part: Partial, function: Callable[..., None]) -> Tensor:
    """A part merged into random values, the same each time."""
    running = PartialSum(query).merged()
    running.out.normal_(generator=torch.Generator(query.device).manual_seed(1))
    running.softmax_lse.zero_()
    function(*running, part)
    return running.out


def attention(bench: Bench) -> None:
    """Each kernel, and torch's `scaled_dot_product_attention` beside it, in one layer of an 8B Llama."""
    n = bench.unit
    shapes = [Shape(n, n, causal=True), Shape(4 * n, 4 * n, causal=True), Shape(4 * n, 4 * n)]
    shapes += [Shape(1, 4 * n), Shape(1, 16 * n), Shape(8, 16 * n)]
    shapes += [Shape(4 * n, 4 * n, True, window=n // 4), Shape(4 * n, 4 * n, True, softcap=50.0)]
    for shape in shapes:
        query, key, value = _tensors(bench, shape.rows, shape.keys)
        for name, call in _calls(bench, query, key, value, shape).items():
            if bench.has_time_for(12 * shape.flops):
                with bench.figure("attention", f"{name}: {shape}") as found:
                    found |= _attention_figures(bench, call, shape, key)
    growing(bench)


def _calls(
    bench: Bench, query: Tensor, key: Tensor, value: Tensor, shape: Shape
) -> dict[str, Callable[[], object]]:
    """By kernel; the peers leave the LSE away, and have neither windows nor a soft cap."""
    calls: dict[str, Callable[[], object]] = {}
    chosen = {"device": bench.device, "dtype": bench.dtype, "head_size": HEAD_SIZE, "softcap": shape.softcap}
    for name in bench.kernels():
        if name == "torch-efficient" and query.size(0) > bench.unit:
            continue  # it repeats keys and values of grouped heads: gigabytes
        if shape.softcap and not KERNELS[name].load_capped:
            continue
        mask = {"causal": shape.causal, "window": shape.window}
        kernel = select_kernel(name, **chosen)
        calls[name] = partial(kernel, query, key, value, softmax_scale=HEAD_SIZE**-0.5, **mask)
    if shape.window or shape.softcap:
        return calls
    heads_first = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]

    def peer(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            scaled_dot_product_attention(*heads_first, is_causal=shape.causal, enable_gqa=True)

    backends = [SDPBackend.FLASH_ATTENTION]
    if bench.device.type == "cuda":
        backends.append(SDPBackend.CUDNN_ATTENTION)
    for backend in backends:
        calls[f"torch's SDPA, {backend.name.split('_')[0].lower()}"] = partial(peer, backend)
    return calls


def _attention_figures(
    bench: Bench, call: Callable[[], object], shape: Shape, key: Tensor
) -> dict[str, float]:
    once = bench.seconds(call, warm=1)
    calls = max(1, min(50, int(SECONDS_OF_CALLS / once)))
    seconds = bench.seconds(call, repeats=3, calls=calls)
    return {
        "ms": seconds * 1e3,
        "tflops": shape.flops / seconds / 1e12,
        "kv_gb_per_s": 2 * key.nbytes / seconds / 1e9,
    }


def growing(bench: Bench) -> None:
    """A row whose keys become one more each call: what a kernel prepares for each new length shows."""
    num_calls, num_keys = 40, bench.unit // 2
    query, key, value = _tensors(bench, 1, num_keys + num_calls)
    for name in bench.kernels():
        with bench.figure("attention", f"{name}: 1 row, one key more each call") as found:
            kernel = select_kernel(name, device=bench.device, dtype=bench.dtype, head_size=HEAD_SIZE)
            lengths = iter(range(num_keys, num_keys + num_calls))

            def call(kernel: AttentionKernel = kernel, lengths=lengths) -> None:
                held = slice(0, next(lengths))
                kernel(query, key[held], value[held], causal=False, softmax_scale=HEAD_SIZE**-0.5)

            found["ms"] = 1e3 * bench.seconds(call, repeats=num_calls - 5, warm=5)


def _tensors(bench: Bench, num_rows: int, num_keys: int) -> list[Tensor]:
    """Random query, key and value of one sequence."""
    return [
        torch.randn(tokens, 1, heads, HEAD_SIZE, dtype=bench.dtype, device=bench.device)
        for tokens, heads in ((num_rows, NUM_HEADS), (num_keys, NUM_GROUPS), (num_keys, NUM_GROUPS))
    ]
