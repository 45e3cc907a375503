"""What the ranks of a distributed test run; importable by their processes."""

import traceback
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import Mock, patch

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel, attach
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.engine.thread import EngineThread
from megatron_star.job import devices as devices_module
from megatron_star.job.devices import check_gpus_differ
from megatron_star.job.loading import load_star_model
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.expert_layer import moe_layers
from megatron_star.parallel.control import SharedError
from megatron_star.parallel.groups import StarGroups, initialize_groups
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.planning.plan import ContextPlan
from megatron_star.speed import cpu_attention, layout, linear_choice
from megatron_star.speed.attach import with_fast_modules
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.layout import lay_out_for_reading
from megatron_star.speed.sliced_linear import NO_PARTS, SummedLinear

TIMEOUT = timedelta(minutes=1)
ENGINE_LIMITS = {"max_sequence_length": 8192, "budget_bytes_per_rank": 1 << 30}


def gpus_that_differ(uuids: str, backend: str) -> str:
    """What `check_gpus_differ` says where this rank's GPU is the one of its letter."""
    own = ord(uuids[dist.get_rank()])
    with patch.object(devices_module, "gpu_id", lambda device: own):
        try:
            check_gpus_differ(torch.device("cuda", 0), backend, dist.group.WORLD)
        except SharedError as error:
            return str(error)
    return ""


def load(
    checkpoint: str,
    tp_size: int,
    timeout: timedelta = TIMEOUT,
    decode_weights: str = "whole",
    *,
    ep_size: int = 1,
    expert_tp_size: int | None = None,
) -> tuple[FastStarModel, StarGroups]:
    """The checkpoint in float32; all ranks that TP does not take form the CP groups."""
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(
        tp_size=tp_size,
        cp_size=dist.get_world_size() // tp_size,
        ep_size=ep_size,
        expert_tp_size=expert_tp_size,
        timeout=timeout,
    )
    info = read_checkpoint_info(checkpoint)
    star_model = load_star_model(
        info, groups, device=device, dtype=torch.float32, decode_weights=decode_weights
    )
    return star_model, groups


def star_logits(
    checkpoint: str,
    tp_size: int,
    token_ids: SequenceOf[int],
    num_context: int,
    num_query: int,
    configs: SequenceOf[StarConfig],
) -> list[Tensor]:
    """For each configuration, logits [1 + later tokens, vocabulary]: after the query and each later token.

    The later tokens are fed one by one, as decoding does.
    """
    star_model, _ = load(checkpoint, tp_size)
    return [_logits(star_model, list(token_ids), num_context, num_query, config) for config in configs]


def logits_whole_and_sliced(
    model: str | dict[str, Any],
    tp_size: int,
    token_ids: SequenceOf[int],
    num_query: int,
    parts: SequenceOf[frozenset[str]],
    ep_size: int = 1,
) -> list[Tensor]:
    """Logits as `star_logits` returns them, with slices of each of these sets of parts.

    Args:
        model: a checkpoint, or Megatron's arguments of a model with random weights.
    """
    build = random_star_model if isinstance(model, dict) else load
    star_model = build(model, tp_size, ep_size=ep_size)[0]
    star, num_context = StarConfig(block_size=9), len(token_ids) - num_query - 3
    return [
        _logits(replace(star_model, sliced_parts=sliced), list(token_ids), num_context, num_query, star)
        for sliced in parts
    ]


