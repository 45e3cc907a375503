"""What test_rotary_layers.py runs on a rank."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_star.attention.partial import Partial
from megatron_star.model.attention import ForwardPass, LayerAttention
from megatron_star.model.build import build_gpt_model
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.parallel.groups import initialize_groups


class _Kept(ForwardPass):
    """Keeps what layers would attend with."""

    def __init__(self, positions: SequenceOf[int], long_rows: SequenceOf[bool]) -> None:
        super().__init__(torch.tensor(positions), long_rows)
        self.queries_and_keys: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        self.queries_and_keys.append((query, key))
        return Partial(torch.zeros_like(query).permute(1, 2, 0, 3), torch.zeros(1))


@torch.inference_mode()
def queries_and_keys_of_layers(
    args: dict[str, Any],
    positions: SequenceOf[int],
    query: Tensor,
    key: Tensor,
    long_rows: SequenceOf[bool] = (False,),
) -> list[tuple[Tensor, Tensor]]:
    """What the core attention of each layer gets where its projections give these [sq, 1, heads, hn]."""
    assert dist.get_world_size() == 1
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=1, cp_size=1)
    model = build_gpt_model(args, groups.model, dtype=torch.float32, device=device)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    for layer in model.decoder.layers:
        layer.self_attention.get_query_key_value_tensors = lambda *_, **__: (query, key, key)
    kept, token_ids = _Kept(positions, long_rows), torch.zeros(1, len(positions), dtype=torch.int64)
    with InferenceMode.active():
        model(token_ids, token_ids, None, inference_context=kept, runtime_gather_output=True)
    return kept.queries_and_keys
