"""Operations that one layer of token generation starts on a GPU, counted on fake CUDA tensors.

A GPU waits for the host that starts operations one by one, so their number says what a token of few sequences
takes there. It is counted without a GPU and without memory: tensors have shapes, but no values. Counted is
what launches a kernel: torch's operations but views and empty allocations; an attention call as one, and each
Triton kernel as one.

    python -m benchmarks.step_operations
    python -m benchmarks.step_operations --random-model qwen3-moe-1b --sequences 1,64
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import triton
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import SHAPES, Shape
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import attach, tail_layers_of
from megatron_star.algorithm.token_generation import NewTokens, Sequence, TokenGenerationStep, step_inputs
from megatron_star.attention.adapter import KernelInfo, LoadedKernel
from megatron_star.attention.partial import Partial
from megatron_star.config import StarConfig
from megatron_star.job.argument_types import ArgumentParser, positive
from megatron_star.model.build import build_gpt_model
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.parallel.groups import StarGroups, initialize_groups
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.speed.attach import with_speed
from megatron_star.speed.fast_model import FastStarModel

CUDA = torch.device("cuda", 0)
NUM_CONTEXT = 1_000
_LAUNCH_NOTHING = {"_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Operation(NamedTuple):
    """What a layer has started.

    Attributes:
        moves: whether it copies between the host and the GPU, or waits for a value.
    """

    name: str
    moves: bool = False


class Recorder(TorchDispatchMode):
    """Notes the operations that are started while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        namespace, name = function._schema.name.split("::")
        if namespace != "prim" and not function.is_view and name not in _LAUNCH_NOTHING:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            moves = len({tensor.device.type for tensor in tensors}) > 1 or name == "_local_scalar_dense"
            self.operations.append(Operation(name, moves))
        return result

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax_scale: float
    ) -> Partial:
        """In place of a library's kernel, with FlashAttention's layout."""
        self.operations.append(Operation("attention"))
        sq, b, np, _ = query.shape
        out = query.new_empty(b, sq, np, value.size(3)).transpose(1, 2)
        return Partial(out, query.new_empty(b, np, sq, dtype=torch.float32))

    @contextmanager
    def noting_triton(self) -> Iterator[None]:
        """Triton's kernels are noted and not launched, for the time of a `with` block."""

        def run(kernel: triton.JITFunction, *_: object, **__: object) -> None:
            self.operations.append(Operation(kernel.__name__))

        with mock.patch.object(triton.JITFunction, "run", run):
            yield


def operations_of_a_layer(groups: StarGroups, shape: Shape, num_sequences: int) -> list[Operation]:
    """Of the second of two layers, which makes nothing that layers share, in a step of one token for each of
    so many sequences on one context.

    groups: of one rank.
    """
    recorder = Recorder()
    with FakeTensorMode(), torch.no_grad(), recorder.noting_triton(), InferenceMode.active():
        star_model = _fake_model(groups, shape | {"num_layers": 2}, recorder)
        context = _context(star_model)
        new = [NewTokens(Sequence(context, tail_rank=0), [1]) for _ in range(num_sequences)]
        hidden_states = _on_gpu(num_sequences, 1, star_model.model.config.hidden_size)
        for begin in (_first_step, _later_step):
            step = begin(star_model, new)
            star_model.experts.begin(step)
            inputs = {"attention_mask": None, "inference_context": step}
            inputs["rotary_pos_emb"] = star_model.model.rotary_pos_emb((step.position_ids, step.long_rows))
            for layer in star_model.model.decoder.layers:
                recorder.operations.clear()
                with recorder:
                    layer(hidden_states, **inputs)
            for one in new:
                one.sequence.num_tail_tokens += 1
    return recorder.operations


def _fake_model(groups: StarGroups, shape: Shape, recorder: Recorder) -> FastStarModel:
    """Its weights are on a GPU that need not exist."""
    with mock.patch.object(GPTModel, "to", lambda model, **_: model):  # fake weights cannot be converted
        model = build_gpt_model(shape, groups.model, dtype=torch.bfloat16, device=torch.device("cpu"))
    star_model = attach(model, groups, kernel="torch-cpu")
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(_on_gpu(*weight.shape), requires_grad=False)
    kernel = LoadedKernel(
        KernelInfo("fake", load=lambda: recorder.attend, bottom_right=True), recorder.attend
    )
    on_gpu = replace(star_model, kernel=kernel, device=CUDA, tail_layers=tail_layers_of(model))
    return with_speed(on_gpu, decode_weights="whole", cuda_graph="off")


def _context(star_model: FastStarModel) -> EncodedContext:
    config = star_model.model.config
    _, plan = choose_plan(NUM_CONTEXT, 1, StarConfig(mode="exact"), token_costs(config))
    context = EncodedContext(plan, cp_rank=0)
    for layer in star_model.model.decoder.layers:
        key = _on_gpu(NUM_CONTEXT, 1, config.num_query_groups, config.kv_channels)
        context.store(layer.layer_number, 0, key, key)
    return context


def _first_step(star_model: FastStarModel, new: list[NewTokens]) -> TokenGenerationStep:
    """In which tails begin."""
    on_cpu = replace(star_model, device=torch.device("cpu"))  # nothing can be copied to a GPU here
    step = TokenGenerationStep(on_cpu, new)
    step.position_ids = torch.empty(len(new), dtype=torch.int64, device=CUDA)
    return step


def _later_step(star_model: FastStarModel, new: list[NewTokens]) -> TokenGenerationStep:
    """Whose inputs are on a GPU, and were copied there."""
    with unset_fake_temporarily(), mock.patch.object(Tensor, "data_ptr", lambda _: 0):
        on_cpu = replace(star_model, device=torch.device("cpu"))
        inputs = step_inputs(on_cpu, new, range(len(new)))
    inputs.tensor = torch.empty(inputs.host.shape, dtype=torch.int64, device=CUDA)
    return TokenGenerationStep(star_model, new, inputs)


def _on_gpu(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=CUDA)


def main() -> None:
    """Print the operations of a layer, by name."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random-model", choices=SHAPES, default="llama-3.1-8b", help="default: %(default)s")
    parser.add_argument("--sequences", default="1,8", metavar="N[,N...]", help="default: %(default)s")
    args = parser.parse_args()
    use_cpu_where_cuda_is_absent()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = initialize_groups(tp_size=1, cp_size=1)
    for num_sequences in map(positive, args.sequences.split(",")):
        operations = operations_of_a_layer(groups, SHAPES[args.random_model], num_sequences)
        print(f"{args.random_model}, sequences: {num_sequences}: {len(operations)} operations a layer")
        for name, count in Counter(operation.name for operation in operations).most_common():
            print(f"  {count:3} {name}")


if __name__ == "__main__":
    main()
