"""Every family, in both phases and on every grid, equals transformers with the plan's mask for its layers.

To add a family: one line in `tests/checkpoints/random_models.py`, a small configuration of it in CONFIGS. Its
layers are of every kind that the family has, and its windows and chunks have `cases.WINDOW` tokens (13).
Every test here runs it by then. `pytest tests/families -k NAME` is one family.

The oracle is `dense.py`. The uses of a model are `cases.py`. A family whose layers cannot be compiled has a
row in NOT_COMPILED.
"""

import pytest
import torch
from cases import CASES, FOR_SPEED, NUM_CONTEXT, WINDOW, Case
from dense import CHUNK, FULL, case_logits, kinds_of_layers, masked_logits
from distributed import run_ranks
from family_ranks import half_precision_embeddings
from random_models import AS_OTHERS, CONFIGS, LLAMAS
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_tools import verify
from megatron_star.config import StarConfig
from megatron_star.model.checkpoint import read_checkpoint_info

TOLERANCE = 1e-4
NAMES = [name for name in CONFIGS if name not in (*AS_OTHERS, *LLAMAS)]
GRIDS = {"CP 1": (1, 1), "CP 2": (1, 2), "CP 3": (1, 3), "TP 2, CP 2": (2, 2)}
PARALLEL = ("cohere", "cohere2", "stablelm_parallel")
NOT_COMPILED = dict.fromkeys(PARALLEL, "layers of ParallelLayer")
"""By `model_type` or small model, what compiling its layers is refused with."""
SEVERAL_KINDS = [name for name in NAMES if {*kinds_of_layers(CONFIGS[name])} != {FULL}]


def difference(found: Tensor, expected: Tensor) -> str | None:
    """What differs, if more than rounding does, or another greedy token."""
    largest = (found - expected).abs().max().item()
    if not largest <= TOLERANCE:
        return f"logits differ by {largest:.2g}"
    if not torch.equal(found.argmax(-1), expected.argmax(-1)):
        return "another greedy token"
    return None


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_equals_transformers_with_the_plans_mask_for_each_kind_of_layer(
    converted, answers_of, name, grid
):
    problems = [
        f"{name}, {grid}, rank {rank}, {use!r}: {problem}"
        for rank, of_rank in enumerate(answers_of(name, *GRIDS[grid]))
        for use, case in CASES.items()
        if (problem := difference(of_rank.cases[use], case_logits(converted(name).hf, case)))
    ]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_slices_of_the_weights_change_no_answer(converted, answers_of, name, grid):
    expected = case_logits(converted(name).hf, FOR_SPEED)
    for of_rank in answers_of(name, *GRIDS[grid]):
        assert not difference(of_rank.sliced, expected), f"{name}, {grid}"


@pytest.mark.parametrize("name", NAMES)
def test_compiled_layers_change_no_answer_or_are_refused_by_name(converted, answers_of, name):
    expected = case_logits(converted(name).hf, FOR_SPEED)
    for of_rank in answers_of(name, *GRIDS["CP 2"]):
        if refusal := NOT_COMPILED.get(name) or NOT_COMPILED.get(CONFIGS[name].model_type):
            assert of_rank.compiled == f"layers cannot be compiled for token generation with {refusal}"
        else:
            assert isinstance(of_rank.compiled, Tensor), of_rank.compiled
            assert not difference(of_rank.compiled, expected), name


@pytest.mark.parametrize("name", NAMES)
def test_verify_finds_the_tensors_and_arguments_of_transformers(converted, name):
    """Its logits are compared in tests/checkpoints, at each TP size."""
    pair = converted(name)
    info = read_checkpoint_info(pair.megatron)
    assert verify.compare_arguments(pair.hf, info) == []
    assert verify.compare_tensors(pair.hf, info).size == 0


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_embeddings_in_half_precision_are_those_of_transformers(converted, name):
    """The factor on them is rounded to their dtype first: 8.5 for 8.485."""
    token_ids = CASES["exact"].token_ids
    [found] = run_ranks(1, half_precision_embeddings, str(converted(name).megatron), token_ids)
    model = AutoModelForCausalLM.from_pretrained(converted(name).hf, dtype=torch.bfloat16)
    assert torch.equal(found, model.get_input_embeddings()(torch.tensor(token_ids)))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_hide_something_from_the_model_of_this_family(converted, name):
    """Otherwise the comparisons of star would show nothing, where a layer has full attention."""
    exact, star = (Case(StarConfig(mode=mode, block_size=9)) for mode in ("exact", "star"))
    largest = (case_logits(converted(name).hf, star) - case_logits(converted(name).hf, exact)).abs().max()
    assert (largest > 100 * TOLERANCE) == (FULL in kinds_of_layers(CONFIGS[name]))


@pytest.mark.parametrize("name", SEVERAL_KINDS)
def test_a_window_of_one_token_more_or_less_shows_in_the_logits(converted, name):
    """Otherwise the comparisons would not find one that is off by one."""
    hf, token_ids = converted(name).hf, CASES["exact"].token_ids
    full = torch.ones(len(token_ids), len(token_ids), dtype=torch.bool).tril()
    expected = masked_logits(hf, token_ids, full)[NUM_CONTEXT:]
    for window in (WINDOW - 1, WINDOW + 1):
        found = masked_logits(hf, token_ids, full, window=window)[NUM_CONTEXT:]
        assert (found - expected).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", SEVERAL_KINDS)
def test_a_model_with_windows_has_the_size_that_the_cases_are_made_for(name):
    config = CONFIGS[name]
    size = "attention_chunk_size" if CHUNK in kinds_of_layers(config) else "sliding_window"
    assert getattr(config, size) == WINDOW


def test_cases_are_rotated_with_the_short_and_with_the_long_factors_of_longrope():
    original = CONFIGS["phi3_longrope"].rope_parameters["original_max_position_embeddings"]
    assert {len(case.token_ids) > original for case in CASES.values()} == {False, True}
