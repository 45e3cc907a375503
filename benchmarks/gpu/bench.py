"""What the stages of the GPU check share: where figures go, the time that is left, clocks, and models."""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from benchmarks.models import SHAPES, Shape, random_star_model
from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.kernels import KERNELS
from megatron_star.config import StarConfig
from megatron_star.parallel.groups import StarGroups, initialize_groups
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.planning.hardware import GPUS, MATMUL_SHARE, MEMORY_SHARE, Gpu
from megatron_star.planning.plan import ContextPlan, TokenCosts

FIRST_FLOPS_PER_SECOND = 3e14
"""What a GPU is taken to do until it has shown it."""


class OutOfTime(BaseException):
    """The budget is spent. No Exception, so that no stage takes it for a figure that failed."""


class Figures:
    """A line of JSON for each figure, on stdout and in a file, there as soon as it is known."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a") if path else None
        self._start = monotonic()

    def write(self, stage: str, name: str, **figures: Any) -> None:
        """Also if this process is killed right after."""
        row = {"t": round(monotonic() - self._start, 1), "stage": stage, "name": name} | figures
        line = json.dumps(row, default=str)
        print(line, flush=True)
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


class Bench:
    """One device, and what is measured on it.

    Attributes:
        dtype: of weights and KV.
        unit: tokens. Contexts are of 4, 16 and 128 units; of 8,192 tokens, these are 32K, 128K and 1M.
    """

    def __init__(
        self, figures: Figures, *, device: torch.device, model: str, unit: int, kernel: str, budget_s: float
    ) -> None:
        self.figures, self.device, self.model_name, self.unit = figures, device, model, unit
        self.dtype, self.kernel = torch.bfloat16, kernel
        self._end = monotonic() + budget_s
        self._flops_per_second = FIRST_FLOPS_PER_SECOND if device.type == "cuda" else torch.inf
        self._star_model: StarModel | None = None
        transformers_logging.disable_progress_bar()

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return SHAPES[self.model_name]

    def seconds_left(self) -> float:
        """Of the budget."""
        return self._end - monotonic()

    def has_time_for(self, flops: float, repeats: int = 1) -> bool:
        """Whether so many operations fit what is left, at the best rate so far, with seconds to spare."""
        return repeats * flops / self._flops_per_second + 5 < self.seconds_left()

    def reached(self, flops: float, seconds: float) -> dict[str, float]:
        """TFLOP/s as a figure; `has_time_for` learns from it."""
        if self.device.type == "cuda":
            best = 0.0 if self._flops_per_second == FIRST_FLOPS_PER_SECOND else self._flops_per_second
            self._flops_per_second = max(best, flops / seconds)
        found = {"tflops": flops / seconds / 1e12}
        return found | ({"of_peak": flops / seconds / self.peak_flops} if self.peak_flops else {})

    @property
    def peak_flops(self) -> float | None:
        """Of the card's data sheet, per second, if it is known."""
        return self._card.matmul_flops_per_s / MATMUL_SHARE if self._card else None

    @property
    def memory_bytes_per_second(self) -> float | None:
        """The same for its memory."""
        return self._card.memory_bytes_per_s / MEMORY_SHARE if self._card else None

    @cached_property
    def _card(self) -> Gpu | None:
        if self.device.type != "cuda":
            return None
        card = torch.cuda.get_device_name(self.device).lower()
        return next((gpu for name, gpu in GPUS.items() if name in card), None)

    @contextmanager
    def figure(self, stage: str, name: str) -> Iterator[dict[str, Any]]:
        """A line with what the block adds; one that raises costs this figure, and its message is the line."""
        found: dict[str, Any] = {}
        try:
            yield found
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        self.figures.write(stage, name, **found)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(
        self, work: Callable[[], object], *, repeats: int = 1, warm: int = 0, calls: int = 1
    ) -> float:
        """The median over `repeats` of the time of a call, of `calls` one behind the other."""
        for _ in range(warm):
            work()
        times = []
        for _ in range(repeats):
            self.synchronize()
            start = perf_counter()
            for _ in range(calls):
                work()
            self.synchronize()
            times.append((perf_counter() - start) / calls)
        return statistics.median(times)

    def kernels(self, head_size: int = 128) -> list[str]:
        """Attention kernels that can run here, by name."""
        return [
            name
            for name, info in KERNELS.items()
            if info.device_type == self.device.type
            and not info.obstacle(self.device, self.dtype, head_size)
            and info.is_installed
        ]

    @cached_property
    def groups(self) -> StarGroups:
        """Of one rank."""
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return initialize_groups(tp_size=1, cp_size=1)

    @property
    def star_model(self) -> StarModel:
        """The model with random weights; loaded when it is first asked for."""
        if self._star_model is None:
            self._star_model = self.random_model(self.shape)
        return self._star_model

    def random_model(self, shape: Shape) -> StarModel:
        """A model of another shape, with the same kernel."""
        kernel = {"device": self.device, "dtype": self.dtype, "kernel": self.kernel}
        return random_star_model(shape, self.groups, **kernel)

    def forget_models(self) -> None:
        """Give their memory back."""
        self._star_model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokens(self, count: int) -> list[int]:
        """Random tokens of the model."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.shape["vocab_size"], (count,), generator=generator).tolist()


def written(num_tokens: int) -> str:
    """A number of tokens as `parse_token_count` reads it."""
    for suffix, size in (("M", 1 << 20), ("K", 1 << 10)):
        if num_tokens and num_tokens % size == 0:
            return f"{num_tokens // size}{suffix}"
    return str(num_tokens)


def plan_of(
    star_model: StarModel, num_tokens: int, cp_size: int = 1, **options: Any
) -> tuple[ContextPlan, TokenCosts]:
    """A plan for so many tokens, and what it costs; options are those of `StarConfig`."""
    costs = token_costs(star_model.model.config)
    return choose_plan(num_tokens, cp_size, StarConfig(**options), costs)[1], costs
