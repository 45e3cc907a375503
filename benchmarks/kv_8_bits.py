"""Contexts in 8 bits beside contexts as computed: memory, the rate of decoding, and answers that stay right.

    OMP_NUM_THREADS=2 python benchmarks/kv_8_bits.py --load .demo/megatron --fp32 --num-tokens 8K \\
        --repeats 5 --samples 20 --length 4K --output result.json

On one rank. Tokens are generated after a context whose KV is filled with random numbers, on which the speed
does not depend, in turns. Then needles are asked for in contexts that are really encoded, exactly, once in
each format: the share kept of the answers that are right as computed.
"""

import statistics
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist
from tqdm import tqdm

from benchmarks.decode import filled_context, measure, star_step
from benchmarks.measuring import measure_rounds, median_ratio, run_on_ranks, write_result
from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.kv_formats import DTYPES
from megatron_star.attention.stored_kv import AS_COMPUTED
from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine
from megatron_star.evaluation.sample import greedy_request
from megatron_star.evaluation.scoring import MATCHING
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker
from megatron_star.job.argument_types import ArgumentParser, positive, token_count
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.kernel import kv_format_of
from megatron_star.parallel.groups import StarGroups
from megatron_star.speed.compiled_layers import compile_layers
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.text.tokenizer import load_tokenizer

COMPUTED, COMPILED = "as computed", ", compiled"
TASKS = ("niah_single_1", "niah_single_2")
Rates = dict[str, dict[str, float]]


def models(args: Namespace, star_model: FastStarModel) -> dict[str, FastStarModel]:
    """By name: as computed, and in each format that is asked for; with compiled layers too, if that is."""
    formats = {COMPUTED: AS_COMPUTED}
    formats |= {name: kv_format_of(star_model.model, name, star_model.device) for name in args.kv_dtypes}
    found = {name: replace(star_model, kv_format=form) for name, form in formats.items()}
    if args.compile:
        found |= {f"{name}{COMPILED}": compile_layers(model, (1,)) for name, model in found.items()}
    return found


def decode(args: Namespace, by_name: dict[str, FastStarModel]) -> tuple[list[Rates], Rates]:
    """Rounds in which each generates tokens, and their summary."""
    contexts = {
        name: filled_context(model, args.num_tokens)
        for name, model in by_name.items()
        if COMPILED not in name
    }
    kv_bytes = {name: context.num_bytes for name, context in contexts.items()}
    rounds: list[Rates] = []

    def measure_all() -> Rates:
        found = {}
        for name, model in by_name.items():
            context = name.removesuffix(COMPILED)
            found[name] = measure(star_step(model, contexts[context]), args.num_steps, model)
            found[name]["kv_mb"] = kv_bytes[context] / 1e6
        rounds.append(found)
        return found

    return rounds, measure_rounds(args, measure_all, summarise)


def summarise(rounds: list[Rates]) -> Rates:
    """Medians, and ratios to what is kept as computed, within a round."""
    summary = {}
    for name, last in rounds[-1].items():
        base = COMPUTED + (COMPILED if name.endswith(COMPILED) else "")
        summary[name] = {
            "kv_mb": last["kv_mb"],
            "memory": last["kv_mb"] / rounds[-1][base]["kv_mb"],
            "tpot_ms": 1e3 * statistics.median(r[name]["tpot_s"] for r in rounds),
            "faster": median_ratio(rounds, base, name, "tpot_s"),
            "fewer_processor_seconds": median_ratio(rounds, base, name, "processor_s"),
        }
    return summary


def needles(
    args: Namespace, star_model: StarModel, groups: StarGroups, names: list[str]
) -> dict[str, dict[str, float]]:
    """For each format, answers that are right and those that are as well as computed, of all."""
    tokenizer = load_tokenizer(read_checkpoint_info(args.load).tokenizer_directory)
    maker = SampleMaker(tokenizer, TaskFiles(), chat=tokenizer.chat_template is not None)
    star = StarConfig(mode="exact")
    keys = [
        SampleKey(NamedTask.parse(task), args.length, index)
        for task in TASKS
        for index in range(args.samples)
    ]
    samples = [maker.make(key) for key in keys]
    right: dict[str, list[float]] = {}
    for name in (COMPUTED, *names):
        form = AS_COMPUTED if name == COMPUTED else kv_format_of(star_model.model, name, star_model.device)
        engine = StarEngine(
            replace(star_model, kv_format=form),
            tokenizer,
            groups.control,
            max_sequence_length=2 * args.length,
            budget_bytes_per_rank=4 << 30,
        )
        right[name] = []
        for key, sample in zip(tqdm(keys, desc=name, disable=None), samples, strict=True):
            [result] = engine.generate([greedy_request(tokenizer, sample, star, chat=maker.chat)])
            engine.scheduler.drop_unused_contexts()
            right[name].append(MATCHING[key.named.task.matching](result.text, sample.references))
        engine.stop()
    return {name: _kept(scores, right[COMPUTED]) for name, scores in right.items()}


def _kept(scores: list[float], computed: list[float]) -> dict[str, float]:
    kept = [score for score, before in zip(scores, computed, strict=True) if before == 1]
    return {
        "right": sum(scores) / len(scores),
        "kept": sum(score == 1 for score in kept) / max(1, len(kept)),
        "answers": len(scores),
    }


def run(args: Namespace, star_model: FastStarModel, groups: StarGroups) -> None:
    """All rounds, the needles, and a table."""
    assert star_model.exchange.cp_size == 1, "this is for one rank"
    rounds, summary = decode(args, models(args, star_model))
    if args.samples:
        for name, figures in needles(args, star_model, groups, args.kv_dtypes).items():
            summary[name] |= figures
        write_result(args.output, summary, rounds)
    titles = ("kv_mb", "memory", "tpot_ms", "faster", "fewer_processor_seconds", "right", "kept", "answers")
    print(f"{'contexts':<22}" + "".join(f"{title:>25}" for title in titles))
    for name, figures in summary.items():
        print(f"{name:<22}" + "".join(f"{figures.get(title, float('nan')):>25.3f}" for title in titles))
    assert dist.get_world_size() == 1


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument(
        "--num-tokens", type=token_count, default=8192, metavar="TOKENS", help="decoded after"
    )
    parser.add_argument("--num-steps", type=positive, default=16, metavar="N", help="tokens in a round")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N")
    parser.add_argument("--compile", action="store_true", help="measure compiled layers too")
    parser.add_argument(
        "--kv-dtypes", nargs="+", choices=DTYPES, default=["int8"], help="formats that are compared"
    )
    parser.add_argument("--length", type=token_count, default=4096, metavar="TOKENS", help="of a needle task")
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="of each of both; 0: none")


if __name__ == "__main__":
    run_on_ranks("kv_8_bits.py", __doc__.splitlines()[0], add_arguments, run)
