"""Why star loses a needle: parts of star's KV are put in the place of exact's, and the answer is looked at.

    OMP_NUM_THREADS=2 python benchmarks/lost_needles.py --load .demo/megatron --length 4K \\
        --block-sizes 1K 512 --samples 12 --output lost_needles.json

Each context is encoded on one rank, exactly and as star. A mixture of both is then asked the question, and
shown the right answer (teacher forcing): is its most likely token right at every place, and how likely is the
whole answer? Shapes: n context tokens, b = 1, ng KV heads, hn head size.
"""

import statistics
import sys
from argparse import Namespace
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from benchmarks.measuring import run_on_ranks, write_result
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.tail import Tail
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.attention.stored_kv import ComputedPiece, HeldKv
from megatron_star.config import StarConfig
from megatron_star.engine.executor import planner_of
from megatron_star.evaluation.comparison import forced_logits
from megatron_star.evaluation.sample import prompt_tokens
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker
from megatron_star.job.argument_types import ArgumentParser, positive, token_count
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.parallel.groups import StarGroups
from megatron_star.planning.plan import ContextPlan
from megatron_star.text.tokenizer import load_tokenizer

LAYER_GROUPS = 5


class MixedContext(EncodedContext):
    """A context on one rank, with KV [tokens, 1, ng, hn] of each layer that was made elsewhere."""

    def __init__(self, plan: ContextPlan, layers: dict[int, KeyValue]) -> None:
        super().__init__(plan, cp_rank=0)
        self.layers = layers

    def held(self, layer_number: int, num_contiguous: int = 0, end: int | None = None) -> Iterator[HeldKv]:
        """All of a layer."""
        yield ComputedPiece(*self.layers[layer_number])

    def reserve_spare(self, tail: Tail) -> bool:
        """Never: there is no spare capacity."""
        return False


class Mixture(NamedTuple):
    """Star's KV of some tokens in some layers, and exact's everywhere else.

    Attributes:
        of_star: [n], true for the tokens whose KV is star's.
        layers: in which it is; None for all.
        keys, values: which of the two are star's.
        seen: [n], true for the tokens that the question sees; None for all.
    """

    of_star: Tensor
    layers: range | None = None
    keys: bool = True
    values: bool = True
    seen: Tensor | None = None

    def mixed(self, exact: EncodedContext, star: EncodedContext, num_layers: int) -> MixedContext:
        """Of two encodings of one context by one rank."""
        return MixedContext(star.plan, {n: self._layer(n, exact, star) for n in range(1, num_layers + 1)})

    def _layer(self, layer_number: int, exact: EncodedContext, star: EncodedContext) -> KeyValue:
        in_layer = self.layers is None or layer_number in self.layers
        (of_exact,), (of_star,) = exact.held(layer_number), star.held(layer_number)
        mixed = []
        for is_taken, exacts, stars in zip((self.keys, self.values), of_exact, of_star, strict=True):
            both = torch.where(self.of_star[:, None, None, None], stars, exacts)
            chosen = both if is_taken and in_layer else exacts
            mixed.append(chosen if self.seen is None else chosen[self.seen])
        return tuple(mixed)


