"""Plans of DeepSeek-V3 and Qwen3-235B-A22B: the figures that their makers publish, and counts by hand."""

import json
from dataclasses import replace
from itertools import combinations
from math import inf
from pathlib import Path

import pytest

from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import kv_layers, token_costs
from megatron_star.planning.estimates import Workload, estimate, estimates
from megatron_star.planning.expert_layout import ExpertLayout
from megatron_star.planning.hardware import GPUS, NODE_LATENCY_SECONDS, Cluster, Gpu
from megatron_star.planning.known_models import KNOWN_MODELS
from megatron_star.planning.layer_collectives import LayerCollectives
from megatron_star.planning.model_size import ModelSize
from megatron_star.programs.plan_cluster import parse_arguments, read_model, run

K = 1 << 10
DEEPSEEK, QWEN = (ModelSize.of_arguments(KNOWN_MODELS[n]) for n in ("deepseek-v3", "qwen3-235b-a22b"))

# DeepSeek-V3, weights of a layer.
LATENT_ATTENTION = (
    7168 * 1536  # queries down
    + 1536 * 128 * (128 + 64)  # and up: 128 heads, 64 of whose values are rotated
    + 7168 * (512 + 64)  # the latent and the rotated key
    + 512 * 128 * (128 + 128)  # keys and values of all heads
    + 128 * 128 * 7168
)
EXPERT, ROUTER, DENSE = 3 * 7168 * 2048, 256 * 7168, 3 * 7168 * 18432
EMBEDDING = 129280 * 7168


def test_deepseek_v3_has_671_billion_parameters_of_which_37_are_active():
    """arXiv 2412.19437, section 1. 3 dense layers; 58 with 256 experts, 8 of them used, and a shared one."""
    assert LATENT_ATTENTION == 187_105_280 and EXPERT == 44_040_192 and DENSE == 396_361_728
    besides = 61 * LATENT_ATTENTION + 3 * DENSE + 58 * (EXPERT + ROUTER) + EMBEDDING
    assert besides == 16_189_947_904
    assert DEEPSEEK.num_expert_parameters == 58 * 256 * EXPERT == 653_908_770_816
    assert DEEPSEEK.num_parameters == besides + EMBEDDING + 653_908_770_816 == 671_025_397_760
    assert DEEPSEEK.num_parameters_per_token == besides + 58 * 8 * EXPERT == 36_624_596_992


def test_qwen3_has_235_billion_parameters_of_which_22_are_active():
    """arXiv 2505.09388, table 2. 94 layers of 128 experts, of which 8; none is shared."""
    attention = 4096 * 128 * (64 + 2 * 4) + 64 * 128 * 4096
    expert, router, embedding = 3 * 4096 * 1536, 128 * 4096, 151936 * 4096
    besides = 94 * (attention + router) + embedding
    assert QWEN.num_parameters == besides + embedding + 94 * 128 * expert == 235_092_836_352
    assert QWEN.num_parameters_per_token == besides + 94 * 8 * expert == 21_567_635_456


def test_a_token_of_deepseek_v3_costs_twice_the_active_weights_that_a_context_meets():
    """No embedding, no output layer; of the last layer, queries and the latent alone. A pair is expanded."""
    last = 187_105_280 + 9 * EXPERT + ROUTER - (7168 * 1536 + 1536 * 128 * 192 + 7168 * 576)
    costs = token_costs(DEEPSEEK)
    assert costs.linear_per_token == 2 * (36_624_596_992 - EMBEDDING - last)
    assert costs.attention_per_pair == 60 * 2 * 128 * (128 + 64 + 128)


def test_a_shared_experts_gate_and_latent_experts_are_counted():
    """A gate is one row of the hidden size. Latent experts read 1,024 values, after a projection, and return
    as many, before another one; the shared expert reads the hidden size.
    """
    gated = replace(DEEPSEEK, moe_shared_expert_gate=True)
    assert gated.num_parameters - DEEPSEEK.num_parameters == 58 * 7168
    latent = replace(DEEPSEEK, moe_latent_size=1024)
    narrower = 58 * 256 * 3 * (7168 - 1024) * 2048
    assert DEEPSEEK.num_parameters - latent.num_parameters == narrower - 58 * 2 * 1024 * 7168


