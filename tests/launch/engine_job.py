"""A job that an engine keeps busy until it is killed: `engine_job.py CHECKPOINT idle|encoding|decoding`.

The driver prints "ready" when it is in the middle of that.
"""

import sys
from datetime import timedelta

import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.request import StarRequest
from megatron_star.engine.thread import EngineThread
from megatron_star.job.environment import read_environment
from megatron_star.job.grid import Grid
from megatron_star.job.loading import load_star_model
from megatron_star.job.session import end_process, exit_on_errors, process_groups
from megatron_star.model.checkpoint import read_checkpoint_info


class NoText:
    """A tokenizer for tokens that nobody reads."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Nothing."""
        return ""


def keep_busy(engine: EngineThread, kind: str) -> None:
    """Submit work of this kind for ever."""
    engine.start(lambda error: end_process(0, error))
    num_context, num_tokens = {"idle": (1, 1), "encoding": (8000, 1), "decoding": (50, 8000)}[kind]
    seed = 0
    while True:
        request = StarRequest(
            context_tokens=torch.randint(0, 250, (num_context,)).tolist(),
            query_tokens=[1],
            star=StarConfig(mode="exact", wave_tokens=200),
            sampling=SamplingParams(num_tokens_to_generate=num_tokens, top_k=1),
            seed=seed,
        )
        answer = engine.submit(request)
        if kind == "encoding":
            while answer.num_encoded_tokens == 0:
                pass
        else:
            next(iter(answer))
        print("ready", flush=True)
        answer.result()
        if kind == "idle":
            sys.stdin.read()
        seed += 1


environment = read_environment()
with exit_on_errors(environment.rank):
    grid = Grid(tp_size=1, cp_size=environment.world_size)
    with process_groups(environment, grid, timeout=timedelta(minutes=10)) as (groups, device):
        info = read_checkpoint_info(sys.argv[1])
        star_model = load_star_model(info, groups, device=device, dtype=torch.float32)
        if not environment.is_driver:
            run_worker(star_model, groups.control)
        else:
            limits = {"max_sequence_length": 8192, "budget_bytes_per_rank": 1 << 30}
            engine = StarEngine(star_model, NoText(), groups.control, **limits)
            keep_busy(EngineThread(engine), sys.argv[2])
