"""What the ranks of the evaluation's distributed tests run; importable by their processes."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch.distributed as dist
from ranks import ENGINE_LIMITS, load

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.request import StarRequest
from megatron_star.evaluation.comparison import (
    ComparedPrompt,
    Comparison,
    ExactAnswer,
    answer_exactly,
    compare,
)
from megatron_star.evaluation.hidden_attention import hidden_masses
from megatron_star.job.job import Job
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.parallel.control import on_driver
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.programs import calibrate, calibration_input, evaluate, evaluation_output
from megatron_star.text.tokenizer import load_tokenizer


def greedy_answers(checkpoint: str, tokenizer, requests: Sequence[StarRequest]) -> list[list[int]]:
    """The driver's tokens for all requests, asked together; workers return nothing."""
    star_model, groups = load(checkpoint, 1)
    if dist.get_rank():
        run_worker(star_model, groups.control)
        return []
    engine = StarEngine(star_model, tokenizer, groups.control, **ENGINE_LIMITS)
    results = engine.generate(requests)
    engine.stop()
    return [result.tokens for result in results]


def masses(
    checkpoint: str, token_ids: Sequence[int], settings: Sequence[StarConfig], positions: Sequence[int]
) -> list[float]:
    """`hidden_masses` of each setting, under exact attention."""
    star_model, _ = load(checkpoint, 1)

    def plan(star: StarConfig):
        costs = token_costs(star_model.model.config)
        return choose_plan(len(token_ids), star_model.exchange.cp_size, star, costs)[1]

    exact = encode_context(
        star_model, token_ids, plan(StarConfig(mode="exact", wave_tokens=20)), keeps_all=True
    )
    return hidden_masses(star_model, token_ids, exact, [plan(star).mask for star in settings], positions)


def comparisons(
    checkpoint: str, prompt: ComparedPrompt, settings: Mapping[str, StarConfig]
) -> tuple[ExactAnswer, dict[str, Comparison]]:
    """`answer_exactly`, then `compare` for each setting, on every rank."""
    star_model, groups = load(checkpoint, 1)
    exact = answer_exactly(star_model, prompt, settings, groups.control)
    return exact, {
        name: compare(star_model, prompt, exact, star, groups.control) for name, star in settings.items()
    }


def job_of(checkpoint: str) -> Job:
    """What `loaded_job` gives."""
    star_model, groups = load(checkpoint, 1)
    info, budget = read_checkpoint_info(checkpoint), ENGINE_LIMITS["budget_bytes_per_rank"]
    return Job(groups, info, star_model, budget, load_tokenizer(info.tokenizer_directory))


def run_evaluate(checkpoint: str, arguments: list[str]) -> None:
    """What evaluate.py does, on a model that is loaded already."""
    job, args = job_of(checkpoint), evaluate.parse_arguments(arguments)
    with ExitStack() as held:
        output = on_driver(lambda: evaluation_output.open_output(args, held), job.groups.control)
        evaluate.run_evaluation(args, job, output)


def run_calibrate(checkpoint: str, arguments: list[str]) -> None:
    """What calibrate.py does, on a model that is loaded already."""
    job, args = job_of(checkpoint), calibrate.parse_arguments(arguments)
    with ExitStack() as held:
        given = on_driver(lambda: calibration_input.read_input(args, held), job.groups.control)
        calibrate.calibrate(args, job, given)
