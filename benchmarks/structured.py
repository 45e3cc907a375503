"""Milliseconds a step that grammars add, at 1 and 8 sequences, with masks made beside the step and after it.

    OMP_NUM_THREADS=1 python benchmarks/structured.py --load .demo/megatron

One rank. Each sequence answers a schema that takes all its tokens. Rounds of the three kinds alternate, and
ratios are medians over them. Then: what a grammar takes to compile, and a mask.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from megatron.core.inference.sampling_params import SamplingParams
from transformers import PreTrainedTokenizerBase

from benchmarks.measuring import run_on_ranks, write_result
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.llguidance_grammar import Llguidance, LlguidanceGrammar
from megatron_star.engine.llguidance_vocabulary import Vocabulary
from megatron_star.engine.request import StarRequest
from megatron_star.job.argument_types import ArgumentParser, positive
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.parallel.groups import StarGroups
from megatron_star.server.grammar_spec import GrammarSpec
from megatron_star.server.grammar_text import grammar_text
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.text.end_tokens import end_tokens
from megatron_star.text.token_bytes import TokenBytes
from megatron_star.text.tokenizer import load_tokenizer

LIMITS = {"max_sequence_length": 2048, "budget_bytes_per_rank": 2 << 30}
PERSON = (
    '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, '
    '"roles": {"type": "array", "items": {"enum": ["captain", "cook", "mate"]}}}, '
    '"required": ["name", "age", "roles"], "additionalProperties": false}'
)
SCHEMAS = {
    "objects": f'{{"type": "array", "minItems": 500, "items": {PERSON}}}',
    "pattern": '{"type": "array", "minItems": 500, '
    '"items": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}}',
    "enum of 1000": '{"type": "array", "minItems": 500, "items": {"enum": ['
    + ", ".join(f'"value {i * 7919 % 10007}"' for i in range(1000))
    + "]}}",
}
Figures = dict[str, float]


class AtOnce(Executor):
    """Masks without overlap: in the engine's thread, when they are asked for."""

    def submit(self, function: Callable[..., object], *args: object) -> Future:
        """Done when this returns."""
        future: Future = Future()
        future.set_result(function(*args))
        return future


def library(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Llguidance:
    """For all schemas."""
    added = tokenizer.added_tokens_decoder.items()
    special = [token for token, piece in added if piece.special]
    texts = TokenBytes(tokenizer).of_all(num_tokens)
    vocabulary = Vocabulary(texts, special, list(end_tokens(tokenizer)))
    return Llguidance(vocabulary, lambda text: tokenizer.encode(text, add_special_tokens=False))


def compiled(library: Llguidance, schema: str) -> LlguidanceGrammar:
    """As the server compiles it."""
    return library.compile(grammar_text(GrammarSpec("json_schema", schema, "schema")))


def step_milliseconds(
    engine: StarEngine,
    tokenizer: PreTrainedTokenizerBase,
    grammar: LlguidanceGrammar | None,
    args: Namespace,
    num: int,
) -> float:
    """Of a step after the first, of so many sequences."""
    query = tokenizer.encode("Tell me about the crew of the ship.", add_special_tokens=False)
    sampling = SamplingParams(temperature=1.0, num_tokens_to_generate=args.tokens)
    answers = [
        engine.submit(
            StarRequest(
                context_tokens=[],
                query_tokens=query,
                sampling=sampling,
                seed=seed,
                grammar=grammar,
                speculate="off",
            )
        )
        for seed in range(num)
    ]
    while not all(answer.tokens for answer in answers):
        engine.step()
    start, num_steps = perf_counter(), 0
    while not all(answer.ended.is_set() for answer in answers):
        engine.step()
        num_steps += 1
    return 1e3 * (perf_counter() - start) / num_steps


def measure(
    engine: StarEngine,
    tokenizer: PreTrainedTokenizerBase,
    grammar: LlguidanceGrammar,
    args: Namespace,
    num: int,
) -> Figures:
    """Medians over rounds; what is added is the median of differences within rounds."""
    beside, rounds = engine._emission._mask_workers, []
    for _ in range(args.repeats):
        times = {"free": step_milliseconds(engine, tokenizer, None, args, num)}
        for name, workers in (("beside the step", beside), ("after the step", AtOnce())):
            engine._emission._mask_workers = workers
            times[name] = step_milliseconds(engine, tokenizer, grammar, args, num)
        engine._emission._mask_workers = beside
        rounds.append(times)
    added = {
        f"added ms, {name}": statistics.median(times[name] - times["free"] for times in rounds)
        for name in ("beside the step", "after the step")
    }
    return {"free ms": statistics.median(times["free"] for times in rounds), **added}


def compile_and_mask(library: Llguidance, schema: str, repeats: int) -> Figures:
    """Medians, in milliseconds: of a grammar, and of the masks of a walk through it."""
    compiling, masks = [], []
    for seed in range(repeats):
        start = perf_counter()
        matcher = compiled(library, schema).matcher(())
        compiling.append(1e3 * (perf_counter() - start))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            start = perf_counter()
            words = matcher.mask()
            masks.append(1e3 * (perf_counter() - start))
            bits = (words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
            allowed = bits.flatten().nonzero()[:, 0]
            matcher.accept([int(allowed[torch.randint(len(allowed), (1,), generator=generator)])])
    masks.sort()
    return {
        "compile ms": statistics.median(compiling),
        "mask ms": statistics.median(masks),
        "mask ms, 99 of 100": masks[int(0.99 * len(masks))],
    }


def run(args: Namespace, star_model: FastStarModel, groups: StarGroups) -> None:
    """All of it, on one rank."""
    tokenizer = load_tokenizer(read_checkpoint_info(args.load).tokenizer_directory)
    engine = StarEngine(star_model, tokenizer, groups.control, **LIMITS)
    grammars = library(tokenizer, star_model.vocab_size)
    results = {}
    for name, schema in SCHEMAS.items():
        results[name] = compile_and_mask(grammars, schema, args.repeats)
        for num in args.sequences:
            results[f"{name}, {num} sequences"] = measure(
                engine, tokenizer, compiled(grammars, schema), args, num
            )
    engine.stop()
    for name, figures in results.items():
        print(name, *(f"{figure} {value:.3f}" for figure, value in figures.items()), sep="; ")
    write_result(args.output, results, [])


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--tokens", type=positive, default=64, help="of an answer")
    parser.add_argument("--sequences", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=positive, default=9)


if __name__ == "__main__":
    run_on_ranks("structured.py", __doc__.splitlines()[0], add_arguments, run)
