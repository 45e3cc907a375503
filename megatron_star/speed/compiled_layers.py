"""Layers of token generation compiled by torch: what Megatron's forward pass does, without its Python.

A step of few tokens reads weights and KV, and in a small model what Python and small operations take between
two products shows. So a layer's own forward pass is recorded once, as a program of tensor operations on
hidden states, rotation and weights, and compiled by torch's inductor. Layers with the same program share what
it was compiled to. What changes from step to step stays outside, as three operations in the program:
attention over the KV that this rank holds, and the gathers and sums of the CP group.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
import torch._inductor
import torch.nn.functional as F
from megatron.core.inference.utils import InferenceMode
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_star.algorithm.star_model import StarModel
from megatron_star.attention.merge import merge_outs
from megatron_star.attention.partial import Partial
from megatron_star.model.attention import StarInferenceContext
from megatron_star.model.rotary import cosines_and_sines
from megatron_star.parallel.exchange import Exchange
from megatron_star.speed.program_layer import LayerProgram, ProgramKey, StarTransformerLayer
from megatron_star.speed.sliced_linear import GatheredLinear

log = logging.getLogger(__name__)

MOST_ROWS = 64
"""Of a compiled program: with more, products take so long that what lies between them does not show."""

Compiler = Callable[[GraphModule, list[Tensor]], Callable[..., Tensor]]


class _Running:
    """The step and layer whose program runs; there is one at a time in a process."""

    step: Any = None
    layer_number: int = 0


torch.library.define(
    "megatron_star::attend",
    "(Tensor query, Tensor key, Tensor value, float softmax_scale, int num_ranks) -> Tensor",
)
torch.library.define("megatron_star::all_gather", "(Tensor mine, int num_ranks, str kind) -> Tensor")
torch.library.define("megatron_star::add_up", "(Tensor mine) -> Tensor")


@torch.library.impl("megatron_star::attend", ("cpu", "cuda"))
def _attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, num_ranks: int) -> Tensor:
    """All ranks' parts, as `Exchange.gather_partials` gives them; the output of a rank that is alone.

    Rows behind those of the step fill up the program's, and see no key.
    """
    step, rows = _Running.step, _Running.step.num_rows
    filler = query.size(0) - rows
    if filler:
        query, key, value = query[:rows], key[:rows], value[:rows]
    out, softmax_lse = step.attend_locally(_Running.layer_number, query, key, value, softmax_scale)
    if filler:
        out, softmax_lse = F.pad(out, (0, 0, 0, filler)), F.pad(softmax_lse, (0, filler), value=-torch.inf)
    if num_ranks == 1:
        return out.contiguous()
    return step.exchange.gather_partials(Partial(out, softmax_lse)).clone()


@torch.library.register_fake("megatron_star::attend")
def _shape_of_attend(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, num_ranks: int
) -> Tensor:
    sq, b, np, hn = query.shape
    shape = (b, np, sq, hn) if num_ranks == 1 else (num_ranks, b, np, sq, hn + 1)
    return query.new_empty(shape, dtype=torch.float32)


@torch.library.impl("megatron_star::all_gather", ("cpu", "cuda"))
def _all_gather(mine: Tensor, num_ranks: int, kind: str) -> Tensor:
    """A copy: a program may read it after the next exchange."""
    return _Running.step.exchange.all_gather(mine, kind).clone()


@torch.library.register_fake("megatron_star::all_gather")
def _shape_of_all_gather(mine: Tensor, num_ranks: int, kind: str) -> Tensor:
    return mine.new_empty(num_ranks, *mine.shape)


@torch.library.impl("megatron_star::add_up", ("cpu", "cuda"))
def _add_up(mine: Tensor) -> Tensor:
    """Of a copy: a large tensor is added up in place."""
    return _Running.step.exchange.add_up(mine.clone())


@torch.library.register_fake("megatron_star::add_up")
def _shape_of_add_up(mine: Tensor) -> Tensor:
    return mine.new_empty(mine.shape)


class _RecordedExchange(Exchange):
    """The exchanges of a program that is being recorded: nothing is sent."""

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        super().__init__(exchange.cp_group)
        self.fits_mailbox = exchange.fits_mailbox
        # Opens it now: recorded tensors have no values to open it with.
        self.fits_mailbox(torch.empty(0, device=device))

    def all_gather(self, mine: Tensor, kind: str) -> Tensor:
        return torch.ops.megatron_star.all_gather(mine, self.cp_size, kind)

    def add_up(self, mine: Tensor) -> Tensor:
        if self.fits_mailbox(mine):
            return self.all_gather(mine, "sum").sum(0)
        return torch.ops.megatron_star.add_up(mine)


class _RecordedStep(StarInferenceContext):
    """The step of a program that is being recorded: its rotation is an input, its attention an operation."""

    def __init__(self, exchange: Exchange, position_ids: Tensor, rotation: tuple[Tensor, ...]) -> None:
        super().__init__(position_ids)
        self.exchange, self._rotation = exchange, rotation

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float
    ) -> Tensor:
        """See `StarInferenceContext.attend`; the layer's number is not part of a program."""
        num_ranks = self.exchange.cp_size
        out = torch.ops.megatron_star.attend(query, key, value, softmax_scale, num_ranks)
        if num_ranks > 1:
            out = merge_outs(out[..., :-1], out[..., -1])
        return out.permute(2, 0, 1, 3).to(query.dtype)


