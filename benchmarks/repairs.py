"""All candidate repairs of star's loss on the same samples: what each keeps of exact, and what it costs.

    OMP_NUM_THREADS=1 python benchmarks/repairs.py --hf .demo/hf --shard 0/2 --output repairs.0 &
    OMP_NUM_THREADS=1 python benchmarks/repairs.py --hf .demo/hf --shard 1/2 --output repairs.1
    python benchmarks/repairs.py --report repairs.0 repairs.1 --picture repairs.png

A Hugging Face model encodes each context with a candidate's attention, sees the question, and is shown the
right answer (teacher forcing): is its most likely token right at every place, and how likely is the whole
answer? A later run with the same output adds what is missing. What can be tried: `repair_candidates.py`.
"""

import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from benchmarks.repair_candidates import Candidate
from benchmarks.repair_defaults import DEFAULT
from benchmarks.repair_laboratory import Laboratory, record_id
from benchmarks.repair_picture import draw_frontier
from benchmarks.repair_report import FIELDS, NOTES, figures_by_length, read_measured, table_rows, winner
from megatron_star.evaluation.score_tables import markdown, plain_text
from megatron_star.evaluation.tasks import NamedTask, SampleKey
from megatron_star.job.answer_files import AnswerLines
from megatron_star.job.argument_types import ArgumentParser, positive, real_number, token_count
from megatron_star.job.single_process import exit_on_user_errors
from megatron_star.programs.report import check_picture

PROGRAM = "repairs"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FORMATS = {"text": plain_text, "markdown": markdown}


def shard(text: str) -> tuple[int, int]:
    """An argument type: `0/2` is every second sample, from the first."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ArgumentTypeError(f"{text!r} is not like 0/2 or 1/2")
    return int(index), int(count)


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(prog="repairs.py", description=__doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face checkpoint to measure")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    tasks = [NamedTask.parse(name) for name in ("niah_single_1", "niah_single_2")]
    parser.add_argument("--tasks", nargs="+", type=NamedTask.parse, default=tasks, metavar="TASK")
    parser.add_argument("--length", type=token_count, default=4096, metavar="TOKENS")
    parser.add_argument("--samples", type=positive, default=12, metavar="N", help="of each task")
    parser.add_argument(
        "--candidates", nargs="+", default=DEFAULT, metavar="TEXT", help="exact should be one of them"
    )
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="of the samples")
    parser.add_argument("--output", metavar="FILE", help="JSON Lines; what they lack is added")
    parser.add_argument("--report", nargs="+", type=Path, metavar="FILE", help="print what these hold")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the report")
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="draw the report, kept against operations"
    )
    parser.add_argument("--winner", metavar="TEXT", help="candidate that the picture shows as the best")
    parser.add_argument(
        "--at-least",
        type=real_number(0, 1),
        default=0.97,
        metavar="SHARE",
        help="otherwise it is the cheapest that keeps so much",
    )
    args = parser.parse_args(argv)
    if bool(args.report) == bool(args.output and args.hf):
        parser.error("give --hf and --output to measure, or --report to look at what was measured")
    return args


def measure(args: Namespace) -> None:
    """What the output lacks of this shard's samples; raises ValueError or OSError."""
    candidates = dict.fromkeys(map(Candidate.parse, args.candidates))
    keys = [SampleKey(task, args.length, index) for index in range(args.samples) for task in args.tasks]
    index, count = args.shard
    of_run = {"model": str(args.hf), "dtype": args.dtype}
    asked = {record_id(key.id, c): of_run for key in keys[index::count] for c in candidates}
    with AnswerLines(args.output, PROGRAM, FIELDS, {"--hf": args.hf}) as lines:
        finished = lines.finished(asked)
        if len(finished) == len(asked):
            return
        laboratory, named = Laboratory.open(args.hf, DTYPES[args.dtype]), {}
        for key in tqdm(keys[index::count], mininterval=0.1 if sys.stderr.isatty() else 30):
            missing = [c for c in candidates if record_id(key.id, c) not in finished]
            question = laboratory.question(key) if missing else None
            for candidate in missing:
                if candidate not in named:
                    named[candidate] = laboratory.with_named_layers(candidate, keys)
                measured = laboratory.measure(question, candidate, named[candidate])
                lines.append([measured.to_json() | {"asked": of_run}])


def report(args: Namespace) -> None:
    """A table for each length, and a picture if there is one length; raises ValueError or OSError."""
    if args.picture:
        check_picture(args.picture, args.report)
    found = figures_by_length(read_measured(args.report))
    if not any(found.values()):
        raise ValueError("these files hold no sample that exact was measured on")
    for length, figures in found.items():
        print(f"{length:,} tokens\n\n{FORMATS[args.format](table_rows(figures))}\n")
    print(NOTES)
    if args.picture:
        if len(found) > 1:
            raise ValueError(f"--picture is of one length, and these files hold {len(found)}")
        [(length, figures)] = found.items()
        if not (best := winner(figures, args.at_least, args.winner)):
            raise ValueError(f"no candidate is {args.winner!r}, or keeps {args.at_least:.0%}")
        draw_frontier(figures, best, args.picture, title=f"{length:,} tokens")


def main() -> None:
    with exit_on_user_errors():
        args = parse_arguments()
        (report if args.report else measure)(args)


if __name__ == "__main__":
    main()
