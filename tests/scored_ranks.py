"""Scores of prompts, as ranks make them; importable by their processes. Each returns plain data."""

import torch
import torch.distributed as dist
from ranks import ENGINE_LIMITS, NumbersAsText, load

from megatron_star.algorithm.star_model import StarModel
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.parallel.groups import StarGroups


def scored(
    checkpoint: str, tp_size: int, requests: list[StarRequest]
) -> list[tuple[StarResult, list | None]]:
    """Results of requests that run side by side, and scores of their prompts. Workers return nothing."""
    star_model, groups = load(checkpoint, tp_size)
    return _scored(star_model, groups, requests)


def scored_by_damaged_weights(checkpoint: str, request: StarRequest) -> list[tuple[StarResult, list | None]]:
    """The same, with a weight that is no number."""
    star_model, groups = load(checkpoint, 1)
    star_model.model.decoder.layers[-1].mlp.linear_fc2.weight.data[0, 0] = torch.nan
    return _scored(star_model, groups, [request])


def _scored(
    star_model: StarModel, groups: StarGroups, requests: list[StarRequest]
) -> list[tuple[StarResult, list | None]]:
    if dist.get_rank():
        run_worker(star_model, groups.control)
        return []
    engine = StarEngine(star_model, NumbersAsText(), groups.control, **ENGINE_LIMITS)
    answers = [engine.submit(request) for request in requests]
    while not all(answer.ended.is_set() for answer in answers):
        engine.step()
    results = [answer.result() for answer in answers]
    engine.stop()
    scores = [a.prompt_scores.to_list() if a.prompt_scores and not a.error else None for a in answers]
    return list(zip(results, scores, strict=True))