def mixtures(plan: ContextPlan, needle: int, num_layers: int) -> dict[str, Mixture]:
    """What is tried with star's plan of a context and the position of its needle."""
    blocks = torch.tensor(
        [bisect_right(plan.mask.block_edges, position) - 1 for position in range(plan.num_tokens)]
    )
    everywhere, nowhere = blocks >= 0, blocks < 0
    of_needle, last = blocks[needle], plan.num_blocks - 1
    groups = range(0, num_layers, -(-num_layers // LAYER_GROUPS))
    return {
        "exact": Mixture(nowhere),
        "star": Mixture(everywhere),
        "star's keys only": Mixture(everywhere, values=False),
        "star's values only": Mixture(everywhere, keys=False),
        **{
            f"star in layers {first + 1} to {min(first + groups.step, num_layers)} only": Mixture(
                everywhere, layers=range(first + 1, first + groups.step + 1)
            )
            for first in groups
        },
        "star before the needle's block only": Mixture(blocks < of_needle),
        "star in the needle's block only": Mixture(blocks == of_needle),
        "star after the needle's block only": Mixture(blocks > of_needle),
        "star but for the last block": Mixture(blocks < last),
        "star, anchor's and needle's block seen": Mixture(
            everywhere, seen=(blocks == 0) | (blocks == of_needle)
        ),
    }


class Outcome(NamedTuple):
    """Whether the right answer is the most likely one at every place, and its log-probability, in nats."""

    right: bool
    log_probability: float


def outcome(star_model: StarModel, context: EncodedContext, query: list[int], answer: list[int]) -> Outcome:
    """Of one context, shown the answer."""
    logits = forced_logits(star_model, context, query, answer).cpu()
    expected = torch.tensor(answer)
    log_probabilities = logits.log_softmax(-1).gather(1, expected[:, None])
    return Outcome(bool((logits.argmax(-1) == expected).all()), float(log_probabilities.sum()))


def position_of(part: list[int], whole: list[int]) -> int:
    """Where these tokens begin among the others, for the first time; raises ValueError if nowhere."""
    for i in range(len(whole) - len(part) + 1):
        if whole[i : i + len(part)] == part:
            return i
    raise ValueError("the context does not hold the answer's tokens: --tasks takes needle tasks (niah_*)")


@torch.inference_mode()
def outcomes(
    star_model: StarModel, maker: SampleMaker, key: SampleKey, block_sizes: list[int]
) -> Iterator[tuple[int, dict[str, Outcome]]]:
    """For each block size, what came of each mixture; nothing if exact does not know the answer."""
    sample, tokenizer = maker.make(key), maker.tokenizer
    token_ids, query = prompt_tokens(tokenizer, sample, sample.context, chat=maker.chat)
    answer = tokenizer.encode(f" {sample.references[0]}", add_special_tokens=False)
    needle = position_of(tokenizer.encode(sample.references[0], add_special_tokens=False), token_ids)
    planner, num_layers = planner_of(star_model), star_model.model.config.num_layers

    def encoded(star: StarConfig) -> EncodedContext:
        return encode_context(star_model, token_ids, planner.plan(len(token_ids), star).plan)

    exact = encoded(StarConfig(mode="exact"))
    if not outcome(star_model, exact, query, answer).right:
        return
    for block_size in block_sizes:
        star = encoded(StarConfig(block_size=block_size))
        tried = mixtures(star.plan, needle, num_layers)
        yield (
            block_size,
            {
                name: outcome(star_model, mixture.mixed(exact, star, num_layers), query, answer)
                for name, mixture in tried.items()
            },
        )


def run(args: Namespace, star_model: StarModel, _: StarGroups) -> None:
    """All samples, and a table for each block size.

    Raises:
        ValueError: there is more than one rank, a task hides no needle, or exact solves no sample.
    """
    if dist.get_world_size() > 1:
        raise ValueError(f"{dist.get_world_size()} ranks: this runs on one, without torchrun")
    tokenizer = load_tokenizer(read_checkpoint_info(args.load).tokenizer_directory)
    maker = SampleMaker(tokenizer, TaskFiles(), chat=True)
    keys = [SampleKey(task, args.length, index) for index in range(args.samples) for task in args.tasks]
    found: dict[int, list[dict[str, Outcome]]] = {block_size: [] for block_size in args.block_sizes}
    for key in tqdm(keys, mininterval=0.1 if sys.stderr.isatty() else 30):
        for block_size, by_mixture in outcomes(star_model, maker, key, args.block_sizes):
            found[block_size].append(by_mixture)
    if not any(found.values()):
        raise ValueError("exact solves none of these samples: there is nothing that star could lose")
    summary = {str(block_size): summarized(results) for block_size, results in found.items()}
    for block_size, by_mixture in summary.items():
        print(f"\nblocks of {block_size}: {len(found[int(block_size)])} samples that exact solves")
        print(f"{'':<42}{'right':>8}{'log p':>8}")
        for name, figures in by_mixture.items():
            print(f"{name:<42}{figures['right']:>8.0%}{figures['log_probability']:>8.2f}")
    write_result(args.output, summary, found)


def summarized(results: list[dict[str, Outcome]]) -> dict[str, dict[str, float]]:
    """The means over samples."""
    return {
        name: {
            "right": statistics.mean(float(by_mixture[name].right) for by_mixture in results),
            "log_probability": statistics.mean(by_mixture[name].log_probability for by_mixture in results),
        }
        for name in results[0]
    }


def add_arguments(parser: ArgumentParser) -> None:
    """Which samples, and which blocks."""
    tasks = [NamedTask.parse(name) for name in ("niah_single_1", "niah_single_2")]
    parser.add_argument("--tasks", nargs="+", type=NamedTask.parse, default=tasks, metavar="TASK")
    parser.add_argument("--length", type=token_count, default=4096, metavar="TOKENS")
    parser.add_argument("--block-sizes", nargs="+", type=token_count, default=[1024, 512], metavar="TOKENS")
    parser.add_argument("--samples", type=positive, default=12, metavar="N", help="of each task")


if __name__ == "__main__":
    run_on_ranks("lost_needles.py", __doc__.splitlines()[0], add_arguments, run)
