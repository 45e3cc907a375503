"""How fast a plan's work could be: its matrix products and its attention calls, and nothing else.

Measured on all ranks at once, beside the real encodings, with the model's own weights and kernel and the
sizes of the plan's waves: no norms, activations, rotary angles, copies, merges or communication, and nothing
that finds the keys to pass.
"""

from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_star.algorithm.star_model import StarModel
from megatron_star.planning.plan import ContextPlan, Wave
from megatron_star.planning.reads import wave_reads

LAYERS_TIMED = 2


class Floor(NamedTuple):
    """Seconds of one rank for all layers: of its matrix products, and of its attention calls."""

    linear_s: float
    attention_s: float


@torch.inference_mode()
def floor_of(star_model: StarModel, plan: ContextPlan) -> Floor:
    """Of this rank; the others must measure theirs at the same time."""
    waves = [_wave_floor(star_model, plan, wave) for wave in plan.waves]
    return Floor(sum(wave.linear_s for wave in waves), sum(wave.attention_s for wave in waves))


def _wave_floor(star_model: StarModel, plan: ContextPlan, wave: Wave) -> Floor:
    own = [segment for segment in wave if segment.owner == star_model.exchange.cp_rank]
    num_rows = sum(segment.num_rows for segment in own)
    layers = star_model.model.decoder.layers[:LAYERS_TIMED]
    qkv = [layer.self_attention.linear_qkv.weight for layer in layers]
    others = [layer.self_attention.linear_proj.weight for layer in layers]
    others += [part.weight for layer in layers for part in (layer.mlp.linear_fc1, layer.mlp.linear_fc2)]
    dist.barrier()
    qkv_s, others_s = (
        sum(_product_seconds(star_model, num_rows, weight) for weight in weights) / len(layers)
        for weights in (qkv, others)
    )
    attention_s = sum(_attention_seconds(star_model, plan, wave, num_rows) for _ in layers) / len(layers)
    num_layers = star_model.model.config.num_layers
    # Of the last layer only keys and values are computed.
    return Floor(num_layers * qkv_s + (num_layers - 1) * others_s, (num_layers - 1) * attention_s)


def _product_seconds(star_model: StarModel, num_rows: int, weight: Tensor) -> float:
    inputs = torch.randn(num_rows, weight.size(1), dtype=weight.dtype, device=weight.device)
    return _seconds(star_model, lambda: star_model.slicing.linear(inputs, weight))


def _attention_seconds(star_model: StarModel, plan: ContextPlan, wave: Wave, num_rows: int) -> float:
    config = star_model.model.config
    calls = _attention_calls(plan, wave, star_model.exchange.cp_rank)
    kind = {"dtype": config.params_dtype, "device": star_model.device}
    query = torch.randn(num_rows, 1, config.num_attention_heads, config.kv_channels, **kind)
    most_keys = max((keys for _, keys, _ in calls), default=0)
    key = torch.randn(most_keys, 1, config.num_query_groups, config.kv_channels, **kind)

    def attend() -> None:
        for rows, keys, causal in calls:
            star_model.kernel(query[:rows], key[:keys], key[:keys], causal=causal, softmax_scale=0.125)

    return _seconds(star_model, attend)


def _attention_calls(plan: ContextPlan, wave: Wave, rank: int) -> list[tuple[int, int, bool]]:
    """Rows, keys and whether it is causal, of each call for a layer."""
    sizes = [s.num_rows for s in wave if s.owner == rank]
    calls = [(size, size, True) for size in sizes]
    for read in wave_reads(plan, wave, rank):
        calls += [(end - start, read.source.end - read.source.start, False) for start, end in read.rows]
    passed = ((s.num_rows, plan.mask.num_passed(s.start)) for s in wave if s.owner == rank)
    return calls + [(rows, keys, False) for rows, keys in passed if keys]


def _seconds(star_model: StarModel, work) -> float:
    """Of the second of two times: the first one fetches memory from the system."""
    for _ in range(2):
        start = perf_counter()
        work()
        star_model.synchronize()
        seconds = perf_counter() - start
    return seconds