@pytest.mark.parametrize(
    ("tp_size", "ep_size", "expert_tp_size", "cut"),
    [(8, 1, 8, 8), (8, 16, 1, 16), (4, 16, 1, 16), (2, 4, 2, 8), (1, 16, 1, 16), (8, 2, 8, 16)],
)
def test_experts_are_divided_by_ep_and_expert_tp_and_all_else_by_tp(tp_size, ep_size, expert_tp_size, cut):
    """In bfloat16; norms are left out."""
    asked = workload(DEEPSEEK, ep_size=ep_size, expert_tp_size=expert_tp_size)
    found = estimate(asked, gpus(16), tp_size)
    others = 671_025_397_760 - 653_908_770_816
    assert found.weights_bytes == 2 * (others / tp_size + 653_908_770_816 / cut)
    assert (found.ep_size, found.expert_tp_size) == (ep_size, expert_tp_size)


def test_the_kv_of_deepseek_v3_is_576_values_a_token_in_each_layer_of_every_tp_rank():
    """70,272 bytes a token. Keys of 192 and values of 128 in 128 heads would be 4,997,120."""
    for tp_size in (1, 8):
        kv = kv_layers(DEEPSEEK, tp_size=tp_size, bytes_per_value=2)
        assert kv.of_tokens(1) == 61 * 576 * 2 == 70_272
        (found,) = (e for e in estimates(workload(DEEPSEEK), h200s(16)) if e.tp_size == tp_size)
        # 128K tokens over the CP ranks, blocks whole on each, and the answer's 256.
        assert found.kv_bytes == pytest.approx((128 * K / (16 / tp_size) + 256) * 70_272, rel=0.02)


def workload(size, num_context_tokens=128 * K, **options):
    """As recommended."""
    return Workload(size, num_context_tokens, 256, StarConfig(wave_tokens=8 * K), **options)


def h200s(num_gpus):
    return Cluster(GPUS["h200"], num_gpus, 8)


def gpus(num_gpus, num_per_node=None, **rates):
    """That do everything at once, but for what has a rate here: their seconds count one kind of work."""
    names = ("matmul_flops_per_s", "attention_flops_per_s", "memory_bytes", "memory_bytes_per_s")
    names += ("node_link_bytes_per_s", "network_link_bytes_per_s")
    return Cluster(Gpu("made up", **dict.fromkeys(names, inf) | rates), num_gpus, num_per_node or num_gpus)


def test_the_rows_that_leave_a_rank_for_other_ranks_experts_were_counted_by_hand():
    """32K tokens on each of 4 CP ranks, 8K a TP rank. Each goes to 8 experts, of which 15 of 16
    are elsewhere, with 7,168 values of 2 bytes, and comes back: in 57 layers, as of the last only KV is.
    """
    found = estimate(workload(DEEPSEEK, ep_size=16), h200s(16), 4)
    assert found.all_to_all_bytes == 57 * 2 * 8192 * 8 * 15 / 16 * 7168 * 2


def test_layers_wait_for_the_bytes_that_were_counted_by_hand():
    """8K rows, TP 4 x CP 4, EP 16, 1 GB/s. All-reduces of a ring, 3/2 of the rows: of attention in 61 layers,
    of the MLP in 3, of the shared expert in 58. In these, rows to experts and back, and slices gathered: 3/4.
    """
    cluster = gpus(16, node_link_bytes_per_s=1e9)
    layers = LayerCollectives(DEEPSEEK, cluster, ExpertLayout(4, 16, 1), 2)
    rows, latency = 8 * K * 7168 * 2, NODE_LATENCY_SECONDS
    to_experts = 2 * rows / 4 * 8 * 15 / 16
    num_bytes = (61 + 3 + 58) * 3 / 2 * rows + 58 * (to_experts + 3 / 4 * rows)
    latencies = (61 + 3 + 58) + 58 * 2.5
    assert layers.encoding_seconds(8 * K) == pytest.approx(num_bytes / 1e9 + latencies * latency, rel=1e-9)
    in_step = ((61 + 3 + 58) * 3 / 2 + 58 * 15 / 8) * 7168 * 2
    assert layers.step_seconds() == pytest.approx(in_step / 1e9 + 180 * latency, rel=1e-9)


