"""Questions for `megatron-star calibrate` where nobody has any of their own: needle samples as JSON Lines.

A query ends with the beginning of its answer, for a model that goes on writing (calibrate without `--chat`).

python benchmarks/calibration_questions.py --load .demo/megatron --length 2K --samples 120 --output q.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from megatron_star.evaluation.sample import Sample
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker
from megatron_star.job.argument_types import positive, token_count
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.text.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", required=True, metavar="DIR", help="checkpoint, for its tokenizer")
    parser.add_argument(
        "--tasks", nargs="+", type=NamedTask.parse, default=[NamedTask.parse("niah_single_2")]
    )
    parser.add_argument("--length", type=token_count, required=True, metavar="TOKENS")
    parser.add_argument("--samples", type=positive, required=True, metavar="N", help="of each task")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    tokenizer = load_tokenizer(read_checkpoint_info(args.load).tokenizer_directory)
    maker = SampleMaker(tokenizer, TaskFiles(), chat=False)
    keys = [SampleKey(task, args.length, i, args.seed) for task in args.tasks for i in range(args.samples)]
    text = "".join(json.dumps(_question(maker.make(key))) + "\n" for key in keys)
    if args.output.exists() and args.output.read_bytes() != text.encode():
        sys.exit(f"error: {args.output}: holds something else: give another --output")
    args.output.write_text(text, encoding="utf-8")


def _question(sample: Sample) -> dict[str, str]:
    return {
        "id": sample.id,
        "context": sample.context,
        "query": f"{sample.query} {sample.answer_prefix}",
    }


if __name__ == "__main__":
    main()
