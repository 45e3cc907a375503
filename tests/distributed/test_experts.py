"""Experts that are spread over ranks answer as transformers' model does, and no rank computes a row twice.

The models have 12 experts, which 1, 2, 3, 4 or 6 ranks can share. The oracle is that of tests/families.
"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "families"))  # cases, dense

from cases import CASES, NUM_GENERATED, Case  # noqa: E402
from dense import case_logits  # noqa: E402
from distributed import run_ranks  # noqa: E402
from expert_ranks import Answers, Spread, answers, together_and_alone, weights_compared  # noqa: E402
from random_models import CONFIGS  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedConfig  # noqa: E402

from benchmarks.random_models import save_random_model  # noqa: E402
from checkpoints_tools.convert_hf_to_megatron import convert  # noqa: E402
from megatron_star.config import StarConfig  # noqa: E402

NUM_EXPERTS, NUM_LAYERS = 12, 3
TO_ONE = "qwen3_moe_not_renormalised"
SPREADS = {
    "EP 2": Spread(1, 2, 2, 1),
    "EP 4": Spread(1, 4, 4, 1),
    "EP 2, twice": Spread(1, 4, 2, 1),
    "TP 2, each expert cut": Spread(2, 1, 1, 2),
    "TP 2, no expert cut": Spread(2, 1, 1, 1),
    "EP 2 within TP 2": Spread(2, 2, 2, 1),
    "EP 4 over TP 2, CP 2": Spread(2, 2, 4, 1),
    "EP 2 over TP 2, CP 2, each expert cut": Spread(2, 2, 2, 2),
    "EP 6 over TP 2, CP 3": Spread(2, 3, 6, 1),
    "EP 3 over TP 2, CP 3, each expert cut": Spread(2, 3, 3, 2),
    "EP 3, across a CP rank's TP ranks": Spread(2, 3, 3, 1),
}
OF_MIXTRAL = ("EP 2", "EP 4 over TP 2, CP 2", "EP 3 over TP 2, CP 3, each expert cut")
OF_GPT_OSS = ("EP 4", "TP 2, each expert cut", "EP 2 over TP 2, CP 2, each expert cut")
"""Its experts have biases."""
OF_SOME_LAYERS = (
    ("qwen2_moe", "EP 2 over TP 2, CP 2, each expert cut"),
    ("glm4_moe", "EP 4 over TP 2, CP 2"),
    ("ernie4_5_moe", "EP 3, across a CP rank's TP ranks"),
)
"""They have dense layers too, each layer with keys of its own, and shared experts."""
RUNS = [
    *(("qwen3_moe", spread) for spread in SPREADS),
    *(("mixtral", spread) for spread in OF_MIXTRAL),
    *(("gpt_oss", spread) for spread in OF_GPT_OSS),
]
USES: list[Case] = [
    CASES["star, no context"],
    Case(StarConfig(block_size=4), turns=(9,)),
    Case(StarConfig(mode="exact", wave_tokens=17)),
    CASES["star, one neighbor, in waves"],
]


def _with_experts(name: str, **changed: object) -> PreTrainedConfig:
    config = CONFIGS[name].to_dict()
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    config |= {next(key for key in keys if key in config): NUM_EXPERTS, **changed}
    return type(CONFIGS[name]).from_dict(config)


@pytest.fixture(scope="module")
def spread_model(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """A model of 12 experts as transformers has it, and converted.

    Of TO_ONE every token chooses one expert, the eighth: the first value of every hidden state is the same,
    since no layer adds to it, and counts for that expert alone.
    """

    @cache
    def make(name: str) -> tuple[Path, Path]:
        directory = tmp_path_factory.mktemp("experts")
        hf, megatron = directory / "hf", directory / "megatron"
        if name == TO_ONE:
            save_random_model(_with_experts(name, num_experts_per_tok=1), hf)
            model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
            model.model.embed_tokens.weight.data[:, 0] = 4.0
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.data[0] = 0.0
                layer.mlp.experts.down_proj.data[:, 0] = 0.0
                layer.post_attention_layernorm.weight.data[0] = 1.0
                layer.mlp.gate.weight.data[7, 0] = 100.0
            model.save_pretrained(hf)
        else:
            save_random_model(_with_experts(name), hf)
        convert(hf, megatron)
        return hf, megatron

    return make


@pytest.fixture(scope="module")
def answers_of(spread_model) -> Callable[[str, str], list[Answers]]:
    """Of every rank."""

    @cache
    def of(name: str, spread: str) -> list[Answers]:
        sizes = SPREADS[spread]
        return run_ranks(sizes.num_ranks, answers, str(spread_model(name)[1]), sizes, USES)

    return of


@pytest.mark.parametrize(("name", "spread"), [*RUNS, *OF_SOME_LAYERS])
def test_experts_over_ranks_answer_as_transformers_does(spread_model, answers_of, name, spread):
    hf, _ = spread_model(name)
    for rank, of_rank in enumerate(answers_of(name, spread)):
        for case, found in zip(USES, of_rank.logits, strict=True):
            expected = case_logits(hf, case)
            largest = (found - expected).abs().max().item()
            assert largest <= 1e-4, f"rank {rank}, {case}: {largest:.2g}"
            assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("name", "spread"), RUNS)
def test_no_row_is_computed_twice_by_the_ranks_that_hold_the_experts(answers_of, name, spread):
    """Each expert is computed in `expert_tp` parts. Ranks with the same experts share rows that differ."""
    sizes, ranks = SPREADS[spread], answers_of(name, spread)
    chosen, num_together = CONFIGS[name].num_experts_per_tok, sizes.ep * sizes.expert_tp
    case = USES[-1]
    encoded = case.turns[-1] * (NUM_LAYERS - 1)  # of the last layer, only the KV is wanted
    assert sum(of.encoding.rows for of in ranks) == sizes.expert_tp * chosen * encoded
    generated = (case.query + NUM_GENERATED) * NUM_LAYERS
    for first in range(0, len(ranks), num_together):
        together = ranks[first : first + num_together]
        assert sum(of.generation.rows for of in together) == sizes.expert_tp * chosen * generated


@pytest.mark.parametrize(("name", "spread"), RUNS)
def test_load_counts_each_choice_of_an_expert_once(answers_of, name, spread):
    ranks, alone = answers_of(name, spread), answers_of(name, "EP 2")
    for phase in ("encoding", "generation"):
        load = sum(getattr(of, phase).load for of in ranks)
        assert torch.equal(load, sum(getattr(of, phase).load for of in alone))
    num_rows = USES[-1].query + NUM_GENERATED
    assert load.sum(1).tolist() == [CONFIGS[name].num_experts_per_tok * num_rows] * NUM_LAYERS


def test_a_rank_without_segments_takes_part_and_its_filler_is_no_row(answers_of):
    assert [of_rank.num_fillers for of_rank in answers_of("qwen3_moe", "EP 4")] == [0, 0, 0, 1]
    test_no_row_is_computed_twice_by_the_ranks_that_hold_the_experts(answers_of, "qwen3_moe", "EP 4")


@pytest.mark.parametrize("spread", ["EP 4", "EP 2, twice"])
def test_token_generation_dispatches_nothing_and_adds_up_once_a_layer(answers_of, spread):
    for of_rank in answers_of("qwen3_moe", spread):
        calls, num_steps = of_rank.generation.calls, 1 + NUM_GENERATED
        assert calls.pop("c10d::allreduce_") == NUM_LAYERS * num_steps
        assert sum(calls.values()) == NUM_LAYERS * num_steps and all("allgather" in name for name in calls)
        assert any("alltoall" in name for name in of_rank.encoding.calls)


@pytest.mark.parametrize("spread", ["EP 2", "EP 6 over TP 2, CP 3"])
def test_all_tokens_may_choose_one_expert(spread_model, answers_of, spread):
    test_experts_over_ranks_answer_as_transformers_does(spread_model, answers_of, TO_ONE, spread)
    ranks = answers_of(TO_ONE, spread)
    load = sum(of.encoding.load for of in ranks)
    assert load[:-1, 7].tolist() == [USES[-1].turns[-1]] * (NUM_LAYERS - 1)
    assert load.sum() == load[:, 7].sum()
    assert sum(of.generation.rows > 0 for of in ranks) == 1


def test_sequences_in_one_step_do_not_see_each_other(spread_model):
    _, megatron = spread_model("qwen3_moe")
    case = Case(StarConfig(block_size=9))
    for pairs in run_ranks(4, together_and_alone, str(megatron), SPREADS["EP 4 over TP 2, CP 2"], case):
        for together, alone in pairs:
            torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_ranks_with_the_same_experts_must_have_the_same_weights_of_them(spread_model):
    spread = SPREADS["EP 2, twice"]
    given = (weights_compared, str(spread_model("qwen3_moe")[1]), spread)
    assert run_ranks(4, *given, None) == ["the same"] * 4
    messages = run_ranks(4, *given, 3)
    assert len(set(messages)) == 1 and messages[0].startswith("rank 3 has read other weights than rank 1:")
