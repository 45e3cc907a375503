"""What the ranks of the GPU tests run; importable by their processes. They share one GPU, but for NCCL."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

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
from megatron_star.parallel.exchange import Exchange, SourceTransfers
from megatron_star.parallel.groups import initialize_groups
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.planning.plan import Source


def load(
    checkpoint: str,
    dtype: torch.dtype,
    kernel: str,
    transformer_impl: str,
    compiled_rows: SequenceOf[int] = (),
    ep_size: int = 1,
) -> StarModel:
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