def test_between_nodes_go_the_rows_of_their_experts():
    """Of 16 ranks, 7 are in the same node and 8 in the other, both at the same time."""
    cluster = gpus(16, 8, node_link_bytes_per_s=7.0, network_link_bytes_per_s=1.0)
    assert cluster.all_to_all(15.0, 16)[0] == 8.0
    cluster = gpus(16, 8, node_link_bytes_per_s=0.5, network_link_bytes_per_s=1.0)
    assert cluster.all_to_all(15.0, 16)[0] == 14.0
    assert cluster.all_to_all(7.0, 8) == (14.0, NODE_LATENCY_SECONDS)


def test_where_a_tp_group_has_all_experts_nothing_is_dispatched_and_a_sum_follows():
    """All its ranks have the same rows. Otherwise each takes its slice of them."""
    for layout in (
        ExpertLayout(8, 8, 1),
        ExpertLayout(8, 1, 8),
        ExpertLayout(8, 2, 4),
        ExpertLayout(1, 1, 1),
    ):
        assert layout.all_to_all_bytes(1000, DEEPSEEK, 2) == layout.expert_tp_bytes(1000, DEEPSEEK, 2) == 0
        assert not layout.dispatches
    for layout in (
        ExpertLayout(8, 16, 1),
        ExpertLayout(8, 2, 8),
        ExpertLayout(2, 3, 1),
        ExpertLayout(8, 4, 1),
    ):
        assert layout.dispatches
        assert layout.all_to_all_bytes(1000, DEEPSEEK, 2) > 0
    assert ExpertLayout(8, 2, 8).expert_tp_bytes(1000, DEEPSEEK, 2) == 2 * 7 * 1000 / 8 * 8 * 7168 * 2
    assert ExpertLayout(2, 1, 1).all_to_all_bytes(1000, DEEPSEEK, 2) == 0, "each rank has all experts"


def test_a_step_sends_one_sum_a_layer_of_what_experts_return():
    """A ring of 16 ranks: 15/16 of 7,168 values, twice."""
    found = estimate(workload(DEEPSEEK, ep_size=16), h200s(16), 4)
    assert found.step_sum_bytes == 58 * 2 * 15 / 16 * 7168 * 2