def inductor(program: GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
    """What torch makes of a program: fused C++ or Triton kernels. Needs a C++ compiler."""
    return torch._inductor.compile(program, inputs, options={"compile_threads": 1})


@torch.inference_mode()
def compile_layers(
    star_model: StarModel, row_counts: Iterable[int], compiler: Compiler = inductor
) -> StarModel:
    """Compile the layers for token generation of so many tokens in a step; called on all ranks together.

    Steps of fewer tokens are filled up to the next of these numbers, those of more run as before. Every rank
    compiles for itself.

    Args:
        compiler: makes a function of a program and example inputs; the program is one itself.

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
    groups: dict[object, list[StarTransformerLayer]] = {}
    for layer in layers:
        groups.setdefault(_identity(_record(star_model, layer, rows[0]), layer), []).append(layer)
    for num_rows in rows:
        key = ProgramKey(num_rows, star_model.sliced_parts, star_model.exchange.cp_size)
        for group in groups.values():
            inputs = [*_example_inputs(star_model, num_rows), *_weights(group[0]).values()]
            compiled = _compiled(_record(star_model, group[0], num_rows), inputs, compiler)
            for layer in group:
                layer.programs[key] = _program(compiled, layer)
    if star_model.exchange.cp_rank == 0:
        log.info(
            "compiled %d layers (%d programs) for %s sequences in %.1f s",
            len(layers),
            len(groups),
            ", ".join(map(str, rows)),
            perf_counter() - start,
        )
    return replace(star_model, compiled_rows=tuple(rows))


def check_can_be_compiled(model: Any, row_counts: Iterable[int]) -> None:
    """What `compile_layers` refuses whatever the weights are. Raises ValueError."""
    for rows in row_counts:
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"layers cannot be compiled for {rows} sequences: it must be 1 to {MOST_ROWS}")
    config, layer = model.config, model.decoder.layers[0]
    obstacle = None
    if config.tensor_model_parallel_size > 1:
        obstacle = f"tensor parallelism ({config.tensor_model_parallel_size} ranks)"
    elif config.num_moe_experts:
        obstacle = "experts"
    elif not isinstance(layer, StarTransformerLayer):
        obstacle = f"layers of {type(layer).__name__}"
    elif not isinstance(layer.self_attention.linear_qkv, GatheredLinear):
        obstacle = "layers of TransformerEngine"
    elif config.apply_rope_fusion or config.rotary_interleaved:
        obstacle = "fused or interleaved rotary embeddings"
    if obstacle:
        raise ValueError(f"layers cannot be compiled for token generation with {obstacle}")


def _weights(layer: StarTransformerLayer) -> dict[str, Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def _example_inputs(star_model: StarModel, num_rows: int) -> list[Tensor]:
    """Hidden states, and the step's rotation, if the model has one."""
    config, model, device = star_model.model.config, star_model.model, star_model.device
    hidden_states = torch.zeros(num_rows, 1, config.hidden_size, dtype=config.params_dtype, device=device)
    if not hasattr(model, "rotary_pos_emb"):
        return [hidden_states]
    angles = model.rotary_pos_emb(torch.zeros(num_rows, dtype=torch.int64, device=device))
    if isinstance(angles, tuple):
        angles = angles[0]
    return [hidden_states, *cosines_and_sines(angles, 1.0, config.params_dtype)]


def _record(star_model: StarModel, layer: StarTransformerLayer, num_rows: int) -> GraphModule:
    """A layer's program. Its tensors are recorded without their values; nothing is computed or sent."""
    exchange = _RecordedExchange(star_model.exchange, star_model.device)
    slicing = star_model.model.weight_slicing
    inputs = _example_inputs(star_model, num_rows)
    positions, weights = torch.zeros(num_rows, dtype=torch.int64), _weights(layer)

    def run(*tensors: Tensor) -> Tensor:
        hidden_states, *rotation = tensors[: len(inputs)]
        step = _RecordedStep(exchange, positions, tuple(rotation))
        options = {
            "attention_mask": None,
            "rotary_pos_emb": tuple(rotation) or None,
            "inference_context": step,
        }
        state = dict(zip(weights, tensors[len(inputs) :], strict=True))
        with slicing.step(star_model.sliced_parts, exchange), InferenceMode.active():
            return functional_call(layer, state, hidden_states, options)[0]

    try:
        program = make_fx(run, tracing_mode="fake")(*inputs, *weights.values())
    except Exception as error:
        raise ValueError(f"layer {layer.layer_number} cannot be compiled: {_first_line(error)}") from error
    if any(node.op == "get_attr" for node in program.graph.nodes):
        raise ValueError(f"layer {layer.layer_number} cannot be compiled: not all of its tensors are weights")
    return program


def _identity(program: GraphModule, layer: StarTransformerLayer) -> object:
    """Equal for layers that one compiled program can run."""
    layouts = [(weight.shape, weight.stride(), weight.dtype) for weight in _weights(layer).values()]
    return program.code, tuple(layouts)


def _compiled(program: GraphModule, inputs: list[Tensor], compiler: Compiler) -> Callable[..., Tensor]:
    try:
        return compiler(program, inputs)
    except Exception as error:
        raise ValueError(f"layers could not be compiled: {_first_line(error)}") from error


def _program(compiled: Callable[..., Tensor], layer: StarTransformerLayer) -> LayerProgram:
    weights = list(_weights(layer).values())
    layer_number, attention = layer.layer_number, layer.self_attention

    def run(step: StarInferenceContext, hidden_states: Tensor, angles: Tensor | None) -> Tensor:
        _Running.step, _Running.layer_number = step, layer_number
        rotation = attention.rotation(step, angles, hidden_states.dtype)
        try:
            return compiled(hidden_states, *rotation, *weights)
        finally:
            _Running.step = None  # it holds KV, which may be freed next

    return run


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
