"""What tests ask a running engine about prompts alone, importable by its process. Each returns plain data."""

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.inference.sampling_params import SamplingParams
from models import random_tokens
from ranks import ENGINE_LIMITS, NumbersAsText, load

from megatron_star.algorithm.star_model import StarModel
from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.engine.thread import EngineThread
from megatron_star.parallel.groups import StarGroups

NO_TOKENS = SamplingParams(num_tokens_to_generate=0)
FEW_TOKENS = SamplingParams(num_tokens_to_generate=5, top_k=1)


def encoded_ahead(engine: EngineThread) -> dict:
    """A context that is encoded without a question, then asked; and a request of nothing at all."""
    context = random_tokens(700, seed=3)
    ahead = StarRequest(
        context_tokens=context, query_tokens=[], star=StarConfig(block_size=200), sampling=NO_TOKENS
    )
    first = engine.submit(ahead).result(60)
    again = engine.submit(ahead).result(60)
    nothing = engine.submit(replace(ahead, context_tokens=[])).result(60)
    question = replace(ahead, query_tokens=random_tokens(9, seed=4), sampling=FEW_TOKENS)
    asked = engine.submit(question).result(60)
    return {
        "results": [first, again, nothing, asked],
        "running": engine.stats()["running"],
        "encodings": engine.stats()["context_encodings"],
    }


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
