"""Layers of experts of transformers, small and with random weights, and Megatron's with the same weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from megatron_star.model.architecture import ModelParallelSizes, transformer_config
from megatron_star.model.layer_spec import layer_spec
from megatron_star.model.transformer_config import StarTransformerConfig
from megatron_star.parallel.groups import destroy_groups, initialize_groups

NUM_EXPERTS = 8
HIDDEN, EXPERT, SHARED = 40, 24, 32
_ARGS = {
    "num_layers": 1,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": 56,
    "num_attention_heads": 2,
    "kv_channels": 20,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "padded_vocab_size": 64,
    "position_embedding_type": "rope",
    "num_experts": NUM_EXPERTS,
    "moe_ffn_hidden_size": EXPERT,
    "moe_router_topk": 3,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
}
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2}
_TOPK = {"num_experts_per_tok": 3}
_GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}


class Block(NamedTuple):
    """A class of transformers, its configuration, and what a checkpoint of ours says of the same."""

    module: type[torch.nn.Module]
    config: Any
    args: Mapping[str, Any]


def _deepseek_v3(**options: Any) -> DeepseekV3Config:
    return DeepseekV3Config(
        **_SIZES,
        **_GROUPS,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        moe_intermediate_size=EXPERT,
        routed_scaling_factor=2.5,
        **options,
    )


_SIGMOID_WITH_BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
_DEEPSEEK_V3 = _SIGMOID_WITH_BIAS | {
    "moe_router_topk": 4,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": EXPERT,
}
_DEEPSEEK_V2 = {
    "moe_router_topk": 4,
    "moe_router_pre_softmax": True,
    "moe_router_topk_scaling_factor": 16.0,
    "moe_shared_expert_intermediate_size": 2 * EXPERT,
}


def _deepseek_v2(**options: Any) -> DeepseekV2Config:
    return DeepseekV2Config(
        **_SIZES,
        **_GROUPS,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=2,
        moe_intermediate_size=EXPERT,
        routed_scaling_factor=16.0,
        **options,
    )


def _qwen2_moe(**options: Any) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        **_SIZES,
        **_TOPK,
        num_experts=NUM_EXPERTS,
        moe_intermediate_size=EXPERT,
        shared_expert_intermediate_size=SHARED,
        **options,
    )


_QWEN2_MOE = {"moe_shared_expert_intermediate_size": SHARED, "moe_shared_expert_gate": True}
_PLAIN = {"num_local_experts": NUM_EXPERTS, "intermediate_size": EXPERT}

BLOCKS = {
    "mixtral": Block(MixtralSparseMoeBlock, MixtralConfig(**_SIZES, **_TOPK, **_PLAIN), {}),
    "qwen2_moe": Block(
        Qwen2MoeSparseMoeBlock,
        _qwen2_moe(norm_topk_prob=False),
        _QWEN2_MOE | {"moe_router_pre_softmax": True},
    ),
    "qwen2_moe_normalised": Block(Qwen2MoeSparseMoeBlock, _qwen2_moe(norm_topk_prob=True), _QWEN2_MOE),
    "qwen3_moe": Block(
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(
            **_SIZES, **_TOPK, num_experts=NUM_EXPERTS, moe_intermediate_size=EXPERT, norm_topk_prob=True
        ),
        {"moe_router_pre_softmax": True, "moe_router_normalised": True},
    ),
    "olmoe": Block(
        OlmoeSparseMoeBlock,
        OlmoeConfig(
            **_SIZES, **_TOPK, num_experts=NUM_EXPERTS, intermediate_size=EXPERT, norm_topk_prob=False
        ),
        {"moe_router_pre_softmax": True},
    ),
    "olmoe_top_1": Block(
        OlmoeSparseMoeBlock,
        OlmoeConfig(**_SIZES, num_experts_per_tok=1, num_experts=NUM_EXPERTS, intermediate_size=EXPERT),
        {"moe_router_pre_softmax": True, "moe_router_topk": 1},
    ),
    "granitemoe": Block(GraniteMoeMoE, GraniteMoeConfig(**_SIZES, **_TOPK, **_PLAIN), {}),
    "deepseek_v2_greedy": Block(DeepseekV2Moe, _deepseek_v2(topk_method="greedy"), _DEEPSEEK_V2),
    "deepseek_v2": Block(
        DeepseekV2Moe,
        _deepseek_v2(topk_method="group_limited_greedy"),
        _DEEPSEEK_V2
        | {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_group_score": "max"},
    ),
    "deepseek_v3": Block(DeepseekV3MoE, _deepseek_v3(norm_topk_prob=True), _DEEPSEEK_V3),
    "deepseek_v3_not_normalised": Block(
        DeepseekV3MoE, _deepseek_v3(norm_topk_prob=False), _DEEPSEEK_V3 | {"moe_router_normalised": False}
    ),
    "glm4_moe": Block(
        Glm4MoeMoE,
        Glm4MoeConfig(
            **_SIZES,
            **_TOPK,
            n_routed_experts=NUM_EXPERTS,
            n_shared_experts=1,
            moe_intermediate_size=EXPERT,
            n_group=1,
            topk_group=1,
        ),
        _SIGMOID_WITH_BIAS | {"moe_shared_expert_intermediate_size": EXPERT},
    ),
    "ernie4_5_moe": Block(
        Ernie4_5_MoeSparseMoeBlock,
        Ernie4_5_MoeConfig(
            **_SIZES,
            moe_num_experts=NUM_EXPERTS,
            moe_k=3,
            moe_intermediate_size=EXPERT,
            moe_num_shared_experts=2,
        ),
        {
            "moe_router_pre_softmax": True,
            "moe_router_normalised": True,
            "moe_router_enable_expert_bias": True,
            "moe_shared_expert_intermediate_size": 2 * EXPERT,
        },
    ),
    "gpt_oss": Block(
        GptOssMLP,
        GptOssConfig(**_SIZES, **_TOPK, **_PLAIN, swiglu_limit=1.5),
        {
            "add_bias_linear": True,
            "swiglu": False,
            "activation": "quick_gelu",
            "gated_mlp": True,
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": 1.5,
        },
    ),
    "llama4": Block(
        Llama4TextMoe,
        Llama4TextConfig(**_SIZES, **_PLAIN, num_experts_per_tok=1, intermediate_size_mlp=EXPERT),
        {
            "moe_router_topk": 1,
            "moe_router_score_function": "sigmoid",
            "moe_apply_probs_on_input": True,
            "moe_shared_expert_intermediate_size": EXPERT,
        },
    ),
}


@contextmanager
def one_rank() -> Iterator[ProcessGroupCollection]:
    """Groups of a job of this process alone; without CUDA Megatron's modules are on the CPU meanwhile."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield initialize_groups(tp_size=1, cp_size=1).model
    finally:
        destroy_groups()
        torch.cuda.current_device = current_device


