"""How much of the exchanges of encoding is hidden under attention, on an artificial link.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/overlap.py --load .demo/megatron \\
        --num-tokens 8K --block-size 1K --gigabytes-per-second 1 --output result.json

A source arrives at a rank when the link, which carries one source after the other, has had time for it; an
all-gather of passed keys, when it has had time for those of all other ranks. Waiting takes no processor time,
as with a network card. `overlapped` is the product; `blocking` waits for each exchange as soon as it is
begun. Hidden is what of the time on the link was not spent waiting. Star, and then star with passed keys.
"""

import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter, sleep

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.encoding_variants import BROADCAST, PASSED, engine_wave_tokens, variant_plan
from benchmarks.measuring import measure_rounds, medians, over_ranks, run_on_ranks
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.kv_layout import KeyValue
from megatron_star.job.argument_types import ArgumentParser, token_count
from megatron_star.parallel.control import is_driver
from megatron_star.parallel.exchange import Exchange, SourceTransfers
from megatron_star.parallel.groups import StarGroups
from megatron_star.planning.cost_model import token_costs
from megatron_star.planning.plan import ContextPlan, Source


class LinkedExchange(Exchange):
    """An exchange whose sources come over a link of so many bytes a second."""

    def __init__(self, cp_group: dist.ProcessGroup, bytes_per_second: float, *, blocking: bool) -> None:
        super().__init__(cp_group)
        self.bytes_per_second, self.blocking = bytes_per_second, blocking
        self.seconds_on_the_link = self.seconds_waited = 0.0

    def broadcast_sources(
        self, sources: Sequence[Source], read: Callable[[Source], KeyValue], like: KeyValue
    ) -> SourceTransfers:
        """See `Exchange`."""
        return LinkedTransfers(self, sources, read, like)

    def start_gather(self, mine: Tensor, kind: str) -> Callable[[], Tensor]:
        """See `Exchange`."""
        receive = super().start_gather(mine, kind)
        arrival = perf_counter() + self.seconds_of((self.cp_size - 1) * mine.nbytes)
        if self.blocking:
            self.wait_until(arrival)

        def arrived() -> Tensor:
            self.wait_until(arrival)
            return receive()

        return arrived

    def seconds_of(self, num_bytes: int) -> float:
        """That the link takes for so many bytes, which it is given now."""
        seconds = num_bytes / self.bytes_per_second
        self.seconds_on_the_link += seconds
        return seconds

    def wait_until(self, moment: float) -> None:
        """Sleep, if it has not come yet."""
        start = perf_counter()
        if moment > start:
            sleep(moment - start)
            self.seconds_waited += perf_counter() - start


class LinkedTransfers(SourceTransfers):
    """What `LinkedExchange` starts."""

    def __init__(self, exchange: LinkedExchange, sources: Sequence[Source], *arguments) -> None:
        self.arrivals: deque[float] = deque()
        self.link_is_free_at = 0.0
        super().__init__(exchange, sources, *arguments)

    def receive(self) -> KeyValue:
        """See `SourceTransfers`."""
        self.exchange.wait_until(self.arrivals.popleft())
        return super().receive()

    def _start_next(self) -> None:
        source = self.waiting[0] if self.waiting else None
        super()._start_next()
        if source is None:
            return
        if source.owner == self.exchange.cp_rank:
            self.arrivals.append(0.0)
            return
        seconds = self.exchange.seconds_of(self.in_flight[-1][1].nbytes)
        self.link_is_free_at = max(self.link_is_free_at, perf_counter()) + seconds
        self.arrivals.append(self.link_is_free_at)
        if self.exchange.blocking:
            self.exchange.wait_until(self.link_is_free_at)


def measure(
    star_model: StarModel, token_ids: list[int], plan: ContextPlan, exchange: LinkedExchange
) -> dict[str, float]:
    """Seconds of one encoding, on the link and waiting; of the rank that waits most."""
    star_model = replace(star_model, exchange=exchange)
    exchange.seconds_on_the_link = exchange.seconds_waited = 0.0
    dist.barrier()
    start = perf_counter()
    encode_context(star_model, token_ids, plan)
    star_model.synchronize()
    figures = {
        "seconds": perf_counter() - start,
        "on_the_link_s": exchange.seconds_on_the_link,
        "waited_s": exchange.seconds_waited,
    }
    most = {name: over_ranks(value, dist.ReduceOp.MAX, star_model) for name, value in figures.items()}
    return most | {"hidden": 1 - most["waited_s"] / most["on_the_link_s"]}


def run(args: Namespace, star_model: StarModel, groups: StarGroups) -> None:
    """All rounds, and the result on rank 0."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(star_model.vocab_size, (args.num_tokens,), generator=generator).tolist()
    sizes = {"block_size": args.block_size, "wave_tokens": engine_wave_tokens(star_model.device)}
    cp_size, costs = star_model.exchange.cp_size, token_costs(star_model.model.config)
    plans = {
        prefix: variant_plan(variant, args.num_tokens, cp_size, costs, **sizes)
        for prefix, variant in (("", BROADCAST), ("passed, ", PASSED))
    }
    exchanges = {
        name: LinkedExchange(groups.cp, args.gigabytes_per_second * 1e9, blocking=name == "blocking")
        for name in ("overlapped", "blocking")
    }
    summary = measure_rounds(
        args,
        lambda: {
            prefix + name: measure(star_model, token_ids, plan, exchange)
            for prefix, plan in plans.items()
            for name, exchange in exchanges.items()
        },
        medians,
    )
    if not is_driver(dist.group.WORLD):
        return
    print(f"{'':<20}" + "".join(f"{title:>15}" for title in summary["overlapped"]))
    for name, figures in summary.items():
        print(f"{name:<20}" + "".join(f"{figure:>15.3f}" for figure in figures.values()))


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--num-tokens", type=token_count, default=8192, metavar="TOKENS")
    parser.add_argument("--block-size", type=token_count, default=1024, metavar="TOKENS")
    parser.add_argument("--gigabytes-per-second", type=float, default=1.0, metavar="GB")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")


if __name__ == "__main__":
    run_on_ranks("overlap.py", __doc__.splitlines()[0], add_arguments, run)
