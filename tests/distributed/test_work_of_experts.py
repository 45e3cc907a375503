"""What ranks compute for a context in layers with and without experts is what the cost model says."""

import pytest
from distributed import run_ranks
from kv_ranks import counted_work
from models import random_tokens

from megatron_star.config import StarConfig

TOKENS = random_tokens(97)
MODEL = {
    "num_layers": 4,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 3,
    "group_query_attention": True,
    "num_query_groups": 1,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "padded_vocab_size": 257,
    "max_position_embeddings": 512,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
}
EXPERTS = MODEL | {
    "num_experts": 6,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_ffn_hidden_size": 10,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "moe_shared_expert_intermediate_size": 14,
    "moe_shared_expert_gate": True,
}


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize(
    "star", [StarConfig(block_size=9), StarConfig(mode="exact", wave_tokens=17)], ids=str
)
def test_ranks_compute_the_operations_of_the_experts_that_tokens_choose(star, cp_size):
    """A dense layer, two of experts with a gated shared one, and one of which only the KV is wanted."""
    results = run_ranks(cp_size, counted_work, EXPERTS, TOKENS, star)
    _, linear, attention = results[0]
    assert sum(counted.linear for counted, *_ in results) == linear
    assert sum(counted.attention for counted, *_ in results) == attention
