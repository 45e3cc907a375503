"""What tests ask a running engine about prompts alone, importable by its process. Each returns plain data."""

from dataclasses import replace

from megatron.core.inference.sampling_params import SamplingParams
from models import random_tokens

from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest
from megatron_star.engine.thread import EngineThread

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
