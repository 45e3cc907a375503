"""What tests of attention maps do with an engine; importable by its rank's process."""

from dataclasses import replace

from megatron.core.inference.sampling_params import SamplingParams
from models import random_tokens
from ranks import load
from speculation_ranks import VOCAB_SIZE, Always, HalfRight

from megatron_star.algorithm.attention_map import Looks, observe
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.token_generation import Sequence
from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.engine.scheduled_request import Stage
from megatron_star.engine.thread import EngineThread
from megatron_star.planning.plan import ContextPlan

CONTEXT = random_tokens(900)


def ask(num_context: int, seed: int, *, num_tokens: int = 12, attention_map: bool = True) -> StarRequest:
    """A query of its own, longer than what is fed at once beside others."""
    return StarRequest(
        context_tokens=CONTEXT[:num_context],
        query_tokens=random_tokens(40, seed=seed),
        star=StarConfig(mode="exact"),
        sampling=SamplingParams(num_tokens_to_generate=num_tokens, top_k=1),
        attention_map=attention_map,
    )


REQUESTS = [
    ask(600, 1),
    ask(600, 2, num_tokens=60, attention_map=False),
    ask(900, 3),  # its context extends the one before
    ask(0, 4),
    ask(600, 5),
]


def beside_others(engine: EngineThread) -> tuple[list[StarResult], list[StarResult], dict]:
    """Answers to all requests at once, with tokens that are guessed, and to each alone; and what is left."""
    alone = [engine.submit(request).result(60) for request in REQUESTS]
    known = {tuple(asked.query_tokens): got.tokens for asked, got in zip(REQUESTS, alone, strict=True)}
    engine.engine.speculation = Always(HalfRight(known), VOCAB_SIZE)
    answers = [engine.submit(request) for request in REQUESTS]
    together = [answer.result(60) for answer in answers]
    return together, alone, engine.stats()


def cancelled_while_mapped(engine: StarEngine) -> tuple[list[StarResult], int]:
    """Of two answers, the first is cancelled when a part of its map is made."""
    first, second = (engine.submit(replace(ask(600, seed), min_tokens=0)) for seed in (1, 2))
    busy = engine.submit(ask(600, 3, num_tokens=200, attention_map=False))
    while first.stage < Stage.MAPPING:
        engine.step()
    engine.step()
    first.cancel()
    while not (first.ended.is_set() and second.ended.is_set()):
        engine.step()
    busy.cancel()
    engine.step()
    return [first.result(), second.result()], engine.stats()["running"]


def looks_with_programs(checkpoint: str) -> list[Looks]:
    """Of the same rows, without programs and where there are some for so many rows."""
    star_model, _ = load(checkpoint, 1)
    plan = ContextPlan.build(300, star_model.exchange.cp_size, StarConfig(mode="exact"))
    context, looks = encode_context(star_model, CONTEXT[:300], plan), []
    for compiled_rows in ((), (8,)):
        model = replace(star_model, compiled_rows=compiled_rows)
        looks.append(observe(model, Sequence(context, tail_rank=0), CONTEXT[300:307], range(7)))
    return looks
