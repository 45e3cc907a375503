"""Choosing the tokens of a step: all rows in one batch, against one row after the other on the CPU.

    OMP_NUM_THREADS=2 python benchmarks/sampling.py --load - --random-model tiny --repeats 9

Only the logits' device matters of the model. Before, each request sampled with Megatron's TorchSampling and a
generator of its own, from logits that had been copied to the CPU. Rules are compared with transformers'
processors, which look at all of a prompt in each step.
"""

import random
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from megatron.core.inference.sampling.torch_sampling import TorchSampling
from megatron.core.inference.sampling_params import SamplingParams
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from benchmarks.measuring import measure_rounds, median_ratio, medians, run_on_ranks
from megatron_star.algorithm.star_model import StarModel
from megatron_star.engine.answer_rules import AnswerRules
from megatron_star.engine.finite import why_not_finite
from megatron_star.engine.sampling import RowToSample, sample_rows, uniform
from megatron_star.engine.token_rules import TokenRules
from megatron_star.job.argument_types import ArgumentParser, positive, token_count
from megatron_star.parallel.groups import StarGroups

PROMPT_TOKENS, ANSWER_TOKENS = 4096, 256
ONE_KIND = {
    "greedy": SamplingParams(top_k=1),
    "temperature": SamplingParams(temperature=0.8),
    "top-k": SamplingParams(top_k=50),
    "top-p": SamplingParams(top_p=0.9),
    "top-k and top-p": SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
}


