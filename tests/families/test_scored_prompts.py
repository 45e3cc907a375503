"""How likely prompts are where attention is not plain: windows, sinks, soft caps, latents, experts."""

import pytest
import torch
from cases import NUM_CONTEXT, NUM_QUERY
from dense import unmasked_logits
from distributed import run_ranks
from megatron.core.inference.sampling_params import SamplingParams
from random_models import VOCAB_SIZE
from scored_ranks import scored

from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest

TOKENS = torch.randint(
    VOCAB_SIZE, (NUM_CONTEXT + NUM_QUERY,), generator=torch.Generator().manual_seed(5)
).tolist()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3", "mistral"])
def test_scores_are_those_of_hugging_faces_logits(converted, name):
    """Of a conversation, whose turns have contexts of their own where layers have windows."""
    request = StarRequest(
        context_tokens=TOKENS[:NUM_CONTEXT],
        query_tokens=TOKENS[NUM_CONTEXT:],
        sampling=SamplingParams(num_tokens_to_generate=1, top_k=1),
        star=StarConfig(mode="exact", wave_tokens=13),
        turn_edges=(20, 43),
        prompt_logprobs=1,
    )
    model = converted(name)
    ((result, scores),) = run_ranks(2, scored, str(model.megatron), 1, [request])[0]

    rows = unmasked_logits(model.hf, TOKENS).log_softmax(-1)
    expected = rows[:-1].gather(1, torch.tensor(TOKENS)[1:, None])[:, 0].tolist()
    assert [score.logprob for score in scores[1:]] == pytest.approx(expected, abs=1e-4)
    assert [score.top[0][1] for score in scores[1:]] == pytest.approx(rows[:-1].amax(1).tolist(), abs=1e-4)
    assert result.tokens == [int(rows[-1].argmax())]
