"""What the ranks of the GPU tests run; importable by their processes. They share one GPU, but for NCCL."""

import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.attention.kernels import select_kernel
from megatron_star.attention.merge import PartialSum
from megatron_star.config import StarConfig
from megatron_star.job.loading import load_star_model
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.expert_layer import moe_layers
from megatron_star.parallel.exchange import Exchange, SourceTransfers
from megatron_star.parallel.groups import initialize_groups
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.planning.plan import Source
from megatron_star.speed.fast_model import FastStarModel


def load(
    checkpoint: str,
    dtype: torch.dtype,
    kernel: str,
    transformer_impl: str,
    compiled_rows: SequenceOf[int] = (),
    ep_size: int = 1,
    cuda_graph: str = "auto",
) -> FastStarModel:
    """The model on the first GPU; all ranks form one CP group over gloo, which goes through the host."""
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=1, cp_size=dist.get_world_size(), ep_size=ep_size)
    return load_star_model(
        read_checkpoint_info(checkpoint),
        groups,
        device=device,
        dtype=dtype,
        kernel=kernel,
        transformer_impl=transformer_impl,
        compiled_rows=compiled_rows,
        cuda_graph=cuda_graph,
    )


def star_logits(
    checkpoint: str,
    token_ids: SequenceOf[int],
    num_context: int,
    config: StarConfig,
    dtype: torch.dtype,
    kernel: str = "auto",
    transformer_impl: str = "local",
    compiled_rows: SequenceOf[int] = (),
    ep_size: int = 1,
) -> Tensor:
    """[later tokens, vocabulary], float32, on the CPU: logits after each token behind the context."""
    star_model = load(checkpoint, dtype, kernel, transformer_impl, compiled_rows, ep_size)
    sequence = Sequence(encode(star_model, token_ids[:num_context], config), tail_rank=0)
    return torch.cat(
        [generate_step(star_model, [(sequence, [token])]).cpu() for token in token_ids[num_context:]]
    )


def encode(star_model: StarModel, token_ids: SequenceOf[int], config: StarConfig) -> EncodedContext:
    """The encoded context of these tokens."""
    cp_size = star_model.exchange.cp_size
    _, plan = choose_plan(len(token_ids), cp_size, config, token_costs(star_model.model.config))
    return encode_context(star_model, token_ids, plan)


def encoding_memory(checkpoint: str, token_ids: SequenceOf[int], config: StarConfig) -> tuple[int, int]:
    """Bytes that stay allocated on this rank after encoding a context, and bytes of its KV."""
    star_model = load(checkpoint, torch.bfloat16, "auto", "local")
    encode(star_model, token_ids, config)  # libraries take their workspaces once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    context = encode(star_model, token_ids, config)
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before, context.num_bytes


class Replays(NamedTuple):
    """What became of steps that ran with graphs, beside the same steps without.

    Attributes:
        worst: relative difference of logits, of any step and sequence.
        median: the same of half of the steps.
        error: why nothing was captured any more.
        kept_bytes: that stay of a dropped context.
    """

    worst: float
    median: float
    num_captured: int
    num_replayed: int
    error: str | None
    loads_equal: bool = True
    dtype: torch.dtype | None = None
    kept_bytes: int = 0


def replays(differences: SequenceOf[float], star_model: FastStarModel, **more: Any) -> Replays:
    """Of each step's difference, with what the model's graphs say."""
    graphs = star_model.graphs
    of_steps = max(differences), median(differences)
    return Replays(*of_steps, graphs.num_captured, graphs.num_replayed, graphs.error, **more)


def plain_and_graphed(
    checkpoint: str, compiled_rows: SequenceOf[int] = ()
) -> tuple[FastStarModel, FastStarModel]:
    """The same model in bfloat16 without graphs and with them."""
    graphed = load(checkpoint, torch.bfloat16, "auto", "local", compiled_rows, cuda_graph="on")
    return replace(graphed, captures_steps=False), graphed


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of a row."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def plain_and_replayed(
    checkpoint: str,
    num_sequences: int,
    num_contexts: int,
    num_steps: int,
    compiled_rows: SequenceOf[int] = (),
) -> Replays:
    """See `side_by_side`, of the model in this checkpoint."""
    return side_by_side(*plain_and_graphed(checkpoint, compiled_rows), num_sequences, num_contexts, num_steps)


