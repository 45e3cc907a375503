"""From a checkpoint to a model that is ready to encode contexts."""

import hashlib
from collections.abc import Iterable, Sequence

import torch

from megatron_star.algorithm.star_model import StarModel, attach
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import CheckpointInfo
from megatron_star.model.expert_layer import moe_layers
from megatron_star.model.stored_weights import load_weights
from megatron_star.model.weight_hashes import WHOLE, Share
from megatron_star.parallel.control import SharedError, gather_integers, on_every_rank
from megatron_star.parallel.groups import StarGroups
from megatron_star.speed.attach import with_speed
from megatron_star.speed.compiled_layers import check_can_be_compiled, compile_layers
from megatron_star.speed.cpu_attention import choose_attention
from megatron_star.speed.decode_weights import check_decode_weights
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.graph_choice import takes_step_graphs
from megatron_star.speed.native_attention import compile_attention


def load_star_model(
    info: CheckpointInfo,
    groups: StarGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str = "auto",
    kv_dtype: str = "auto",
    transformer_impl: str = "local",
    decode_weights: str = "auto",
    compiled_rows: Sequence[int] = (),
    cuda_graph: str = "auto",
    verify_weights: Share | None = WHOLE,
) -> FastStarModel:
    """Build the checkpoint's model on these groups and load its weights; called on all ranks together.

    What may fail on one rank alone is agreed on before the next exchange between ranks: none waits for one
    that never comes.

    Args:
        compiled_rows: numbers of sequences, of one token each, for which layers are compiled.
        cuda_graph: whether steps are captured in CUDA graphs, of `CUDA_GRAPH`.
        verify_weights: see `load_weights`.

    Raises:
        SharedError: on all ranks: the kernel, `kv_dtype` or `decode_weights` is unknown, the model is
            unsupported, the checkpoint does not fit it, its layers cannot be compiled or its steps captured,
            or ranks with the same part of it have read different weights.
    """

    def build_and_load() -> StarModel:
        check_decode_weights(decode_weights)
        model = build_gpt_model(
            info.args, groups.model, dtype=dtype, device=device, transformer_impl=transformer_impl
        )
        star_model = attach(
            model, groups, kernel=kernel, vocab_size=info.args["vocab_size"], kv_dtype=kv_dtype
        )
        # Before weights are read, which may take minutes.
        check_can_be_compiled(model, compiled_rows)
        takes_step_graphs(star_model, cuda_graph)
        load_weights(model, info, verify=verify_weights)
        return star_model

    star_model = on_every_rank(build_and_load, groups.control)
    check_same_weights(star_model.model, groups)
    fast = with_speed(star_model, decode_weights=decode_weights, cuda_graph=cuda_graph)
    if not compiled_rows:
        return fast
    compiled = on_every_rank(lambda: compile_attention(compile_layers(fast, compiled_rows)), groups.control)
    return choose_attention(compiled)


def check_same_weights(model: torch.nn.Module, groups: StarGroups) -> None:
    """Raises SharedError on all ranks unless those with the same part of the model have the same weights.

    Ranks with the same part of all but experts are those of a CP group; of the experts' parts there are as
    many as ranks hold a layer's experts together, and rank after rank has the next.
    """
    of_experts = {id(weight) for layer in moe_layers(model) for weight in layer.experts.parameters()}
    experts, others = [], []
    for name, weight in sorted(model.named_parameters()):
        (experts if id(weight) in of_experts else others).append((name, weight))
    for weights, num_parts in ((others, groups.model.tp.size()), (experts, groups.model.tp_ep.size())):
        sums = gather_integers(sum_of_weights(weights), groups.control)
        for rank, value in enumerate(sums):
            if value != sums[rank % num_parts]:
                raise SharedError(
                    f"rank {rank} has read other weights than rank {rank % num_parts}: is the checkpoint the "
                    "same on all nodes?"
                )


@torch.no_grad()
def sum_of_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> int:
    """63 bits of a hash of names, and of each weight's sum of integers: as fast as memory is read."""
    sums = [(name, _sum_of_bits(weight)) for name, weight in weights]
    return int.from_bytes(hashlib.sha256(repr(sums).encode()).digest()[:8]) >> 1


def _sum_of_bits(weight: torch.Tensor) -> int:
    """Whatever the order in memory, which may differ between ranks."""
    in_order = weight.t() if weight.dim() == 2 and not weight.is_contiguous() else weight
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(in_order.contiguous().view(integers).sum(dtype=torch.int64))
