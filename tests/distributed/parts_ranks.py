"""What test_parts.py runs on ranks."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_star.attention.partial import Partial
from megatron_star.model.attention import ForwardPass, LayerAttention
from megatron_star.model.build import build_gpt_model
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.norms import AllHeadsRMSNorm
from megatron_star.parallel.groups import initialize_groups


class _OwnValues(ForwardPass):
    """Every token sees itself alone: attention gives the values."""

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        values = value.repeat_interleave(query.size(2) // value.size(2), dim=2).permute(1, 2, 0, 3)
        return Partial(values, values[..., 0])


def built(args: dict[str, Any], tp_size: int) -> GPTModel:
    """A model with random weights; ranks that TP does not take are CP ranks."""
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=tp_size, cp_size=dist.get_world_size() // tp_size)
    model = build_gpt_model(args, groups.model, dtype=torch.float32, device=device)
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.3, std=0.3)
    return model


def all_heads_norm(num_heads: int, weight: Tensor, x: Tensor) -> tuple[int, Tensor]:
    """The first head of this TP rank, and the norm of its heads of x [sq, b, heads, hn]; all are TP ranks."""
    groups = initialize_groups(tp_size=dist.get_world_size(), cp_size=1)
    norm = AllHeadsRMSNorm(None, x.size(-1), 1e-3, num_heads=num_heads, groups=groups.model)
    heads = num_heads // norm.num_parts
    part = dist.get_rank() * norm.num_parts // dist.get_world_size()
    norm.weight.data.copy_(weight.view(norm.num_parts, -1)[part])
    with torch.no_grad():
        return part * heads, norm(x[:, :, part * heads : (part + 1) * heads])


def stored_tensors(args: dict[str, Any], tp_size: int) -> dict[str, tuple[object, ...]]:
    """By key: whole shape, and shape and offset of this rank's part of the last layer."""
    state = built(args, tp_size).sharded_state_dict()
    apply_factories(state)
    return {
        value.key: (tuple(value.global_shape), tuple(value.local_shape), tuple(value.global_offset))
        for value in nested_values(state)
        if isinstance(value, ShardedTensor)
    }


def layer_and_its_modules(args: dict[str, Any], hidden_states: Tensor) -> tuple[Tensor, ...]:
    """Of the first layer of a model: its output, and x, attention(n(x)), mlp(n(x)), with biases."""
    layer = built(args, 1).decoder.layers[0]
    positions = torch.arange(hidden_states.size(0))

    def attention(x: Tensor) -> Tensor:
        return _sum(layer.self_attention(x, None, inference_context=_OwnValues(positions)))

    with torch.inference_mode(), InferenceMode.active():
        out = layer(hidden_states.clone(), inference_context=_OwnValues(positions))[0]
        normed = layer.input_layernorm(hidden_states)
        return out, hidden_states, attention(normed), _sum(layer.mlp(normed))


def _sum(output_with_bias: tuple[Tensor, Tensor | None]) -> Tensor:
    output, bias = output_with_bias
    return output if bias is None else output + bias
