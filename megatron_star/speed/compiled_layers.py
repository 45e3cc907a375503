"""Layers of token generation compiled by torch: what Megatron's forward pass does, without its Python.

A step of few tokens reads weights and KV, and in a small model what Python and small operations take between
two products shows. So a layer's own forward pass is recorded once, as a program of tensor operations on
hidden states, rotation and weights. What changes from step to step stays outside, as four operations in the
program: attention over the KV that this rank holds, the gathers and sums of the CP and of the TP group, and
experts, since values choose them. The pieces between these operations are compiled by torch's inductor.
Layers with the same program share its pieces.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
import torch._inductor
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_star.attention.partial import Partial
from megatron_star.model.attention import ByPosition, ForwardPass, LayerAttention
from megatron_star.parallel.exchange import Exchange, merge_gathered
from megatron_star.parallel.groups import are_same_ranks
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.pieces import Compiler, RunningLayer, compiled_in_pieces, first_line
from megatron_star.speed.program_layer import LayerProgram, ProgramKey, ProgrammedLayer, ProgramStep

log = logging.getLogger(__name__)

MOST_ROWS = 64
"""Of a compiled program: with more, products take so long that what lies between them does not show."""


class _RecordedExchange(Exchange):
    """The exchanges of a program that is being recorded: nothing is sent."""

    def __init__(self, exchange: Exchange, *, is_of_tp: bool = False) -> None:
        super().__init__(exchange.cp_group)
        self.small, self.is_of_tp = exchange.small, is_of_tp

    def all_gather(self, mine: Tensor, kind: str) -> Tensor:
        return torch.ops.megatron_star.all_gather(mine, self.cp_size, kind, self.is_of_tp)

    def add_up(self, mine: Tensor) -> Tensor:
        if self.is_small(mine):
            return super().add_up(mine)
        return torch.ops.megatron_star.add_up(mine, self.is_of_tp)


class _RecordedPass(ForwardPass):
    """The step of a program that is being recorded.

    What depends on positions is an input of the program, attention is an operation in it.
    """

    def __init__(self, exchange: Exchange, position_ids: Tensor, by_position: ByPosition) -> None:
        super().__init__(position_ids)
        self.exchange, self.by_position = exchange, by_position

    def once(self, key: Hashable, make: Callable[[], Any]) -> ByPosition:
        """See `ForwardPass.once`; of one layer, which asks for nothing else."""
        return self.by_position

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """See `ForwardPass.attend`; of what the layer's attention is, only sizes are part of a program."""
        size = layer.latent.shape.v_head_dim if layer.latent else value.size(-1)
        return merge_gathered(torch.ops.megatron_star.attend(query, key, value, size, self.exchange.cp_size))


class _RecordedExperts(torch.nn.Module):
    """The experts of a layer whose program is being recorded."""

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """As Megatron's: hidden states [sq, 1, h] to the same, and no bias that is still to be added."""
        return torch.ops.megatron_star.experts(hidden_states), None


@contextmanager
def _with_recorded_tp(exchange: _RecordedExchange) -> Iterator[None]:
    """What Megatron's modules send between TP ranks is recorded, for the time of a `with` block.

    All of it goes through two functions, whichever module asks: sums of products and of norms, gathers of
    queries, latents, and of heads of which there are fewer than ranks.
    """

    def reduce(mine: Tensor, group: ProcessGroup) -> Tensor:
        _check_is_tp(group)
        return exchange.add_up(mine) if exchange.cp_size > 1 else mine

    def gather(mine: Tensor, group: ProcessGroup) -> Tensor:
        _check_is_tp(group)
        return torch.cat(exchange.gather(mine).unbind(), dim=-1) if exchange.cp_size > 1 else mine

    def _check_is_tp(group: ProcessGroup) -> None:
        if not are_same_ranks(group, exchange.cp_group):
            raise ValueError(f"it sends to the ranks {get_process_group_ranks(group)}")

    megatrons = mappings._reduce, mappings._gather_along_last_dim
    mappings._reduce, mappings._gather_along_last_dim = reduce, gather
    try:
        yield
    finally:
        mappings._reduce, mappings._gather_along_last_dim = megatrons


@contextmanager
def _with_recorded_experts(layer: TransformerLayer) -> Iterator[None]:
    """A layer of experts without them, for the time of a `with` block."""
    mlp = layer.mlp
    if layer.is_moe_layer:
        layer.mlp = _RecordedExperts()
    try:
        yield
    finally:
        layer.mlp = mlp


