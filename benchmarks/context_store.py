"""First token of a question about a document: encoded, and read from a context store after a restart.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/context_store.py --load .demo/megatron \\
        --num-tokens 6K --repeats 3 --output result.json

Each round starts an engine three times: without a store, with an empty one, which it fills, and with that.
The ranks stay, so that loading the model is in neither figure; files come from the system's cache, as they do
after a restart of the job on the same machine.
"""

import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks  # noqa: F401, I001  first, since it silences what Megatron-Core says at import
import torch
from megatron.core.inference.sampling_params import SamplingParams

from benchmarks.measuring import measure_rounds, medians, run_on_ranks
from megatron_star.algorithm.star_model import StarModel
from megatron_star.config import StarConfig
from megatron_star.engine.context_store import ContextStore
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.rank_store import RankStore
from megatron_star.engine.request import StarRequest
from megatron_star.job.argument_types import ArgumentParser, positive, token_count
from megatron_star.parallel.control import from_driver, is_driver
from megatron_star.parallel.groups import StarGroups
from megatron_star.store.folder import ContextFolder

NUM_QUERY_TOKENS = 64
ENCODED, FILLING, RESTORED = "encoded", "encoded and written", "restored"
Figures = dict[str, dict[str, float]]


class NoText:
    """A tokenizer for answers that nobody reads."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Nothing."""
        return ""


def add_arguments(parser: ArgumentParser) -> None:
    """How long, how often."""
    parser.add_argument("--num-tokens", type=token_count, default=6 << 10, metavar="TOKENS")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N")


def first_token(
    args: Namespace, star_model: StarModel, groups: StarGroups, folder: str | None
) -> dict[str, float]:
    """Seconds until the first token, and for writing what the store did not have; on workers, nothing."""
    ranks = RankStore(Path(folder), star_model, groups.model.tp.rank()) if folder else None
    if not is_driver(groups.control):
        run_worker(star_model, groups.control, ranks)
        return {}
    store = None
    if folder:
        sizes = {"cp_size": groups.cp.size(), "tp_size": groups.model.tp.size()}
        store = ContextStore(ContextFolder(folder, 1 << 40), {}, model="measured", **sizes), ranks
    limits = {"max_sequence_length": args.num_tokens + 128, "budget_bytes_per_rank": 1 << 40}
    engine = StarEngine(star_model, NoText(), groups.control, **limits, stores=store)
    torch.manual_seed(0)
    tokens = torch.randint(star_model.vocab_size, (args.num_tokens + NUM_QUERY_TOKENS,)).tolist()
    request = StarRequest(
        context_tokens=tokens[: args.num_tokens],
        query_tokens=tokens[args.num_tokens :],
        star=StarConfig(mode="exact"),
        sampling=SamplingParams(num_tokens_to_generate=1, top_k=1),
    )
    (result,) = engine.generate([request])
    start = perf_counter()
    engine.finish_storing()
    seconds = perf_counter() - start
    engine.stop()
    timings = result.timings
    return {"ttft_s": timings.ttft_s, "context_s": timings.context_encoding_s, "writing_s": seconds}


def measure(args: Namespace, star_model: StarModel, groups: StarGroups) -> Figures:
    """One round; on workers, nothing."""
    found: Figures = {}
    with TemporaryDirectory() as made:
        folder = from_driver(lambda: made, groups.control)
        for name, where in ((ENCODED, None), (FILLING, folder), (RESTORED, folder)):
            found[name] = first_token(args, star_model, groups, where)
    return found


def summarise(rounds: list[Figures]) -> Figures:
    """Medians; `sooner`: how many times as soon the first token comes as from encoding, in the same round."""
    rounds = [
        {
            name: figures | {"sooner": of_round[ENCODED]["ttft_s"] / figures["ttft_s"]}
            for name, figures in of_round.items()
            if figures
        }
        for of_round in rounds
    ]
    return medians(rounds)


def run(args: Namespace, star_model: StarModel, groups: StarGroups) -> None:
    """All rounds, and a line for each variant."""
    summary = measure_rounds(args, lambda: measure(args, star_model, groups), summarise)
    if is_driver(groups.control):
        for name, figures in summary.items():
            print(name, *(f"{figure}={value:.3f}" for figure, value in figures.items()))


if __name__ == "__main__":
    run_on_ranks("context_store.py", __doc__.splitlines()[0], add_arguments, run)
