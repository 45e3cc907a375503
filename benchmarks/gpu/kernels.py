"""The stages about attention alone: the contract of every kernel, the merge, and how fast each is."""

from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic

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


def kernels(bench: Bench) -> None:
    """Every kernel that is here keeps the contract, in each of its dtypes."""
    for name in bench.kernels():
        for dtype in KERNELS[name].dtypes:
            with bench.figure("kernels", f"{name}, {str(dtype).removeprefix('torch.')}") as found:
                start = monotonic()
                kernel = select_kernel(name, device=bench.device, dtype=dtype, head_size=HEAD_SIZE)
                failures = [
                    failure
                    for shape in _contract_shapes(name, bench.device)
                    for heads in HEADS
                    if (failure := _broken_contract(kernel, shape, heads, dtype, bench.device))
                ]
                cases = len(HEADS) * len(_contract_shapes(name, bench.device))
                found |= {"cases": cases, "failed": len(failures), "first": failures[:3]}
                found["s"] = monotonic() - start


def _contract_shapes(name: str, device: torch.device) -> Sequence[tuple[int, int]]:
    if KERNELS[name].min_keys > 1:
        return NEW_PLAN_SHAPES
    return contract.SHAPES + (SPLIT_KEYS if device.type == "cuda" else [])


def _broken_contract(
    kernel: AttentionKernel,
    shape: tuple[int, int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """What is wrong with the kernel's result for these rows and keys, in one line."""
    np, ng, hn = heads
    qkv = contract.tensors(*shape, np=np, ng=ng, hn=hn, b=2, dtype=dtype, device=device.type)
    try:
        contract.check_equals_reference(kernel, *qkv, tolerance=contract.TOLERANCE[dtype])
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
    shapes = [(n, n, True), (4 * n, 4 * n, True), (4 * n, 4 * n, False)]
    shapes += [(1, 4 * n, False), (1, 16 * n, False), (8, 16 * n, False)]
    for sizes in shapes:
        shape = f"{written(sizes[0])} x {written(sizes[1])}" + (" causal" if sizes[2] else "")
        query, key, value = _tensors(bench, *sizes[:2])
        for name, call in _calls(bench, query, key, value, causal=sizes[2]).items():
            if bench.has_time_for(12 * _attention_flops(*sizes)):
                with bench.figure("attention", f"{name}: {shape}") as found:
                    found |= _attention_figures(bench, call, sizes, key)
    growing(bench)


def _calls(
    bench: Bench, query: Tensor, key: Tensor, value: Tensor, *, causal: bool
) -> dict[str, Callable[[], object]]:
    """By kernel; the peers leave the LSE away."""
    calls: dict[str, Callable[[], object]] = {}
    for name in bench.kernels():
        if name == "torch-efficient" and query.size(0) > bench.unit:
            continue  # it repeats keys and values of grouped heads: gigabytes
        kernel = select_kernel(name, device=bench.device, dtype=bench.dtype, head_size=HEAD_SIZE)
        calls[name] = partial(kernel, query, key, value, causal=causal, softmax_scale=HEAD_SIZE**-0.5)
    heads_first = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]

    def peer(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)

    backends = [SDPBackend.FLASH_ATTENTION]
    if bench.device.type == "cuda":
        backends.append(SDPBackend.CUDNN_ATTENTION)
    for backend in backends:
        calls[f"torch's SDPA, {backend.name.split('_')[0].lower()}"] = partial(peer, backend)
    return calls


def _attention_figures(
    bench: Bench, call: Callable[[], object], sizes: tuple[int, int, bool], key: Tensor
) -> dict[str, float]:
    once = bench.seconds(call, warm=1)
    calls = max(1, min(50, int(SECONDS_OF_CALLS / once)))
    seconds = bench.seconds(call, repeats=3, calls=calls)
    return {
        "ms": seconds * 1e3,
        "tflops": _attention_flops(*sizes) / seconds / 1e12,
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


def _attention_flops(num_rows: int, num_keys: int, causal: bool) -> float:
    return 4.0 * num_rows * num_keys * NUM_HEADS * HEAD_SIZE / (2 if causal else 1)