def side_by_side(
    plain: FastStarModel, graphed: FastStarModel, num_sequences: int, num_contexts: int, num_steps: int
) -> Replays:
    """Sequences in turn on some contexts; after a third of the steps one leaves, after two thirds one joins.

    The first is fed a query, so that its tail's buffers grow on the way; both models are fed the same tokens.
    """
    contexts = [encode(plain, range(1 + i, 151 + i), StarConfig(block_size=32)) for i in range(num_contexts)]
    of_plain, of_graphed = (
        [Sequence(contexts[i % num_contexts], tail_rank=0) for i in range(num_sequences)] for _ in range(2)
    )
    loads: list[list[Tensor]] = [[], []]
    differences, query = [], list(range(5, 5 + 24))
    for step in range(num_steps):
        if step == num_steps // 3 and len(of_plain) > 1:
            del of_plain[-1], of_graphed[-1]
        if step == 2 * num_steps // 3:
            for of_model in (of_plain, of_graphed):
                of_model.append(Sequence(contexts[0], tail_rank=0))
        tokens = [query if step == 0 and i == 0 else [7 + step + i] for i in range(len(of_plain))]
        logits = []
        for number, (model, of_model) in enumerate(((plain, of_plain), (graphed, of_graphed))):
            before = model.expert_load().clone()
            logits.append(generate_step(model, list(zip(of_model, tokens, strict=True))))
            loads[number].append(model.expert_load() - before)
        differences.append(relative(logits[1], logits[0]))
    same = all(found.sum() == expected.sum() for expected, found in zip(*loads, strict=True))
    assert not moe_layers(plain.model) or loads[0][-1].sum() > 0
    return replays(differences, graphed, loads_equal=same, dtype=logits[1].dtype)


def contexts_one_after_the_other(checkpoint: str) -> Replays:
    """Each is dropped before the next one is encoded, which may get its memory."""
    plain, graphed = plain_and_graphed(checkpoint)
    differences, allocated = [], []
    for number in range(4):
        context = encode(plain, range(1 + 9 * number, 151 + 9 * number), StarConfig(block_size=32))
        of_plain, of_graphed = Sequence(context, tail_rank=0), Sequence(context, tail_rank=0)
        for step in range(8):
            expected = generate_step(plain, [(of_plain, [step])])
            differences.append(relative(generate_step(graphed, [(of_graphed, [step])]), expected))
        kv = weakref.ref(context)
        del context, of_plain, of_graphed
        assert kv() is None
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    return replays(differences, graphed, kept_bytes=allocated[-1] - allocated[1])


def a_step_that_cannot_be_captured(checkpoint: str) -> Replays:
    """One that asks the device for a value in each layer."""
    plain, graphed = plain_and_graphed(checkpoint)
    for layer in graphed.model.decoder.layers:
        layer.mlp.register_forward_hook(lambda module, arguments, result: (result[0].sum().item(), None)[1])
    context = encode(plain, range(1, 151), StarConfig(block_size=32))
    of_plain, of_graphed = Sequence(context, tail_rank=0), Sequence(context, tail_rank=0)
    differences = []
    for step in range(8):
        expected = generate_step(plain, [(of_plain, [step])])
        found = generate_step(graphed, [(of_graphed, [step])])
        differences.append(relative(found, expected))
    return replays(differences, graphed)


def overlap(num_rows: int, num_anchor: int) -> tuple[float, float, float]:
    """One layer of context encoding on NCCL, one GPU a rank: attention alone, a broadcast alone, and both.

    Returns:
        Milliseconds of each, the median of 20, on this rank.
    """
    torch.cuda.set_device(dist.get_rank())
    device = torch.device("cuda", dist.get_rank())
    group = dist.new_group(backend="nccl")
    exchange = Exchange(group)
    kernel = select_kernel("auto", device=device, dtype=torch.bfloat16, head_size=128)
    query = torch.randn(num_rows, 1, 32, 128, dtype=torch.bfloat16, device=device)
    key, value = torch.randn(2, num_rows, 1, 8, 128, dtype=torch.bfloat16, device=device)
    anchor = Source(0, num_anchor, 0)

    def attention() -> None:
        own = kernel(query, key, value, causal=True, softmax_scale=0.1)
        PartialSum(query).set_rows(0, num_rows, own)

    def send() -> SourceTransfers:
        sent = key[:num_anchor], value[:num_anchor]
        return exchange.broadcast_sources([anchor], lambda _: sent, like=sent)

    def both() -> None:
        transfers = send()
        attention()
        transfers.receive()

    alone, sending = median_ms(attention), median_ms(lambda: send().receive())
    result = alone, sending, median_ms(both)
    dist.destroy_process_group(group)
    return result


def median_ms(function: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of the GPU's own clock, after three warm-up calls."""
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[repeats // 2]


def checkpoint_keys(checkpoint: str) -> tuple[set[str], set[str], list[str]]:
    """Checkpoint keys of the local and of TransformerEngine's layers, and the classes in one of the latter.

    TransformerEngine builds no layer without CUDA, but needs none to build one: it is told a lie meanwhile.
    """
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=1, cp_size=1).model
    args = read_checkpoint_info(checkpoint).args
    keys, is_available = [], torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        for transformer_impl in ("local", "transformer_engine"):
            model = build_gpt_model(
                args, groups, dtype=torch.bfloat16, device=device, transformer_impl=transformer_impl
            )
            tensors = model.sharded_state_dict().values()
            keys.append({tensor.key for tensor in tensors if hasattr(tensor, "key")})
    finally:
        torch.cuda.is_available = is_available
    return *keys, [type(module).__name__ for module in model.decoder.layers[0].modules()]
