"""The demo: ask a real model for a number hidden in real text, with exact attention and with Star Attention.

    make demo        (or, in the root of the repository, python -m megatron_star.programs.demo --seed 1)

The question is a sample of RULER's needle-in-a-haystack task in essays (arXiv 2404.06654).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_star.evaluation.sample import Sample
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker
from megatron_star.help_formatter import HelpFormatter
from megatron_star.text.tokenizer import load_tokenizer

CHECKPOINT = Path(".demo/megatron")
FILES = Path(".demo/needle")
MODES = {"exact": ["--star-mode", "exact"], "star": ["--star-mode", "star"]}
TASK = "niah_single_2"
NUM_TOKENS = 4096
"""Of the context, the query and the room for an answer."""
COLUMNS = ("mode", "blocks", "TTFT s", "time per token ms", "KV per rank MB", "TTFT speedup")


def write_question(seed: int) -> Sample:
    """Write context.txt and query.txt: a sample whose needle is in the middle of the context.

    Raises:
        ValueError, OSError: there is no tokenizer, or there are no essays: `make model` makes both.
    """
    maker = SampleMaker(load_tokenizer(CHECKPOINT / "tokenizer"), TaskFiles(), chat=True)
    sample = maker.make(SampleKey(NamedTask.parse(TASK), NUM_TOKENS, index=0, seed=seed, depth=0.5))
    FILES.mkdir(parents=True, exist_ok=True)
    for mode in MODES:
        (FILES / f"{mode}.json").unlink(missing_ok=True)  # of an earlier run
    (FILES / "context.txt").write_text(sample.context, encoding="utf-8")
    (FILES / "query.txt").write_text(sample.query, encoding="utf-8")
    return sample


def torchrun_arguments(mode: str) -> list[str]:
    """Two ranks answer the question, into MODE.json."""
    return [
        *("--standalone", "--nproc-per-node", "2", "launch/generate.py", "--load", str(CHECKPOINT)),
        *("--context-parallel-size", "2", *MODES[mode]),
        *("--context-file", str(FILES / "context.txt"), "--query-file", str(FILES / "query.txt"), "--chat"),
        *("--top-k", "1", "--num-tokens-to-generate", "32", "--output", str(FILES / f"{mode}.json")),
    ]


def answer(mode: str) -> dict[str, Any]:
    """What generate.py answers in this mode.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    command = [os.path.relpath(Path(sys.executable).with_name("torchrun")), *torchrun_arguments(mode)]
    print(f"$ OMP_NUM_THREADS=1 {shlex.join(command)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    return json.loads((FILES / f"{mode}.json").read_text(encoding="utf-8"))


def contains(result: dict[str, Any], number: str) -> bool:
    """Whether the answer has the number."""
    return number in result["text"].replace(",", "")


def describe_answer(mode: str, result: dict[str, Any], number: str) -> str:
    """The answer, and whether it has the number."""
    verdict = "has the number" if contains(result, number) else f"LACKS the number {number}"
    return f"{mode} attention {verdict}: {result['text'].strip()}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Times and memory of each mode, aligned; the speedup is against `exact`."""
    rows = [COLUMNS]
    for mode, result in results.items():
        timings = result["timings"]
        speedup = results["exact"]["timings"]["ttft_s"] / timings["ttft_s"]
        numbers = (timings["ttft_s"], timings["tpot_s"] * 1e3, max(result["kv_bytes_per_rank"]) / 1e6)
        rows.append(
            (mode, str(result["num_blocks"]), *(f"{number:.1f}" for number in numbers), f"{speedup:.2f}x")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def run_demo(seed: int) -> bool:
    """Ask in both modes and print what comes back; whether both answers have the number."""
    sample = write_question(seed)
    (number,) = sample.references
    print(f"Hidden in {NUM_TOKENS:,} tokens of Paul Graham's essays and a question: the number {number}.")
    print(f"SmolLM2-135M-Instruct, on two processes of one thread, is asked: {sample.query}\n")
    results = {}
    for mode in MODES:
        results[mode] = answer(mode)
        print(f"{describe_answer(mode, results[mode], number)}\n")
    print(f"{table(results)}\nOne run each: other work on this machine shows in the times.\n")
    print("Next: put a text of your own in --context-file and a question in --query, or serve it: README.md.")
    return all(contains(result, number) for result in results.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__.splitlines()[0], formatter_class=HelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the number, its key and the essays' order")
    args = parser.parse_args()
    try:
        found = run_demo(args.seed)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except (OSError, ValueError) as error:
        sys.exit(f"demo: {error}")
    if not found:
        sys.exit("demo: an answer lacks the hidden number")


if __name__ == "__main__":
    main()
