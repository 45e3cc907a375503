"""A recorded program, run in pieces: compiled ones, and between them what needs the step.

The program is cut at the operations defined here, as vLLM's piecewise compilation cuts at attention. So the
step is an argument of a call in Python, and nothing global.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.split_module import split_module

from megatron_star.model.attention import LayerAttention
from megatron_star.parallel.exchange import Exchange
from megatron_star.speed.program_layer import ProgramStep

Compiler = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]

torch.library.define(
    "megatron_star::attend",
    "(Tensor query, Tensor key, Tensor value, int value_size, int num_ranks) -> Tensor",
)
torch.library.define(
    "megatron_star::all_gather", "(Tensor mine, int num_ranks, str kind, bool is_of_tp) -> Tensor"
)
torch.library.define("megatron_star::add_up", "(Tensor mine, bool is_of_tp) -> Tensor")
torch.library.define("megatron_star::experts", "(Tensor hidden_states) -> Tensor")


@torch.library.register_fake("megatron_star::attend")
def _shape_of_attend(query: Tensor, key: Tensor, value: Tensor, value_size: int, num_ranks: int) -> Tensor:
    sq, b, np, _ = query.shape
    return query.new_empty((num_ranks, b, np, sq, value_size + 1), dtype=torch.float32)


@torch.library.register_fake("megatron_star::all_gather")
def _shape_of_all_gather(mine: Tensor, num_ranks: int, kind: str, is_of_tp: bool) -> Tensor:
    return mine.new_empty(num_ranks, *mine.shape)


@torch.library.register_fake("megatron_star::add_up")
def _shape_of_add_up(mine: Tensor, is_of_tp: bool) -> Tensor:
    return mine.new_empty(mine.shape)


@torch.library.register_fake("megatron_star::experts")
def _shape_of_experts(hidden_states: Tensor) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


class RunningLayer(NamedTuple):
    """The step and layer that a program runs for, which is its first argument; and what is done outside of
    its compiled pieces. Each method computes what the operation of its name stands for in a recorded program.

    Attributes:
        mlp: of the layer; in a program only where it is one of experts.
        tp_exchange: of the TP ranks; the step's is of the CP ranks.
    """

    step: ProgramStep
    layer: LayerAttention
    mlp: torch.nn.Module
    tp_exchange: Exchange

    def attend(self, query: Tensor, key: Tensor, value: Tensor, value_size: int, num_ranks: int) -> Tensor:
        """All ranks' parts, as `Exchange.gather_partials` gives them: of so many values a head."""
        parts = self.step.exchange.gather_partials(self.step.attend_locally(self.layer, query, key, value))
        return parts if num_ranks == 1 else parts.clone()

    def all_gather(self, mine: Tensor, num_ranks: int, kind: str, is_of_tp: bool) -> Tensor:
        """A copy: a program may read it after the next exchange."""
        return self._exchange(is_of_tp).all_gather(mine, kind).clone()

    def add_up(self, mine: Tensor, is_of_tp: bool) -> Tensor:
        """Of a copy: a large tensor is added up in place."""
        return self._exchange(is_of_tp).add_up(mine.clone())

    def _exchange(self, is_of_tp: bool) -> Exchange:
        return self.tp_exchange if is_of_tp else self.step.exchange

    def experts(self, hidden_states: Tensor) -> Tensor:
        """Of the step's own rows: its fillers are sent to no expert, whose weights would be read for them."""
        own, _ = self.mlp(hidden_states[: self.step.step.num_rows])
        return F.pad(own, (0, 0, 0, 0, 0, self.step.num_fillers)) if self.step.num_fillers else own


_OUTSIDE = {
    getattr(torch.ops.megatron_star, name).default: name
    for name in ("attend", "all_gather", "add_up", "experts")
}


def compiled_in_pieces(program: GraphModule, compiler: Compiler) -> Callable[..., Tensor]:
    """A function of a `RunningLayer` and the program's inputs.

    Args:
        compiler: makes a function of a piece and of inputs like its own; a piece is one itself.

    Raises:
        ValueError: the compiler fails.
    """
    numbers = _piece_numbers(program)
    pieces = split_module(program, None, numbers.__getitem__, keep_original_order=True)
    nodes = list(pieces.graph.nodes)
    with pieces.graph.inserting_before(nodes[0]):
        running = pieces.graph.placeholder("running")
    for node in nodes:
        if node.op == "call_module":
            _put_in_place(pieces, node, running, compiler)
    pieces.recompile()
    return pieces.forward


def _piece_numbers(program: GraphModule) -> dict[Node, int]:
    """In which piece each operation of a program is: those of `_OUTSIDE` are alone in theirs."""
    numbers, number = {}, 0
    for node in program.graph.nodes:
        is_outside = node.target in _OUTSIDE
        number += is_outside
        numbers[node] = number
        number += is_outside
    return numbers


def _put_in_place(pieces: GraphModule, node: Node, running: Node, compiler: Compiler) -> None:
    """Compile the piece that this node calls, or let the running layer do what it stands for."""
    piece = pieces.get_submodule(node.target)
    inputs = [inner for inner in piece.graph.nodes if inner.op == "placeholder"]
    outside = next((inner for inner in piece.graph.nodes if inner.target in _OUTSIDE), None)
    delattr(pieces, node.target)
    if outside is None:
        setattr(pieces, node.target, _compiled_piece(piece, [i.meta["val"] for i in inputs], compiler))
        return
    given = dict(zip(inputs, node.args, strict=True))
    arguments = map_arg(outside.args, given.__getitem__)
    with pieces.graph.inserting_before(node):
        called = pieces.graph.call_method(_OUTSIDE[outside.target], (running, *arguments))
    node.replace_all_uses_with(called)
    pieces.graph.erase_node(node)


def _compiled_piece(piece: GraphModule, inputs: list[Tensor], compiler: Compiler) -> Callable[..., Any]:
    try:
        return compiler(piece, inputs)
    except Exception as error:
        raise ValueError(f"layers could not be compiled: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Of its message that is not empty; its class's name without one."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
