"""The one call that makes a StarModel fast; without it, answers are the same."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention import torch_cpu
from megatron_star.attention.adapter import LoadedKernel
from megatron_star.attention.partial import AttentionKernel
from megatron_star.parallel.exchange import Exchange
from megatron_star.speed.compiled_layers import check_can_be_compiled, compile_layers
from megatron_star.speed.cpu_attention import CpuAttention, choose_attention
from megatron_star.speed.decode_weights import check_decode_weights, choose_sliced_parts
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.graph_choice import takes_step_graphs
from megatron_star.speed.layout import choose_layouts, lay_out_for_reading
from megatron_star.speed.linear_choice import choose_linear
from megatron_star.speed.mailbox import Mailbox
from megatron_star.speed.modules import speed_up_modules
from megatron_star.speed.native_attention import compile_attention


def with_speed(
    star_model: StarModel,
    *,
    decode_weights: str = "auto",
    compiled_rows: Sequence[int] = (),
    cuda_graph: str = "auto",
) -> FastStarModel:
    """Make a model with its weights fast; called on all ranks together.

    Args:
        decode_weights: which weights a CP rank reads in token generation, of `DECODE_WEIGHTS`.
        compiled_rows: numbers of sequences, of one token each, for which layers are compiled.
        cuda_graph: whether steps are captured in CUDA graphs, of `CUDA_GRAPH`.

    Raises:
        ValueError: `decode_weights` or `cuda_graph` is unknown, or the layers cannot be compiled, or steps
            not be captured.
    """
    check_decode_weights(decode_weights)
    takes_step_graphs(star_model, cuda_graph)
    check_can_be_compiled(star_model.model, compiled_rows)
    fast = choose_layouts(with_fast_modules(star_model))
    lay_out_for_reading(fast)  # as whole weights, whose reading `choose_sliced_parts` measures
    fast = replace(fast, sliced_parts=choose_sliced_parts(decode_weights, fast))
    lay_out_for_reading(fast, fast.sliced_parts)
    choose_linear(fast)
    return with_compiled_layers(with_step_graphs(fast, cuda_graph), compiled_rows)


def with_compiled_layers(fast: FastStarModel, compiled_rows: Sequence[int]) -> FastStarModel:
    """The model with its layers, and attention of few rows, compiled for so many rows, and with the fastest
    ways of attention; called on all ranks together. Raises ValueError.
    """
    return choose_attention(compile_attention(compile_layers(fast, compiled_rows)))


def with_step_graphs(star_model: FastStarModel, cuda_graph: str) -> FastStarModel:
    """The model, whose steps are captured and replayed if this choice of `CUDA_GRAPH` says so; raises as
    `takes_step_graphs`."""
    return replace(star_model, captures_steps=takes_step_graphs(star_model, cuda_graph))


def with_fast_modules(star_model: StarModel) -> FastStarModel:
    """The model with whole weights, as they lie in memory; called on all ranks together."""
    exchange, tp_exchange = star_model.exchange, Exchange(star_model.model.pg_collection.tp)
    if star_model.device.type == "cpu":
        for one in dict.fromkeys((exchange, star_model.experts.exchange, tp_exchange)):  # often the same
            if one.cp_size > 1:
                one.small = Mailbox.open(one.cp_group)
    return FastStarModel(
        model=star_model.model,
        exchange=exchange,
        kernel=_fast_kernel(star_model.kernel),
        vocab_size=star_model.vocab_size,
        device=star_model.device,
        experts=star_model.experts,
        kv_format=star_model.kv_format,
        tail_layers=star_model.tail_layers,
        slicing=speed_up_modules(star_model.model, star_model.device),
        tp_exchange=tp_exchange,
    )


def _fast_kernel(kernel: AttentionKernel) -> AttentionKernel:
    """The CPU's one can take other ways than torch's kernel, once these are chosen."""
    if isinstance(kernel, LoadedKernel) and kernel.attend is torch_cpu.attend:
        return replace(kernel, attend=CpuAttention())
    return kernel
