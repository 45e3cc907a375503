"""How many operations a layer of token generation starts on a GPU, on tensors that are not there."""

import pytest
import torch.distributed as dist

from benchmarks.models import SHAPES
from benchmarks.step_operations import operations_of_a_layer
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.parallel.groups import destroy_groups, initialize_groups


@pytest.fixture(scope="module")
def groups():
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    use_cpu_where_cuda_is_absent()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield initialize_groups(tp_size=1, cp_size=1)
    destroy_groups()


@pytest.mark.parametrize(("num_sequences", "most"), [(1, 15), (8, 15)])
def test_a_layer_of_8b_starts_few_operations_and_moves_nothing_to_or_from_the_host(
    groups, num_sequences, most
):
    operations = operations_of_a_layer(groups, SHAPES["llama-3.1-8b"], num_sequences)
    assert len(operations) <= most, operations
    assert not any(operation.moves for operation in operations), operations
