"""What the ranks of test_experts.py run: a model whose experts are spread over ranks, and what they do."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from cases import Case
from ranks import TIMEOUT, load
from torch import Tensor

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.job.loading import check_same_weights
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.expert_layer import moe_layers
from megatron_star.parallel.control import SharedError
from megatron_star.parallel.groups import initialize_groups
from megatron_star.planning.cost_model import choose_plan, token_costs


class Spread(NamedTuple):
    """Over how many ranks a model is spread; the rest of the ranks are CP ranks."""

    tp: int
    cp: int
    ep: int
    expert_tp: int

    @property
    def num_ranks(self) -> int:
        """Of the job."""
        return self.tp * self.cp


class Work(NamedTuple):
    """What this rank did in one phase.

    Attributes:
        rows: that its experts computed, in all layers; with the part of an expert that the rank has.
        calls: of collectives, by torch's names.
        load: [layers, experts], this rank's share.
    """

    rows: int
    calls: Counter[str]
    load: Tensor


class Answers(NamedTuple):
    """Logits of each case, [1 + generated, vocabulary], and the work of the last one.

    Attributes:
        num_fillers: waves of the last case in which this rank has no segment.
    """

    logits: list[Tensor]
    encoding: Work
    generation: Work
    num_fillers: int


def answers(checkpoint: str, spread: Spread, cases: list[Case]) -> Answers:
    """Without a mailbox, as on GPUs and on several machines."""
    star_model, _ = load(checkpoint, spread.tp, ep_size=spread.ep, expert_tp_size=spread.expert_tp)
    star_model.exchange.small = star_model.experts.exchange.small = None
    logits = [_generated(star_model, case, _encoded(star_model, case)) for case in cases[:-1]]
    with _worked(star_model) as encoding:
        context = _encoded(star_model, cases[-1])
    with _worked(star_model) as generation:
        logits.append(_generated(star_model, cases[-1], context))
    rank = star_model.exchange.cp_rank
    num_fillers = sum(all(segment.owner != rank for segment in wave) for wave in context.plan.waves)
    return Answers(logits, *encoding, *generation, num_fillers)


def _encoded(star_model: StarModel, case: Case) -> EncodedContext:
    [end], exchange = case.turns, star_model.exchange
    _, plan = choose_plan(end, exchange.cp_size, case.star, token_costs(star_model.model.config))
    return encode_context(star_model, case.token_ids[:end], plan)


def _generated(star_model: StarModel, case: Case, context: EncodedContext) -> Tensor:
    """Logits [1 + generated, vocabulary]: after the query, and after each token behind it."""
    sequence = Sequence(context, tail_rank=star_model.exchange.cp_size - 1)
    rest = case.token_ids[case.turns[-1] :]
    fed = [rest[: case.query], *([token] for token in rest[case.query :])]
    return torch.cat([generate_step(star_model, [(sequence, tokens)]) for tokens in fed])


@contextmanager
def _worked(star_model: StarModel) -> Iterator[list[Work]]:
    """Has, afterwards, what this rank did meanwhile."""
    work, rows, before = [], [0], star_model.expert_load()
    hooks = [
        layer.experts.register_forward_hook(lambda _, given, __: rows.__setitem__(0, rows[0] + len(given[0])))
        for layer in moe_layers(star_model.model)
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield work
    for hook in hooks:
        hook.remove()
    calls = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
    work.append(Work(rows[0], calls, star_model.expert_load() - before))


def together_and_alone(checkpoint: str, spread: Spread, case: Case) -> list[tuple[Tensor, Tensor]]:
    """Logits of sequences with all in a step and each by itself; they are fed 1, 7 and 2 tokens."""
    star_model, _ = load(checkpoint, spread.tp, ep_size=spread.ep, expert_tp_size=spread.expert_tp)
    cp_size, token_ids = star_model.exchange.cp_size, case.token_ids
    context = _encoded(star_model, case)

    def new_tokens() -> list[tuple[Sequence, list[int]]]:
        fed = token_ids[:1], token_ids[3:10], token_ids[11:13]
        return [(Sequence(context, tail_rank=i % cp_size), tokens) for i, tokens in enumerate(fed)]

    alone = [generate_step(star_model, [new])[0] for new in new_tokens()]
    return list(zip(generate_step(star_model, new_tokens()), alone, strict=True))


def weights_compared(checkpoint: str, spread: Spread, changed: int | None) -> str:
    """The message where one expert's weight of this rank is another, or "the same"."""
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(
        tp_size=spread.tp,
        cp_size=spread.cp,
        ep_size=spread.ep,
        expert_tp_size=spread.expert_tp,
        timeout=TIMEOUT,
    )
    model = build_gpt_model(
        read_checkpoint_info(checkpoint).args, groups.model, dtype=torch.float32, device=device
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    torch.manual_seed(groups.model.tp_ep.rank())
    weights = [weight for layer in moe_layers(model) for weight in layer.experts.parameters()]
    for weight in weights:
        torch.nn.init.normal_(weight)
    if dist.get_rank() == changed:
        weights[-1].data.view(torch.int32).view(-1)[3] ^= 1
    try:
        check_same_weights(model, groups)
    except SharedError as error:
        return str(error)
    return "the same"
