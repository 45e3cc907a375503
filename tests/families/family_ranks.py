"""What the ranks of test_families.py run: a model in all cases, through the commands that ranks get."""

from dataclasses import replace
from typing import NamedTuple

import torch
from cases import CASES, FOR_SPEED, NUM_GENERATED, Case
from compiled_ranks import recorded
from ranks import load
from torch import Tensor
from turns import opened_turn

from megatron_star.engine.command import Command, Fed, OpenedContext
from megatron_star.engine.executor import RankExecutor
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.longrope import needs_long_factors
from megatron_star.model.stored_weights import load_weights
from megatron_star.parallel.groups import initialize_groups
from megatron_star.planning.layer_mask import LayerMask, layer_masks
from megatron_star.planning.mask import mask_of_turns
from megatron_star.planning.shared_prefix import num_kept_tokens, num_shared_tokens
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


def _opened(case: Case, masks: tuple[LayerMask | None, ...]) -> list[OpenedContext]:
    """Contexts of which the last one is the case's: each extends the one before, or a prefix of another's."""
    token_ids, star, turns = case.token_ids, case.star, case.turns
    if not case.other:
        return [opened_turn(turn, token_ids, star, turns) for turn in range(len(turns))]
    num_common, other_turns = case.other
    other = [*token_ids[:num_common], *token_ids[: other_turns[-1] - num_common]]
    num_shared = num_shared_tokens(mask_of_turns(star, turns), mask_of_turns(star, other_turns))
    own_masks = {mask for mask in masks if mask}
    num_reused = num_kept_tokens(own_masks, min(num_shared, num_common), other_turns[-1])
    assert num_reused or own_masks
    parent = (0, num_reused) if num_reused else None
    return [
        OpenedContext(0, other, star, other_turns),
        OpenedContext(1, token_ids[num_reused : turns[-1]], star, turns, parent),
    ]


def _logits(star_model: FastStarModel, case: Case) -> Tensor:
    executor, token_ids = RankExecutor(star_model), case.token_ids
    is_long = needs_long_factors(star_model.model.config, len(token_ids))
    for opened in _opened(case, layer_masks(star_model.model.config)):
        executor.execute(Command(open_context=opened._replace(is_long=is_long)))
        for wave in range(len(executor.contexts[opened.context_id].plan.waves)):
            executor.execute(Command(encode_wave=(opened.context_id, wave)))
    executor.execute(Command(open_sequences=[(0, opened.context_id, star_model.exchange.cp_size - 1)]))
    rest = token_ids[case.turns[-1] :]
    fed = [rest[: case.query], *([token] for token in rest[case.query :])]
    assert len(fed) == 1 + NUM_GENERATED
    return torch.cat([executor.execute(Command(feed=[Fed(0, tokens)])) for tokens in fed])
