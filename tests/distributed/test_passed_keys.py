"""Passed keys on any grid of ranks are those of the definition: every layer and KV head selects its own.

The oracle is `passed_keys_oracle.py`: one dense forward of transformers' model with the mask that a selection
implies. The selection is taken from the run, whose named KV are found again among the context's; and it is
made once more by a slow twin.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from distributed import run_ranks
from models import MODELS, random_tokens
from passed_keys_oracle import Selection, answer_by_twin, logits_of_selection, selection_of_run
from passed_keys_ranks import Answer, Case, answers
from reference import PassingBlocks
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_star.config import StarConfig
from megatron_star.planning.plan import ContextPlan

TOLERANCE = 1e-4
TOKENS = tuple(random_tokens(160))


def case(*turns: int, query: int = 5, **star: int) -> Case:
    """Context ends at the last turn."""
    return Case(StarConfig(**star), turns, query)


CASES = {
    "an anchor, blocks of prime sizes": case(131, block_size=11, anchor_size=3, passed_keys=5),
    "no anchor, a lone block a rank": case(37, block_size=10, anchor_size=0, passed_keys=2),
    "the first block is the anchor": case(61, block_size=9, passed_keys=4),
    "one key": case(61, block_size=7, anchor_size=1, passed_keys=1),
    "one neighbor": case(131, block_size=12, anchor_size=2, neighbor_blocks=1, passed_keys=6),
    "two neighbors, no anchor, waves": case(
        97, block_size=8, anchor_size=0, neighbor_blocks=2, passed_keys=3, wave_tokens=17
    ),
    "blocks spread over ranks": case(61, block_size=31, anchor_size=4, passed_keys=7),
    "blocks spread over ranks, waves within blocks": case(
        131, block_size=33, anchor_size=5, passed_keys=9, wave_tokens=7
    ),
    "waves of whole blocks": case(131, block_size=10, anchor_size=3, passed_keys=4, wave_tokens=20),
    "waves within blocks": case(127, block_size=23, anchor_size=3, passed_keys=6, wave_tokens=5),
    "a token a wave": case(37, block_size=9, anchor_size=2, passed_keys=3, wave_tokens=1),
    "more keys than a block has, halved": case(131, block_size=13, anchor_size=3, passed_keys=20),
    "three turns": case(61, 83, 131, block_size=10, anchor_size=3, passed_keys=5),
    "turns of a lone block each, one neighbor": case(
        13, 29, 47, 59, 71, block_size=16, anchor_size=2, neighbor_blocks=1, passed_keys=5
    ),
    "turns in waves, a query longer than a block": case(
        5, 67, 101, query=19, block_size=14, anchor_size=6, passed_keys=6, wave_tokens=9
    ),
    "so many keys that all are passed": case(
        131, block_size=10, anchor_size=3, passed_keys=160, wave_tokens=23
    ),
    "a lone block": case(19, block_size=20, anchor_size=2, passed_keys=5),
}
FEW = (
    "an anchor, blocks of prime sizes",
    "blocks spread over ranks, waves within blocks",
    "two neighbors, no anchor, waves",
    "three turns",
)
GRIDS = {
    "CP 1": ("llama", 1, 1, CASES),
    "CP 2": ("llama", 1, 2, CASES),
    "CP 3": ("llama", 1, 3, CASES),
    "CP 4": ("llama", 1, 4, CASES),
    "TP 2, CP 2": ("llama_tied", 2, 2, FEW),
    "one KV head on TP 2, CP 2": ("llama_one_kv_head", 2, 2, FEW),
    "caps, windows beside, CP 2": ("gemma2", 1, 2, FEW),
    "two rotary embeddings, windows beside, CP 3": ("gemma3_text", 1, 3, FEW),
    "sinks, windows beside, CP 2": ("gpt_oss", 1, 2, FEW),
}
"""Model, TP size, CP size, names of cases."""


class Run(NamedTuple):
    """Cases on a grid, with what each rank answered."""

    hf: Path
    of_ranks: dict[str, list[Answer]]


@pytest.fixture(scope="module")
def run(checkpoints, converted) -> Callable[[str], Run]:
    """Of a row of GRIDS; once for all tests."""

    @cache
    def of(grid: str) -> Run:
        model, tp_size, cp_size, names = GRIDS[grid]
        hf, megatron = (checkpoints if model in MODELS else converted)(model)
        cases = [CASES[name] for name in names]
        results = run_ranks(tp_size * cp_size, answers, str(megatron), tp_size, list(TOKENS), cases)
        return Run(hf, dict(zip(names, map(list, zip(*results, strict=True)), strict=True)))

    return of


def blocks_of(case: Case) -> PassingBlocks:
    """Of its last context."""
    return PassingBlocks.of(case.turns, case.star)


def difference(found: Tensor, expected: Tensor) -> str | None:
    """What differs, if more than rounding does, or another greedy token."""
    largest = (found - expected).abs().max().item()
    if not largest <= TOLERANCE:
        return f"logits differ by {largest:.2g}"
    return None if torch.equal(found.argmax(-1), expected.argmax(-1)) else "another greedy token"


@pytest.mark.parametrize("grid", GRIDS)
def test_every_rank_equals_a_dense_forward_where_a_slow_twin_selects(run, grid):
    problems = [
        f"{grid}, rank {rank}, {name!r}: {problem}"
        for name, of_ranks in run(grid).of_ranks.items()
        for rank, answer in enumerate(of_ranks)
        if (problem := difference(answer.logits, answer_by_twin(run(grid).hf, TOKENS, CASES[name])[0]))
    ]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_logits_are_those_of_the_keys_that_the_ranks_named(run, grid):
    hf, of_ranks_by_case = run(grid)
    for name, of_ranks in of_ranks_by_case.items():
        selection = selection_of_run(of_ranks, blocks_of(CASES[name]))
        expected = logits_of_selection(hf, TOKENS, CASES[name], selection)
        assert selection and not difference(of_ranks[0].logits, expected), name


@pytest.mark.parametrize("grid", GRIDS)
def test_each_wave_gathers_what_it_sees_once_a_layer_padded_to_the_rank_with_most(run, grid):
    for name, of_ranks in run(grid).of_ranks.items():
        blocks, crosses_ranks = blocks_of(CASES[name]), GRIDS[grid][2] > 1
        gathered = [keys for plan in of_ranks[0].plans for keys in gathered_keys(plan, blocks)]
        key, value = next(kv for answer in of_ranks for kv in answer.named.values())
        num_layers = len(of_ranks[0].held) * crosses_ranks
        num_bytes = num_layers * sum(gathered) * (key[0].nbytes + value[0].nbytes)
        for answer in of_ranks:
            sent = answer.sent.get("passes", 0), answer.sent.get("pass_bytes", 0)
            assert sent == (num_layers * len(gathered), num_bytes), name


def gathered_keys(plan: ContextPlan, blocks: PassingBlocks) -> list[int]:
    """How many keys each rank hands to the all-gather of a layer, for each wave that sees any."""
    of_waves = []
    for wave in plan.waves:
        most: Counter[int] = Counter()
        for block in {blocks.block_of(segment.start) for segment in wave}:
            for earlier in range(blocks.first_whole(block)):
                most[earlier] = max(most[earlier], blocks.num_seen(block, earlier))
        by_rank: Counter[int] = Counter()
        for earlier, num_keys in most.items():
            by_rank[owner_of(plan, blocks.edges[earlier + 1] - 1)] += num_keys
        of_waves.append(max(by_rank.values(), default=0))
    return [num_keys for num_keys in of_waves if num_keys]


def owner_of(plan: ContextPlan, token: int) -> int:
    return next(source.owner for source in plan.stored if source.start <= token < source.end)


def with_heads_swapped(selection: Selection) -> Selection:
    return {layer: heads[::-1] for layer, heads in selection.items()}


def with_keys_of_the_next_block(selection: Selection) -> Selection:
    return {layer: [[*head[1:], head[0]] for head in heads] for layer, heads in selection.items()}


def without_the_anchor(selection: Selection) -> Selection:
    return {layer: [[head[0][3:], *head[1:]] for head in heads] for layer, heads in selection.items()}


def without_the_first_wave(selection: Selection) -> Selection:
    """But for the anchor."""
    return {layer: [[head[0][:3], [], [], *head[3:]] for head in heads] for layer, heads in selection.items()}


def in_another_order(selection: Selection) -> Selection:
    """So other keys are passed to where not all are."""
    return {
        layer: [[head[0], *(block[::-1] for block in head[1:])] for head in heads]
        for layer, heads in selection.items()
    }


def with_one_other_key(selection: Selection) -> Selection:
    """Of one head in one layer, what its fourth block names first."""
    heads = [list(map(list, head)) for head in selection[1]]
    heads[0][3][0] = next(token for token in range(33, 44) if token not in heads[0][3])
    return selection | {1: heads}


@pytest.mark.parametrize(
    "wrong",
    [
        with_heads_swapped,
        with_keys_of_the_next_block,
        without_the_anchor,
        without_the_first_wave,
        in_another_order,
        with_one_other_key,
    ],
)
def test_a_wrong_selection_shows_in_the_logits(checkpoints, wrong):
    """Otherwise the comparisons would show nothing."""
    hf, asked = checkpoints("llama").hf, CASES["an anchor, blocks of prime sizes"]
    expected, selection = answer_by_twin(hf, TOKENS, asked)
    found = logits_of_selection(hf, TOKENS, asked, wrong(selection))
    assert (found - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("passed_keys", [0, 4, 6, 200])
def test_another_number_of_keys_shows_in_the_logits(checkpoints, passed_keys):
    hf, asked = checkpoints("llama").hf, CASES["an anchor, blocks of prime sizes"]
    other = asked._replace(star=replace(asked.star, passed_keys=passed_keys))
    found, expected = (answer_by_twin(hf, TOKENS, one)[0] for one in (other, asked))
    assert (found - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("grid", ["CP 1", "CP 3"])
def test_everything_is_seen_where_all_keys_are_passed(run, grid):
    hf, of_ranks = run(grid)
    exact, tokens = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32), TOKENS[: 131 + 5 + 2]
    expected = exact(torch.tensor([tokens])).logits[0, 131 + 5 - 1 :]
    assert not difference(of_ranks["so many keys that all are passed"][0].logits, expected)
