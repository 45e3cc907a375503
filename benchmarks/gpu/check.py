"""The GPU check: stages in one process, most valuable first; each figure is written once it is known."""

import argparse
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import torch

from benchmarks.gpu import card, decoding, encoding, experts, graphs, kernels, parity, profiling
from benchmarks.gpu.bench import Bench, Figures, OutOfTime
from benchmarks.gpu.gpu_tables import tables
from megatron_star.attention.kernels import KERNEL_NAMES
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent

STAGES: dict[str, Callable[[Bench], None]] = {
    "machine": card.machine,
    "kernels": kernels.kernels,
    "merge": kernels.merge,
    "load": encoding.load,
    "parity": parity.parity,
    "encode": encoding.encode,
    "decode": decoding.decode,
    "graph": graphs.graphed,
    "attention": kernels.attention,
    "profile": profiling.profiled,
    "compiled": decoding.compiled,
    "memory": card.memory,
    "hf": decoding.hf,
    "experts": experts.experts,
    "ranks": encoding.ranks,
}
"""The last two forget the model; `ranks` takes what is left of the budget."""

SHORTEST_STAGE_SECONDS = 3.0


def run_stages(bench: Bench, names: list[str]) -> int:
    """Run these stages while there is time. One that raises costs its own figures. How many were not done."""
    signal.signal(signal.SIGALRM, _out_of_time)
    return sum(not _run_stage(bench, name) for name in names)


def _run_stage(bench: Bench, name: str) -> bool:
    left, start = bench.seconds_left(), monotonic()
    if left < SHORTEST_STAGE_SECONDS:
        bench.figures.write(name, "not run", left_out="the budget is spent")
        return False
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        with torch.inference_mode():
            STAGES[name](bench)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except (Exception, OutOfTime) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        trace = traceback.format_exc()[-1500:]
        bench.figures.write(name, "failed", error=f"{type(error).__name__}: {error}"[:500], trace=trace)
        return False
    bench.figures.write(name, "done", s=monotonic() - start)
    return True


def _out_of_time(*_: object) -> None:
    raise OutOfTime("the budget is spent")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """What to run, and where the figures go."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="figures are appended; default: stdout only"
    )
    parser.add_argument("--budget", type=float, default=420.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--stages", type=_stages, default=list(STAGES), help=f"default: {','.join(STAGES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    models = sorted(encoding.TP_SHARES)
    parser.add_argument("--model", choices=models, default="llama-3.1-8b", help="default: %(default)s")
    parser.add_argument("--kernel", choices=KERNEL_NAMES, default="auto", help="default: %(default)s")
    parser.add_argument(
        "--unit",
        type=int,
        default=8192,
        metavar="TOKENS",
        help="contexts are 4, 16 and 128; default: %(default)s",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="print the figures of FILE as tables; no run"
    )
    return parser.parse_args(argv)


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"no stage {unknown[0]!r}: one of {', '.join(STAGES)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 if a stage was not done, and where there is no GPU."""
    args = parse_arguments(argv)
    if args.report:
        print(tables(args.report))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: no CUDA GPU here: nothing was run (--device cpu --model tiny tries the check)",
            file=sys.stderr,
        )
        return 1
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cpu":
        use_cpu_where_cuda_is_absent()
    bench = Bench(
        Figures(args.output),
        device=device,
        model=args.model,
        unit=args.unit,
        kernel=args.kernel,
        budget_s=args.budget,
    )
    return int(run_stages(bench, args.stages) > 0)
