"""What the ranks of test_families.py run: a model in all cases, through the commands that ranks get."""

from dataclasses import replace
from typing import NamedTuple

import torch
from cases import CASES, FOR_SPEED, NUM_GENERATED, Case
from compiled_ranks import recorded
from ranks import load
from torch import Tensor

from megatron_star.engine.command import Command, Fed
from megatron_star.engine.executor import RankExecutor
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.longrope import needs_long_factors
from megatron_star.model.stored_weights import load_weights
from megatron_star.parallel.groups import initialize_groups
from megatron_star.speed.compiled_layers import compile_layers
from megatron_star.speed.fast_model import FastStarModel
from megatron_star.speed.sliced_linear import PARTS


class Answers(NamedTuple):
    """Logits of a model, [1 + generated, vocabulary]: after the query, and after each token behind it.

    Attributes:
        sliced: of the case FOR_SPEED, with slices of the weights.
        compiled: of the same with compiled layers, or what these are refused with; None: not tried.
    """

    cases: dict[str, Tensor]
    sliced: Tensor
    compiled: Tensor | str | None


def answers(checkpoint: str, tp_size: int, with_compiled: bool) -> Answers:
    """What this rank answers; all ranks answer the same."""
    star_model, _ = load(checkpoint, tp_size)
    sliced = replace(star_model, sliced_parts=frozenset(PARTS))
    return Answers(
        {name: _logits(star_model, case) for name, case in CASES.items()},
        _logits(sliced, FOR_SPEED),
        _compiled(star_model) if with_compiled else None,
    )


def half_precision_embeddings(checkpoint: str, token_ids: list[int]) -> Tensor:
    """[tokens, hidden size] of the model in bfloat16."""
    groups, info = initialize_groups(tp_size=1, cp_size=1), read_checkpoint_info(checkpoint)
    device = use_cpu_where_cuda_is_absent()
    model = build_gpt_model(info.args, groups.model, dtype=torch.bfloat16, device=device)
    load_weights(model, info)
    ids = torch.tensor([token_ids])
    return model.embedding(ids, torch.zeros_like(ids))[:, 0]


def _compiled(star_model: FastStarModel) -> Tensor | str:
    """The query's rows are filled up to 8."""
    try:
        return _logits(compile_layers(star_model, [1, 8], recorded), FOR_SPEED)
    except ValueError as refusal:
        return str(refusal)


def _logits(star_model: FastStarModel, case: Case) -> Tensor:
    executor, token_ids, last = RankExecutor(star_model), case.token_ids, len(case.turns) - 1
    is_long = needs_long_factors(star_model.model.config, len(token_ids))
    for turn, end in enumerate(case.turns):
        opened = (turn, token_ids[:end], case.star, turn - 1 if turn else None)
        executor.execute(Command(open_context=opened, open_long=is_long))
        for wave in range(len(executor.contexts[turn].plan.waves)):
            executor.execute(Command(encode_wave=(turn, wave)))
    executor.execute(Command(open_sequences=[(0, last, star_model.exchange.cp_size - 1)]))
    rest = token_ids[case.turns[-1] :]
    fed = [rest[: case.query], *([token] for token in rest[case.query :])]
    assert len(fed) == 1 + NUM_GENERATED
    return torch.cat([executor.execute(Command(feed=[Fed(0, tokens)])) for tokens in fed])
