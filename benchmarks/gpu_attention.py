"""Attention kernels on one GPU: context encoding, token generation, and the merge.

    python benchmarks/gpu_attention.py --output result.json

Times are of the GPU's own clock, medians of --repeats calls after warm-up, for one layer of an 8B Llama (32
query heads, 8 KV heads of 128, bfloat16). "growing" is what a token costs while the keys become one more each
call, so it holds whatever a kernel prepares for each new length; it is wall-clock time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.gpu_machine import machine
from megatron_star.attention.kernels import KERNELS, select_kernel
from megatron_star.attention.merge import PartialSum, merge_into
from megatron_star.attention.partial import AttentionKernel

NUM_HEADS, NUM_GROUPS, HEAD_SIZE = 32, 8, 128
SHAPES = {
    "causal 8K": (8192, 8192, True),
    "causal 32K": (32768, 32768, True),
    "8K rows, 32K keys": (8192, 32768, False),
    "1 row, 32K keys": (1, 32768, False),
    "1 row, 128K keys": (1, 131072, False),
    "8 rows, 128K keys": (8, 131072, False),
    "64 rows, 128K keys": (64, 131072, False),
}


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Milliseconds of a call on the GPU, after three that do not count."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def tensors(num_rows: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value of one sequence."""
    sizes = [(num_rows, NUM_HEADS), (num_keys, NUM_GROUPS), (num_keys, NUM_GROUPS)]
    query, key, value = (
        torch.randn(tokens, 1, heads, HEAD_SIZE, dtype=torch.bfloat16, device="cuda")
        for tokens, heads in sizes
    )
    return query, key, value


def measure_shape(kernel: AttentionKernel, shape: str, repeats: int) -> dict[str, float]:
    """Milliseconds, TFLOP/s of the two products, and GB/s of keys and values."""
    num_rows, num_keys, causal = SHAPES[shape]
    qkv = tensors(num_rows, num_keys)
    ms = median_ms(lambda: kernel(*qkv, causal=causal, softmax_scale=HEAD_SIZE**-0.5), repeats)
    flops = 4 * num_rows * num_keys * NUM_HEADS * HEAD_SIZE / (2 if causal else 1)
    return {
        "ms": ms,
        "tflop_per_s": flops / ms / 1e9,
        "kv_gb_per_s": (qkv[1].nbytes + qkv[2].nbytes) / ms / 1e6,
    }


def measure_growing(kernel: AttentionKernel, num_calls: int = 50, num_keys: int = 4096) -> dict[str, float]:
    """Wall-clock milliseconds of a call whose keys are one more than those of the call before."""
    query, key, value = tensors(1, num_keys + num_calls + 1)
    times = []
    for call in range(num_calls + 1):
        held = slice(0, num_keys + call)
        torch.cuda.synchronize()
        start = perf_counter()
        kernel(query, key[held], value[held], causal=False, softmax_scale=HEAD_SIZE**-0.5)
        torch.cuda.synchronize()
        times.append((perf_counter() - start) * 1e3)
    return {"ms": statistics.median(times[1:])}


def measure_kernel(name: str, repeats: int) -> dict[str, dict[str, float]]:
    """All figures of a kernel, by shape."""
    kernel = select_kernel(name, device=torch.device("cuda", 0), dtype=torch.bfloat16, head_size=HEAD_SIZE)
    figures = {shape: measure_shape(kernel, shape, repeats) for shape in SHAPES}
    return figures | {"growing, 1 row": measure_growing(kernel)}


def measure_merge(repeats: int) -> dict[str, dict[str, float]]:
    """Merging one more part into 8K rows: torch's operations and the Triton kernel."""
    query = tensors(8192, 1)[0]
    running, part = PartialSum(query), PartialSum(query).merged()
    merges = {"merge, torch": merge_into, "merge, triton": running.merge_into}
    return {
        name: {"ms": median_ms(lambda merge=merge: merge(*running.merged(), part), repeats)}
        for name, merge in merges.items()
    }


def print_table(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """For people."""
    print(f"{'kernel':<26} {'shape':<20} {'ms':>9} {'TFLOP/s':>9} {'KV GB/s':>9}")
    for kernel, shapes in figures.items():
        for shape, values in shapes.items():
            more = "".join(f" {values[k]:>9.1f}" for k in ("tflop_per_s", "kv_gb_per_s") if k in values)
            print(f"{kernel:<26} {shape:<20} {values['ms']:>9.3f}{more}")


def main() -> None:
    """Measure every kernel that this machine has; name those that it has not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, metavar="N")
    parser.add_argument("--output", metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: nothing was measured")
    figures, left_out = {}, {}
    for name, info in KERNELS.items():
        obstacle = info.obstacle(torch.device("cuda", 0), torch.bfloat16, HEAD_SIZE)
        if obstacle or not info.is_installed:
            left_out[name] = obstacle or f"{info.distribution} is not installed"
        else:
            figures[name] = measure_kernel(name, args.repeats)
    figures["-"] = measure_merge(args.repeats)
    print_table(figures)
    for name, reason in left_out.items():
        print(f"{name}: not measured: {reason}")
    if args.output:
        result = {"machine": machine(), "command": sys.argv, "figures": figures, "left_out": left_out}
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