class Kind(NamedTuple):
    """How the rows of a step are sampled: by these parameters in turn, and all by these rules.

    num_top: likeliest tokens that are told of each row.
    is_masked: half of the vocabulary is not allowed, as by a grammar.
    """

    samplings: tuple[SamplingParams, ...]
    rules: TokenRules = TokenRules()
    num_top: int = 0
    is_masked: bool = False

    def rows(self, count: int, vocab_size: int) -> list[RowToSample]:
        """Each of an answer of its own, of some hundred tokens after a prompt of some thousand."""
        generator = random.Random(0)
        mask = torch.full((-(-vocab_size // 32),), 0x55555555, dtype=torch.int32) if self.is_masked else None
        rows = []
        for i in range(count):
            prompt, tokens = (
                [generator.randrange(vocab_size) for _ in range(n)] for n in (PROMPT_TOKENS, ANSWER_TOKENS)
            )
            rules = AnswerRules(self.rules, [prompt], tokens) if self.rules != TokenRules() else None
            sampling = self.samplings[i % len(self.samplings)]
            rows.append(
                RowToSample(sampling, uniform(0, i), rules=rules, mask=mask, num_top_logprobs=self.num_top)
            )
        return rows


PENALTIES = TokenRules(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5)
KINDS = {name: Kind((sampling,)) for name, sampling in ONE_KIND.items()} | {
    "mixed": Kind(tuple(ONE_KIND.values())),
    # Tens of thousands of tokens are kept, so the whole vocabulary is sorted after all.
    "flat top-p": Kind((SamplingParams(temperature=5.0, top_p=0.9),)),
    "greedy, penalties": Kind((SamplingParams(top_k=1),), PENALTIES),
    "top-p, penalties": Kind((SamplingParams(top_p=0.9),), PENALTIES),
    "top-p, min-p": Kind((SamplingParams(top_p=0.9),), TokenRules(min_p=0.05)),
    "top-p, mask": Kind((SamplingParams(top_p=0.9),), is_masked=True),
    "greedy, 20 likeliest": Kind((SamplingParams(top_k=1),), num_top=20),
}
Round = dict[str, dict[str, float]]


def text_like_logits(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """[num_rows, vocab_size], float32: like frequencies of words in texts."""
    torch.manual_seed(0)
    by_rank = -1.5 * torch.arange(1, vocab_size + 1).float().log()
    rows = [by_rank[torch.randperm(vocab_size)] for _ in range(num_rows)]
    return (torch.stack(rows) + 0.5 * torch.randn(num_rows, vocab_size)).to(device)


class SampledRowByRow:
    """How it was: the slow twin."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.prompt = list(range(PROMPT_TOKENS))

    def sample(self, logits: Tensor, rows: list[RowToSample]) -> None:
        """All rows of the step."""
        for number, (row, row_logits) in enumerate(zip(rows, logits.cpu(), strict=True)):
            assert why_not_finite(row_logits, number) is None
            token = self._choose(self._ruled(row_logits[None], row), row.sampling)
            logprobs = row_logits.log_softmax(-1)
            float(logprobs[token]), float(logprobs[int(row_logits.argmax())])
            if row.num_top_logprobs:
                [part.tolist() for part in logprobs.topk(row.num_top_logprobs)]

    def _ruled(self, logits: Tensor, row: RowToSample) -> Tensor:
        """By transformers' processors, which look at all that came; and by OpenAI's definition of counts."""
        if row.mask is not None:
            bits = (row.mask.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
            logits = logits.masked_fill(bits.flatten()[: logits.size(1)] == 0, -torch.inf)
        if row.rules and row.rules.has_penalties:
            rules, came = row.rules.rules, torch.tensor([self.prompt + row.rules.tokens])
            logits = RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)(came, logits)
            counts = torch.bincount(torch.tensor(row.rules.tokens), minlength=logits.size(1))
            logits = logits - rules.frequency_penalty * counts - rules.presence_penalty * (counts > 0)
        if row.min_p:
            logits = MinPLogitsWarper(row.min_p)(None, logits)
        return logits

    def _choose(self, logits: Tensor, sampling: SamplingParams) -> int:
        top_k, top_p, temperature = sampling.top_k, sampling.top_p, sampling.temperature
        if top_k > 1 and top_p > 0.0:  # it takes one of them at a time
            logits = TorchSampling.filter_logits(logits, temperature, top_k, 0.0)
            top_k, temperature = 0, 1.0
        parameters = temperature, top_k, 0.0 if top_k else top_p
        return int(TorchSampling.sample_from_logits(logits, *parameters, generator=self._generator))


def milliseconds(work: Callable[[], object], star_model: StarModel) -> float:
    """Of one step, everything that it started on the device included."""
    star_model.synchronize()
    start = perf_counter()
    work()
    star_model.synchronize()
    return 1e3 * (perf_counter() - start)


def measure(logits: Tensor, star_model: StarModel) -> Round:
    """Each kind in both ways, one right after the other."""
    before, figures = SampledRowByRow(), {}
    for name, kind in KINDS.items():
        rows = kind.rows(*logits.shape)
        sample_rows(logits, rows)  # what an answer's first step makes, others use
        for way, sample in (("before", before.sample), ("after", sample_rows)):
            step = milliseconds(lambda sample=sample, rows=rows: sample(logits, rows), star_model)
            figures[f"{name}, {way}"] = {"ms": step}
    return figures


def summarise(rounds: list[Round]) -> Mapping[str, dict[str, float]]:
    """Of each kind the medians, and the ratio within a round."""
    ms = {name: figures["ms"] for name, figures in medians(rounds).items()}
    return {
        kind: {
            "before_ms": ms[f"{kind}, before"],
            "after_ms": ms[f"{kind}, after"],
            "faster": median_ratio(rounds, f"{kind}, before", f"{kind}, after", "ms"),
        }
        for kind in KINDS
    }


def run(args: Namespace, star_model: StarModel, _: StarGroups) -> None:
    """All rounds, and a table."""
    logits = text_like_logits(args.num_rows, args.vocab_size, star_model.device)
    measure(logits, star_model)  # the first time is slower
    summary = measure_rounds(args, lambda: measure(logits, star_model), summarise)
    print(f"{args.num_rows} rows, {args.vocab_size} tokens{'before':>12}{'after':>12}{'faster':>10}")
    for kind, figures in summary.items():
        before, after = f"{figures['before_ms']:.2f} ms", f"{figures['after_ms']:.2f} ms"
        print(f"{kind:<22}{before:>14}{after:>12}{figures['faster']:>10.2f}")


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--num-rows", type=positive, default=64, metavar="N", help="sequences in the step")
    parser.add_argument("--vocab-size", type=token_count, default=1 << 17, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")


if __name__ == "__main__":
    run_on_ranks("sampling.py", __doc__.splitlines()[0], add_arguments, run)