@pytest.mark.parametrize(
    ("num_experts", "chosen", "num_ranks"), [(8, 2, 4), (12, 3, 3), (6, 6, 3), (9, 4, 1)]
)
def test_the_rank_with_most_of_a_tokens_experts_is_found_among_all_choices(num_experts, chosen, num_ranks):
    size = replace(QWEN, num_moe_experts=num_experts, moe_router_topk=chosen)
    of_a_rank = num_experts // num_ranks
    choices = [[e // of_a_rank for e in choice] for choice in combinations(range(num_experts), chosen)]
    expected = sum(max(map(ranks.count, ranks)) for ranks in choices) / len(choices)
    assert ExpertLayout(1, num_ranks, 1).busiest(size) == pytest.approx(expected, rel=1e-12)


def test_a_step_reads_the_experts_of_the_busiest_rank():
    """Qwen's 8 of 128 experts, all on one rank, or on 8: then 2.42 on the busiest are to be expected."""
    rates = {"memory_bytes_per_s": 1e12}
    asked = replace(workload(QWEN, 1024), num_generated_tokens=0)
    for ep_size, busiest in ((1, 8.0), (8, ExpertLayout(1, 8, 1).busiest(QWEN))):
        found = estimate(replace(asked, ep_size=ep_size, expert_tp_size=1), gpus(8, **rates), 1)
        weights = 21_567_635_456 - 94 * (8 - busiest) * 3 * 4096 * 1536
        latency = found.tpot_s - 2 * weights / 1e12
        assert 0 < latency < 0.01
    assert 2 < ExpertLayout(1, 8, 1).busiest(QWEN) < 3


def test_deepseek_v3_fits_16_h200_with_its_experts_over_all_of_them_and_not_on_a_tp_group():
    """1,342 GB in bfloat16; at TP 8 alone, a GPU would hold 168 of its 127."""
    found = estimates(workload(DEEPSEEK), h200s(16))
    assert found[0].fits["star"] and {e.ep_size for e in found if e.fits["star"]} == {16}
    alone = estimate(workload(DEEPSEEK, ep_size=1), h200s(16), 8)
    assert alone.weights_bytes == pytest.approx(167.8e9, rel=1e-3) and not alone.fits["star"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--model deepseek-v3 --gpus 16 --expert-model-parallel-size 3", "3 must divide 256 experts"),
        ("--model deepseek-v3 --gpus 16 --expert-model-parallel-size 32", "both together 16 GPUs"),
        ("--model deepseek-v3 --gpus 24 --expert-tensor-parallel-size 3", "3 the 2048 of each"),
        ("--model deepseek-v3 --gpus 8", "8 x h100: at best .* needs .* and has 72; 32 x h100 would"),
    ],
)
def test_experts_that_cannot_be_spread_so_are_refused(arguments, line):
    with pytest.raises(ValueError, match=line):
        run(parse_arguments([*arguments.split(), "--context", "32K"]))


def test_a_dense_model_has_no_experts_to_spread(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64} | SMALL))
    command = ["--model", str(path), "--context", "1K", "--gpus", "2", "--expert-model-parallel-size", "2"]
    with pytest.raises(ValueError, match="the model has no experts"):
        run(parse_arguments(command))


SMALL = {
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "deepseek-v3",
            [
                "671.03 B parameters, 36.62 B active (8 of 256 experts in 58 of 61 layers)",
                "70,272 bytes of KV per token: in each layer 576 values, a latent of 512 and 64 rotated ones",
                "EP=16 EXPERT_TP=1",
            ],
        ),
        (
            "qwen3-235b-a22b",
            [
                "235.09 B parameters, 21.57 B active (8 of 128 experts in 94 of 94 layers)",
                "192,512 bytes of KV per token\n",
                "TP x CP   EP x ETP   weights",
            ],
        ),
    ],
)
def test_known_models_are_planned_by_name(name, lines, capsys):
    """94 layers of 2 x 4 x 128 values of 2 bytes are 192,512 bytes."""
    command = ["--model", name, "--context", "32K", "--gpus", "16", "--gpu", "h200"]
    run(parse_arguments(command))
    out = capsys.readouterr().out
    assert all(line in out for line in lines), out
    run(parse_arguments([*command, "--json"]))
    found = json.loads(capsys.readouterr().out)
    size = ModelSize.of_arguments(KNOWN_MODELS[name])
    assert found["model"]["active_parameters"] == size.num_parameters_per_token
    assert found["plans"][0]["ep_size"] * found["plans"][0]["expert_tp_size"] > 1


PUBLISHED = {
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_model_is_what_is_read_of_its_published_configuration(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    args, known = read_model(tmp_path), KNOWN_MODELS[name]
    assert ModelSize.of_arguments(args) == ModelSize.of_arguments(known)
    assert args["max_position_embeddings"] == known["max_position_embeddings"]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("moe_layer_freq", [1] * 60, "moe_layer_freq has 60 values: it must have one for each of 61 layers"),
        ("moe_layer_freq", 2, "moe_layer_freq"),
        ("kv_lora_rank", None, "latent attention needs kv_lora_rank"),
        ("q_lora_rank", -1, "q_lora_rank"),
    ],
)
def test_wrong_experts_and_latents_are_refused_by_name(name, value, line, monkeypatch):
    wrong = dict(KNOWN_MODELS["deepseek-v3"]) | {name: value}
    monkeypatch.setattr("megatron_star.programs.plan_cluster.KNOWN_MODELS", {"wrong": wrong})
    with pytest.raises(ValueError, match=line):
        read_model(Path("wrong"))