def inductor(piece: GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
    """What torch makes of a piece of a program: fused C++ or Triton kernels. Needs a C++ compiler."""
    return torch._inductor.compile(piece, inputs, options={"compile_threads": 1})


@torch.inference_mode()
def compile_layers(
    star_model: FastStarModel, row_counts: Iterable[int], compiler: Compiler = inductor
) -> FastStarModel:
    """Compile the layers for token generation of so many tokens in a step; called on all ranks together.

    Steps of fewer tokens are filled up to the next of these numbers, those of more run as before. Every rank
    compiles for itself.

    Args:
        compiler: see `compiled_in_pieces`.

    Returns:
        The model, which runs them.

    Raises:
        ValueError: a number of rows out of bounds, a model whose layers cannot be compiled, or no compiler.
    """
    rows = sorted(set(row_counts))
    if not rows:
        return star_model
    check_can_be_compiled(star_model.model, rows)
    start, layers = perf_counter(), list(star_model.model.decoder.layers)
    # Layers with the same program for one number of rows have the same program for all.
    groups: dict[object, list[ProgrammedLayer]] = {}
    for layer in layers:
        groups.setdefault(_identity(_record(star_model, layer, rows[0]), layer), []).append(layer)
    for num_rows in rows:
        key = ProgramKey(num_rows, star_model.sliced_parts, star_model.exchange.cp_size)
        for group in groups.values():
            compiled = compiled_in_pieces(_record(star_model, group[0], num_rows), compiler)
            for layer in group:
                layer.programs[key] = _program(compiled, layer, star_model.tp_exchange)
    if star_model.exchange.cp_rank == 0:
        numbers = len(layers), len(groups), ", ".join(map(str, rows)), perf_counter() - start
        log.info("compiled %d layers (%d programs) for %s sequences in %.1f s", *numbers)
    return replace(star_model, compiled_rows=tuple(rows))


def check_can_be_compiled(model: GPTModel, row_counts: Sequence[int]) -> None:
    """What `compile_layers` refuses whatever the weights are. Raises ValueError."""
    if not row_counts:
        return
    for rows in row_counts:
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"layers cannot be compiled for {rows} sequences: it must be 1 to {MOST_ROWS}")
    config = model.config
    obstacles = [_obstacle(layer) for layer in model.decoder.layers]
    if config.apply_rope_fusion:
        obstacles = ["fused rotary embeddings"]
    if obstacle := next(filter(None, obstacles), None):
        raise ValueError(f"layers cannot be compiled for token generation with {obstacle}")


def _obstacle(layer: TransformerLayer) -> str | None:
    """What keeps this layer from being compiled."""
    if type(layer) not in (TransformerLayer, ProgrammedLayer):
        return f"layers of {type(layer).__name__}"
    if not isinstance(layer.self_attention.linear_proj, RowParallelLinear):
        return "layers of TransformerEngine"
    return None


def _weights(layer: ProgrammedLayer) -> dict[str, Tensor]:
    """Of its program: those of experts are outside."""
    weights = dict(layer.named_parameters()) | dict(layer.named_buffers())
    return {
        name: weight
        for name, weight in weights.items()
        if not (layer.is_moe_layer and name.startswith("mlp."))
    }


def _inputs(by_position: ByPosition) -> list[Tensor]:
    """Of a program, besides hidden states and weights."""
    return [tensor for tensor in by_position if tensor is not None]


def _record(star_model: FastStarModel, layer: ProgrammedLayer, num_rows: int) -> GraphModule:
    """A layer's program. Its tensors are recorded without their values; nothing is computed or sent."""
    exchange = _RecordedExchange(star_model.exchange)
    tp_exchange = _RecordedExchange(star_model.tp_exchange, is_of_tp=True)
    model, slicing, weights = star_model.model, star_model.slicing, _weights(layer)
    dtype, size = model.config.params_dtype, (num_rows, 1, model.config.hidden_size)
    positions = torch.zeros(num_rows, dtype=torch.int64, device=star_model.device)
    angles = model.rotary_pos_emb((positions, (False,))) if hasattr(model, "rotary_pos_emb") else None
    example = layer.self_attention.make_by_position(positions, angles, dtype)
    inputs = [torch.zeros(size, dtype=dtype, device=star_model.device), *_inputs(example)]

    def run(*tensors: Tensor) -> Tensor:
        hidden_states, *rest = tensors
        given = iter(rest)
        by_position = ByPosition(*(None if tensor is None else next(given) for tensor in example))
        step = _RecordedPass(exchange, positions, by_position)
        options = {"attention_mask": None, "rotary_pos_emb": None, "inference_context": step}
        state = dict(zip(weights, given, strict=True))
        with slicing.step(star_model.sliced_parts, exchange), InferenceMode.active():
            return functional_call(layer, state, hidden_states, options)[0]

    try:
        with _with_recorded_experts(layer), _with_recorded_tp(tp_exchange):
            program = make_fx(run, tracing_mode="fake")(*inputs, *weights.values())
    except Exception as error:
        raise ValueError(f"layer {layer.layer_number} cannot be compiled: {first_line(error)}") from error
    if any(node.op == "get_attr" for node in program.graph.nodes):
        raise ValueError(f"layer {layer.layer_number} cannot be compiled: not all of its tensors are weights")
    return program


def _identity(program: GraphModule, layer: ProgrammedLayer) -> object:
    """Equal for layers that one compiled program can run."""
    layouts = [(weight.shape, weight.stride(), weight.dtype) for weight in _weights(layer).values()]
    return program.code, tuple(layouts)


def _program(compiled: Callable[..., Tensor], layer: ProgrammedLayer, tp_exchange: Exchange) -> LayerProgram:
    weights = list(_weights(layer).values())
    attention, mlp = layer.self_attention, layer.mlp
    described = attention.core_attention.layer

    def run(step: ProgramStep, hidden_states: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        by_position = _inputs(attention.by_position(step, angles, hidden_states.dtype))
        running = RunningLayer(step, described, mlp, tp_exchange)
        return compiled(running, hidden_states, *by_position, *weights)

    return run
