"""All benchmarks that fit a machine of two cores, one after the other; `make bench` calls it.

    python benchmarks/run.py --directory bench --only decode --only overlap

Each part is a program of this folder with its own JSON result in the directory. At the end come `figures.md`,
a table of what was aimed at and measured, and pictures. A part that has a result is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.tables import draw, write_figures

FOLDER = Path(__file__).resolve().parent
DEMO = FOLDER.parent / ".demo"


class BenchmarkPart(NamedTuple):
    """One program: its arguments, and how many ranks of how many threads."""

    program: str
    arguments: str
    num_ranks: int = 2
    num_threads: int = 1


PARTS = {
    "overlap": BenchmarkPart("overlap", "--num-tokens 8K --block-size 1K --repeats 2"),
    "ring": BenchmarkPart("ring_attention", "--num-tokens 8K --repeats 9"),
    "one-rank-4k": BenchmarkPart("one_rank", "--hf HF --num-tokens 4K --megatron", 1, 2),
    "one-rank-8k": BenchmarkPart("one_rank", "--hf HF --num-tokens 8K --repeats 2", 1, 2),
    "decode": BenchmarkPart("decode", "--hf HF --num-tokens 8K --repeats 9 --compile"),
    "decode-1b": BenchmarkPart(
        "decode", "--random-model llama-3.2-1b --hf random --bf16 --num-tokens 8K --num-steps 4 --compile"
    ),
    "decode-1b-fp32": BenchmarkPart(
        "decode", "--random-model llama-3.2-1b --fp32 --num-tokens 8K --num-steps 4 --compile"
    ),
    **{
        f"windows-8k{name}": BenchmarkPart(
            "window_layers", "--random-model gemma-3-270m --fp32 --num-tokens 8K", ranks, threads
        )
        for name, ranks, threads in (("", 2, 1), ("-one-rank", 1, 2))
    },
    "context-store": BenchmarkPart("context_store", "--num-tokens 6K --repeats 1"),
    "kv-8-bits": BenchmarkPart(
        "kv_8_bits", "--fp32 --num-tokens 8K --repeats 9 --samples 10 --compile", 1, 2
    ),
    "experts": BenchmarkPart(
        "expert_parallel",
        "--random-model qwen3-moe-1b --fp32 --expert-model-parallel-size 2 --repeats 7 --compile",
    ),
    "sampling": BenchmarkPart("sampling", "--random-model tiny --repeats 5", 1, 2),
    "lookup": BenchmarkPart("lookup", "--hf HF --compile-decode 1,2,4,8,16", 1, 2),
    "lookup-two-ranks": BenchmarkPart("lookup", "--compile-decode 1,2,4,8,16"),
    "bandwidth": BenchmarkPart("memory_bandwidth", "--repeats 9"),
    **{
        f"memory-{tokens}-{ranks}": BenchmarkPart(
            "encoding_memory", f"--num-tokens {tokens} --block-size 512 --wave-tokens 1K", ranks
        )
        for tokens, ranks in (("2K", 1), ("4K", 2), ("8K", 4), ("8K", 1), ("8K", 2))
    },
    "memory-8K-2-one-wave": BenchmarkPart(
        "encoding_memory", "--num-tokens 8K --block-size 512 --wave-tokens 32K"
    ),
    "encoding-8k": BenchmarkPart("context_encoding", "--num-tokens 8K --block-size 1K --repeats 2"),
    "encoding-16k": BenchmarkPart(
        "context_encoding",
        "--num-tokens 16K --block-size 1K --repeats 2 --variants exact;star,recompute;star,passed",
    ),
    "encoding-32k": BenchmarkPart(
        "context_encoding", "--num-tokens 32K --block-size 1K --repeats 1 --variants exact;star,passed"
    ),
    **{
        f"blocks-{tokens}-{size}": BenchmarkPart(
            "context_encoding", f"--num-tokens {tokens} --block-size {size} --repeats 1 --variants exact"
        )
        for tokens, size in (("2K", "512"), ("16K", "4K"), ("16K", "2K"), ("16K", "512"))
    },
    **{
        f"ranks-{ranks}": BenchmarkPart(
            "context_encoding", "--num-tokens 8K --block-size 1K --repeats 1 --variants exact", ranks
        )
        for ranks in (1, 4)
    },
    "star-64k": BenchmarkPart(
        "context_encoding", "--num-tokens 64K --block-size 1K --repeats 1 --variants star,passed"
    ),
}


def command_of(part: BenchmarkPart, output: Path) -> list[str]:
    """What runs it."""
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(part.num_ranks)]
    arguments = part.arguments.replace("HF", str(DEMO / "hf")).split()
    program = [str(FOLDER / f"{part.program}.py"), "--load", str(DEMO / "megatron"), *arguments]
    return [sys.executable, *(ranks if part.num_ranks > 1 else []), *program, "--output", str(output)]


def run_part(name: str, directory: Path) -> None:
    """Run one part, unless it has a result. Raises CalledProcessError."""
    part, output = PARTS[name], directory / f"{name}.json"
    if output.exists():
        print(f"{name}: kept from {output}", flush=True)
        return
    print(
        f"\n{name}: {part.program}.py {part.arguments} ({part.num_ranks} ranks, {part.num_threads} threads)",
        flush=True,
    )
    start = monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(part.num_threads)}
    subprocess.run(command_of(part, output), env=environment, check=True)
    print(f"{monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("bench"))
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    for name in args.only or PARTS:
        try:
            run_part(name, args.directory)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {name} ended with status {error.returncode}")
    results = {
        path.stem: json.loads(path.read_text())["summary"] for path in sorted(args.directory.glob("*.json"))
    }
    write_figures(results, args.directory / "figures.md")
    draw(results, args.directory)


if __name__ == "__main__":
    main()