def random_star_model(
    args: dict[str, Any], tp_size: int, *, ep_size: int = 1
) -> tuple[FastStarModel, StarGroups]:
    """A model of these arguments with random weights, biases and norms; ranks with one part have the same."""
    device = use_cpu_where_cuda_is_absent()
    sizes = {"tp_size": tp_size, "cp_size": dist.get_world_size() // tp_size, "ep_size": ep_size}
    groups = initialize_groups(**sizes, timeout=TIMEOUT)
    model = build_gpt_model(args, groups.model, dtype=torch.float32, device=device)
    experts = [layer.experts for layer in moe_layers(model)]
    for group, modules in ((groups.model.tp, [model]), (groups.model.tp_ep, experts)):
        torch.manual_seed(group.rank())
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            torch.nn.init.normal_(parameter, std=0.2)
    return with_fast_modules(attach(model, groups)), groups


def norms_and_mlps(args: dict[str, Any]) -> tuple[str, str]:
    """Names of the classes of a layer's first norm, and of its MLP."""
    layer = random_star_model(args, 1)[0].model.decoder.layers[0]
    return type(layer.input_layernorm).__name__, type(layer.mlp).__name__


def layers_of_sliced_experts(args: dict[str, Any], tp_size: int, ep_size: int) -> int:
    """Whose experts can be sliced."""
    return len(random_star_model(args, tp_size, ep_size=ep_size)[0].slicing.experts)


def sums_of_experts(
    args: dict[str, Any], tp_size: int, ep_size: int, token_ids: SequenceOf[int]
) -> tuple[int, int, int]:
    """Three steps of a token: how often this rank's experts' results were added to those of others, what the
    exchange that did it has sent, and how much of that went through memory that the ranks share.
    """
    star_model, _ = random_star_model(args, tp_size, ep_size=ep_size)
    exchange = star_model.experts.exchange
    costs = token_costs(star_model.model.config)
    _, plan = choose_plan(len(token_ids), star_model.exchange.cp_size, StarConfig(), costs)
    sequence = Sequence(encode_context(star_model, token_ids, plan), tail_rank=0)
    before = exchange.small.num_messages
    exchange.counts.clear()
    for token in token_ids[:3]:
        generate_step(star_model, [(sequence, [token])])
    sent = sum(number for kind, number in exchange.counts.items() if not kind.endswith("bytes"))
    return exchange.counts["sums"], sent, exchange.small.num_messages - before


def sliceable_layers(args: dict[str, Any]) -> dict[str, list[str]]:
    """By part, the names of a model's linear layers that can be sliced."""
    star_model, _ = random_star_model(args, 1)
    names = {module: name for name, module in star_model.model.named_modules()}
    return {part: [names[layer] for layer in of_part] for part, of_part in star_model.slicing.layers.items()}


def slices_in_one_piece(
    args: dict[str, Any], parts: frozenset[str], by_columns: bool | None
) -> dict[str, bool]:
    """By part, whether a rank's slices of all its weights are contiguous, laid out for slices of `parts`.

    Args:
        by_columns: how all that is read was measured to be read fastest; None: it was not measured.
    """
    star_model = random_star_model(args, 1)[0]
    if by_columns is not None:
        always = Mock(get=lambda use, otherwise: by_columns)
        star_model = replace(star_model, by_columns=always)
    lay_out_for_reading(star_model, parts)
    in_one_piece = {}
    for part, layers in star_model.slicing.layers.items():
        in_one_piece[part] = all(
            (layer.weight[:, :3].t() if isinstance(layer, SummedLinear) else layer.weight[:3]).is_contiguous()
            for layer in layers
        )
    return in_one_piece


def measured_choices(checkpoint: str, tp_size: int) -> tuple[Any, ...]:
    """What a model that is loaded is told to do, where each rank measures something else."""

    def seconds_of_this_rank(actions: dict[Any, Any]) -> dict[Any, float]:
        for action in actions.values():
            action()
        return dict(zip(actions, generator.uniform(0.1, 1, len(actions)).tolist(), strict=True))

    generator = numpy.random.default_rng(dist.get_rank())
    with ExitStack() as patched:
        for module in (layout, linear_choice, cpu_attention):
            patched.enter_context(patch.object(module, "least_seconds", seconds_of_this_rank))
        star_model, _ = load(checkpoint, tp_size)
    ways = {
        edge: {rows: way.__name__ for rows, way in of_rows.items()}
        for edge, of_rows in star_model.kernel.attend.chosen.items()
    }
    strides = [weight.stride() for weight in star_model.model.parameters()]
    return star_model.by_columns, star_model.slicing.linear, ways, strides


def weights_read(args: dict[str, Any], token_ids: SequenceOf[int], parts: frozenset[str]) -> tuple[int, bool]:
    """Bytes of the weights that this rank multiplies with to generate a token, and whether all are views."""
    star_model = replace(random_star_model(args, 1)[0], sliced_parts=parts)
    storages = {parameter.untyped_storage().data_ptr() for parameter in star_model.model.parameters()}
    sizes, views = [], []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function is torch.nn.functional.linear:
                sizes.append(arguments[1].nbytes)
                views.append(arguments[1].untyped_storage().data_ptr() in storages)
            return function(*arguments, **(options or {}))

    plan = ContextPlan.build(0, star_model.exchange.cp_size, StarConfig(mode="exact"))
    sequence = Sequence(encode_context(star_model, [], plan), tail_rank=0)
    with Spy():
        generate_step(star_model, [(sequence, token_ids)])
    return sum(sizes), all(views)


def _logits(
    star_model: StarModel, token_ids: list[int], num_context: int, num_query: int, config: StarConfig
) -> Tensor:
    exchange = star_model.exchange
    _, plan = choose_plan(num_context, exchange.cp_size, config, token_costs(star_model.model.config))
    context = encode_context(star_model, token_ids[:num_context], plan)
    sequence = Sequence(context, tail_rank=exchange.cp_size - 1)
    steps = [token_ids[num_context : num_context + num_query]]
    steps += [[token] for token in token_ids[num_context + num_query :]]
    return torch.cat([generate_step(star_model, [(sequence, tokens)]) for tokens in steps])


class NumbersAsText:
    """A tokenizer whose text is the token ids, for models that have none."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """`[3, 7]` is "3 7 "."""
        return "".join(f"{token} " for token in token_ids)


def chosen_parts(checkpoint: str, decode_weights: str) -> frozenset[str]:
    """The parts that this rank slices."""
    return load(checkpoint, 1, decode_weights=decode_weights)[0].sliced_parts


def generate(
    checkpoint: str,
    tp_size: int,
    batches: SequenceOf[SequenceOf[StarRequest]],
    decode_weights: str = "whole",
) -> list[list[StarResult]]:
    """Answer batch after batch on one model; each begins without cached contexts. Workers return nothing."""
    star_model, groups = load(checkpoint, tp_size, decode_weights=decode_weights)
    if dist.get_rank():
        run_worker(star_model, groups.control)
        return []
    engine = StarEngine(star_model, NumbersAsText(), groups.control, **ENGINE_LIMITS)
    results = []
    for batch in batches:
        results.append(engine.generate(batch))
        engine.scheduler.drop_unused_contexts()
    engine.stop()
    return results


def communication(
    checkpoint: str,
    token_ids: SequenceOf[int],
    num_context: int,
    config: StarConfig,
    parts: frozenset[str] = NO_PARTS,
) -> tuple[list[str], list[str], dict[str, int], ContextPlan]:
    """Collectives, as torch's profiler sees them, of encoding a context and of one decoding step.

    Without a mailbox, as on GPUs and on several machines.

    Returns:
        Their names while encoding, while decoding, the exchange's own counts, and the plan.
    """
    star_model = replace(load(checkpoint, 1)[0], sliced_parts=parts)
    exchange = star_model.exchange
    _, plan = choose_plan(num_context, exchange.cp_size, config, token_costs(star_model.model.config))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as encoding:
        context = encode_context(star_model, token_ids[:num_context], plan)
    sequence = Sequence(context, tail_rank=0)
    with patch.object(exchange, "small", None):
        generate_step(star_model, [(sequence, token_ids[num_context:])])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as decoding:
            generate_step(star_model, [(sequence, token_ids[-1:])])
    return _collectives(encoding), _collectives(decoding), dict(exchange.counts), plan


def _collectives(profile: torch.profiler.profile) -> list[str]:
    return [event.name for event in profile.events() if event.name.startswith("c10d::")]


def output_layer_calls(checkpoint: str, token_ids: SequenceOf[int], config: StarConfig) -> list[int]:
    """Rows that went through the output layer while a context was encoded, and while a query was fed."""
    star_model, _ = load(checkpoint, 1)
    _, plan = choose_plan(
        len(token_ids), star_model.exchange.cp_size, config, token_costs(star_model.model.config)
    )
    kind = type(star_model)
    with patch.object(kind, "output_logits", autospec=True, side_effect=kind.output_logits) as layer:
        context = encode_context(star_model, token_ids, plan)
        encoding = _rows(layer)
        generate_step(star_model, [(Sequence(context, tail_rank=0), token_ids[:9])])
        return [encoding, _rows(layer)]


def _rows(output_layer: Mock) -> int:
    return sum(len(call.args[1]) for call in output_layer.call_args_list)


def on_engine(
    checkpoint: str,
    limits: dict,
    use: Callable[[StarEngine | EngineThread], object],
    timeout: timedelta = TIMEOUT,
    started: bool = True,
) -> object:
    """What `use` makes of an engine, in a thread or to be stepped, on the driver; None on workers."""
    star_model, groups = load(checkpoint, 1, timeout)
    for group in (groups.cp, groups.model.tp):  # Megatron's own setting is in whole minutes
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    if dist.get_rank():
        run_worker(star_model, groups.control)
        return None
    engine = StarEngine(star_model, NumbersAsText(), groups.control, **ENGINE_LIMITS | limits)
    thread = EngineThread(engine)
    if started:
        thread.start(lambda error: traceback.print_exception(error))
    try:
        return use(thread if started else engine)
    finally:
        thread.stop()
        engine.stop()