def config_of_experts(dtype: torch.dtype = torch.float32, **args: Any) -> StarTransformerConfig:
    """Of a layer of `NUM_EXPERTS` small experts."""
    return transformer_config(_ARGS | args, ModelParallelSizes(), dtype=dtype, device=torch.device("cpu"))


def expert_layer(config: StarTransformerConfig, groups: ProcessGroupCollection) -> MoELayer:
    """As our layer specification builds it; its weights are not initialised."""
    mlp = layer_spec(config, "local", groups).layer_specs[0].submodules.mlp
    layer = mlp(config=config, layer_number=1, pg_collection=groups)
    return layer.to(config.params_dtype).eval().requires_grad_(False)


def random_block(block: Block) -> torch.nn.Module:
    """Of transformers, with random weights, biases and biases of the choice."""
    block.config._attn_implementation = block.config._experts_implementation = "eager"
    torch.manual_seed(3)
    module = block.module(block.config).eval().requires_grad_(False)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.normal_(std=0.35)
    return module


def router_of(theirs: torch.nn.Module) -> torch.nn.Module:
    """Of a block of transformers."""
    return theirs.gate if hasattr(theirs, "gate") else theirs.router


def megatron_state(theirs: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a block of transformers under the names of Megatron's layer."""
    state = {f"router.{name}": tensor for name, tensor in router_of(theirs).state_dict().items()}
    state = {_of_bias(name): tensor.squeeze() if "bias" in name else tensor for name, tensor in state.items()}
    gate_up, down = theirs.experts.gate_up_proj, theirs.experts.down_proj
    if gate_up.size(1) == HIDDEN:  # stored as [E, in, out]
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if isinstance(theirs, GptOssMLP):
        gate_up = _without_pairs(gate_up)
        state |= _of_experts("linear_fc1.bias", _without_pairs(theirs.experts.gate_up_proj_bias))
        state |= _of_experts("linear_fc2.bias", theirs.experts.down_proj_bias)
    state |= _of_experts("linear_fc1.weight", gate_up) | _of_experts("linear_fc2.weight", down)
    shared = getattr(theirs, "shared_expert", getattr(theirs, "shared_experts", None))
    if shared is not None:
        fc1 = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
        state |= {"shared_experts.linear_fc1.weight": fc1}
        state |= {"shared_experts.linear_fc2.weight": shared.down_proj.weight}
    if hasattr(theirs, "shared_expert_gate"):
        state["shared_experts.gate_weight"] = theirs.shared_expert_gate.weight
    return state


def _of_bias(name: str) -> str:
    return "router.expert_bias" if name.endswith("e_score_correction_bias") else name


def _of_experts(name: str, stacked: Tensor) -> dict[str, Tensor]:
    return {f"experts.local_experts.{e}.{name}": tensor for e, tensor in enumerate(stacked)}


def _without_pairs(gate_up: Tensor) -> Tensor:
    """[E, 2f, ...]: first all of the gate, then all of the linear part."""
    return torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1)
