"""Whether exact's answers in a file of `megatron-star eval` are those of transformers, token by token.

    python benchmarks/answers_of_transformers.py --load .demo/megatron --hf .demo/hf \\
        --answers scores.jsonl --samples 24 --output compared.jsonl

Makes the samples again, asks transformers' own `generate` (float32, SDPA, greedy), and ends with status 1 if
an answer differs. Answers that `--output` has already are not asked for again.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from megatron_star.checked_input import json_lines, strict_fields
from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest
from megatron_star.evaluation.results import EXACT, ScoredAnswer, read_answers
from megatron_star.evaluation.sample import greedy_request
from megatron_star.evaluation.scoring import MATCHING
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker
from megatron_star.job.answer_files import AnswerLines
from megatron_star.job.argument_types import positive
from megatron_star.job.asked import of_tokens
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.text.tokenizer import load_tokenizer

PROGRAM = "answers_of_transformers"


class _Record:
    """What a line must have to be of this program."""

    id: str
    asked: dict[str, Any]
    task: str
    same: bool
    score: float
    score_of_transformers: float


@torch.inference_mode()
def greedy_answer(model: PreTrainedModel, request: StarRequest) -> list[int]:
    """Tokens of transformers' own `generate`."""
    prompt = torch.tensor([[*request.context_tokens, *request.query_tokens]])
    most = request.sampling.num_tokens_to_generate
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=most)
    return out[0, prompt.numel() :].tolist()


def compared(model: PreTrainedModel, maker: SampleMaker, answer: ScoredAnswer) -> dict:
    """Both answers to one sample, and both scores."""
    named = NamedTask.parse(answer.task)
    depth = answer.depth if "@" in answer.sample else None
    sample = maker.make(SampleKey(named, answer.length, answer.index, answer.seed, depth))
    request = greedy_request(maker.tokenizer, sample, StarConfig(mode="exact"), chat=answer.chat)
    tokens = greedy_answer(model, request)
    text = maker.tokenizer.decode(tokens, skip_special_tokens=True)
    return {
        "id": answer.sample,
        "task": answer.task,
        "same": tokens == list(answer.tokens),
        "score": answer.score,
        "score_of_transformers": MATCHING[named.task.matching](text, sample.references),
        "text": answer.text,
        "text_of_transformers": text,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", required=True, metavar="DIR", help="checkpoint, for its tokenizer")
    parser.add_argument("--hf", required=True, metavar="DIR", help="the same model for transformers")
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--samples", type=positive, required=True, metavar="N", help="of each task and length"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON Lines; what is there is kept")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    tokenizer = load_tokenizer(read_checkpoint_info(args.load).tokenizer_directory)
    answers = [a for a in read_answers([args.answers]) if a.setting == EXACT and a.index < args.samples]
    if not answers:
        sys.exit(f"error: {args.answers}: holds no answers of exact")
    with AnswerLines(args.output, PROGRAM, strict_fields(_Record), {"--answers": args.answers}) as output:
        asked = {answer.sample: {"tokens": of_tokens(list(answer.tokens))} for answer in answers}
        finished = output.finished(asked)
        still_open = [answer for answer in answers if answer.sample not in finished]
        model = AutoModelForCausalLM.from_pretrained(args.hf, dtype=torch.float32).eval()
        for answer in tqdm(still_open, mininterval=0.1 if sys.stderr.isatty() else 30):
            maker = SampleMaker(tokenizer, TaskFiles(), answer.chat)
            output.append([compared(model, maker, answer) | {"asked": asked[answer.sample]}])
    report(Path(args.output))


def report(path: Path) -> None:
    """Print a line for each task; exit with status 1 if an answer differs."""
    by_task = defaultdict(list)
    for _, result in json_lines(path):
        by_task[result["task"]].append(result)
    for task, results in sorted(by_task.items()):
        num_same = sum(result["same"] for result in results)
        means = [sum(r[key] for r in results) / len(results) for key in ("score", "score_of_transformers")]
        print(
            f"{task}: {num_same} of {len(results)} answers are the same, token by token; "
            f"scores {100 * means[0]:.1f} and {100 * means[1]:.1f} (transformers)"
        )
    if not all(result["same"] for results in by_task.values() for result in results):
        sys.exit("error: some answers differ")


if __name__ == "__main__":
    main()
