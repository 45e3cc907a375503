"""What runs at the same time on a GPU, and what can be recorded once and replayed."""

import gpu_ranks
import pytest
import torch
from distributed import run_ranks
from torch import Tensor

from megatron_star.attention.kernels import select_kernel
from megatron_star.attention.merge import PartialSum


def test_the_anchors_broadcast_hides_behind_the_local_attention():
    """Both together take little longer than the longer of them; NCCL wants a GPU for each rank."""
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL gives each rank a GPU of its own, and there is one here")
    for attention, broadcast, both in run_ranks(2, gpu_ranks.overlap, 16_384, 8_192):
        assert both < max(attention, broadcast) + 0.5 * min(attention, broadcast)


@pytest.mark.parametrize("tail_rows", [1, 5])
def test_a_decoding_steps_attention_is_captured_in_a_cuda_graph(gpu, tail_rows):
    """Attention to context and tail and their merge, for new values in the same places."""
    kernel = select_kernel("auto", device=gpu, dtype=torch.bfloat16, head_size=64)
    query, *kv = (
        torch.randn(rows, 1, heads, 64, dtype=torch.bfloat16, device=gpu)
        for rows, heads in [(1, 8), (1_000, 2), (1_000, 2), (tail_rows, 2), (tail_rows, 2)]
    )

    def step() -> Tensor:
        partials = PartialSum(query)
        for key, value in (kv[:2], kv[2:]):
            partials.add_rows(0, 1, kernel(query, key, value, causal=False, softmax_scale=0.1))
        return partials.result()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for tensor in (query, *kv):
        tensor.normal_()
    graph.replay()
    torch.testing.assert_close(replayed, step(), atol=1e-2, rtol=1e-2)
