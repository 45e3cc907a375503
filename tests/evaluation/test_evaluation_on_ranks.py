"""Evaluation and calibration on real ranks, against Hugging Face models."""

import pytest
import torch
from distributed import run_ranks
from evaluation_ranks import comparisons, greedy_answers, masses
from models import MODELS, dense_logits, random_tokens
from reference import PassingBlocks, star_mask
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.answers_of_transformers import greedy_answer
from megatron_star.config import StarConfig
from megatron_star.evaluation.comparison import NUM_LIKELY, ComparedPrompt
from megatron_star.evaluation.sample import greedy_request
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker

EXACT = StarConfig(mode="exact")


@pytest.mark.smollm2
def test_exact_answers_equal_those_of_transformers_sample_by_sample(smollm2):
    hf, megatron = smollm2
    tokenizer = AutoTokenizer.from_pretrained(hf)
    maker = SampleMaker(tokenizer, TaskFiles(), chat=True)
    keys = [("niah_single_1", 400), ("variable_tracking", 500)]
    samples = [maker.make(SampleKey(NamedTask.parse(task), length, 0)) for task, length in keys]
    requests = [greedy_request(tokenizer, sample, EXACT, chat=True) for sample in samples]
    ours = run_ranks(2, greedy_answers, str(megatron), tokenizer, requests)[0]
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    assert ours == [greedy_answer(model, request) for request in requests]


SETTINGS = [
    StarConfig(block_size=20),
    StarConfig(block_size=20, anchor_size=0),
    StarConfig(block_size=10, anchor_size=5, neighbor_blocks=1),
    StarConfig(block_size=100),
]


@pytest.mark.parametrize(("model", "world_size"), [("qwen3", 1), ("qwen3", 2), ("qwen3", 3), ("youtu", 2)])
def test_the_hidden_mass_is_that_of_the_dense_models_attention(checkpoints, converted, model, world_size):
    """Of latent attention too."""
    hf, megatron = (checkpoints if model in MODELS else converted)(model)
    tokens, positions = random_tokens(70), [0, 3, 25, 48, 69]
    found = run_ranks(world_size, masses, str(megatron), tokens, SETTINGS, positions)

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        layers = model(torch.tensor([tokens]), output_attentions=True).attentions
    attention = torch.cat(layers).mean(dim=(0, 1))[positions]
    for setting, *of_ranks in zip(SETTINGS, *found, strict=True):
        mask = star_mask(70, setting.block_size, setting.anchor_size, setting.neighbor_blocks)
        expected = attention.masked_fill(mask[positions], 0.0).sum(1).mean().item()
        assert of_ranks == pytest.approx([expected] * world_size, abs=1e-5)


PASSING = [
    StarConfig(block_size=10, anchor_size=4, passed_keys=3),
    StarConfig(block_size=10, anchor_size=0, passed_keys=4),
    StarConfig(block_size=20, anchor_size=20, passed_keys=7),
    StarConfig(block_size=10, anchor_size=6, passed_keys=30, neighbor_blocks=1),
    StarConfig(block_size=10, anchor_size=4, passed_keys=0),
]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_keys_that_are_passed_are_not_hidden(checkpoints, world_size):
    """Each key head of each layer of the dense model names keys of its own, by the slow twin."""
    hf, megatron = checkpoints("qwen3")
    tokens, positions = random_tokens(70), [0, 3, 25, 48, 69]
    found = run_ranks(world_size, masses, str(megatron), tokens, PASSING, positions)

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        answer = model(torch.tensor([tokens]), output_attentions=True, use_cache=True)
    heads_of_a_group = model.config.num_attention_heads // model.config.num_key_value_heads
    for setting, *of_ranks in zip(PASSING, *found, strict=True):
        blocks, shares = PassingBlocks.of([70], setting), []
        for attention, layer in zip(answer.attentions, answer.past_key_values.layers, strict=True):
            for group, key in enumerate(layer.keys[0]):
                mask = blocks.mask(blocks.name(key))
                heads = attention[0, group * heads_of_a_group : (group + 1) * heads_of_a_group]
                shares.append(heads[:, positions].masked_fill(mask[positions], 0.0).sum(2).mean())
        assert of_ranks == pytest.approx([torch.stack(shares).mean().item()] * world_size, abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_hidden_mass_of_a_model_with_windows_is_that_of_its_other_layers(converted, world_size):
    hf, megatron = converted("gpt_oss")
    tokens, positions = random_tokens(70), [0, 3, 25, 48, 69]
    found = run_ranks(world_size, masses, str(megatron), tokens, SETTINGS, positions)

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        layers = model(torch.tensor([tokens]), output_attentions=True).attentions
    full = [kind == "full_attention" for kind in model.config.layer_types]
    weights = torch.cat([layer for layer, is_full in zip(layers, full, strict=True) if is_full])
    # What a sink takes is left out, as it hides nothing.
    attention = (weights / weights.sum(-1, keepdim=True)).mean(dim=(0, 1))[positions]
    for setting, *of_ranks in zip(SETTINGS, *found, strict=True):
        mask = star_mask(70, setting.block_size, setting.anchor_size, setting.neighbor_blocks)
        expected = attention.masked_fill(mask[positions], 0.0).sum(1).mean().item()
        assert of_ranks == pytest.approx([expected] * world_size, abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_comparison_is_that_of_two_dense_models(checkpoints, world_size):
    hf, megatron = checkpoints("qwen3")
    prompt = ComparedPrompt(random_tokens(60, seed=1), random_tokens(5, seed=2), None, 6)
    star = StarConfig(block_size=12, anchor_size=4)
    settings = {"star": star, "one block": StarConfig(block_size=60)}
    (answer, compared), *others = run_ranks(world_size, comparisons, str(megatron), prompt, settings)
    tokens = answer.tokens
    assert all(other[0].tokens == tokens for other in others)

    shown = [*prompt.context, *prompt.query, *tokens[:-1]]
    exact, changed = (dense_logits(hf, shown, 60, config)[64:].log_softmax(-1) for config in (EXACT, star))
    assert tokens == exact.argmax(-1).tolist()
    assert compared["star"].same_first_token == (changed[0].argmax() == tokens[0])
    assert compared["star"].changed == (changed.argmax(-1).tolist() != tokens)
    likely = exact.topk(NUM_LIKELY).indices
    assert answer.likely == likely.tolist()
    p, q = (
        torch.cat((of, 1 - of.sum(1, keepdim=True)), 1)
        for of in (probabilities.double().exp().gather(1, likely) for probabilities in (exact, changed))
    )
    assert compared["star"].kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-4)
    over_the_vocabulary = (exact.exp() * (exact - changed)).sum(-1).mean().item()
    assert 0 < compared["star"].kl < over_the_vocabulary + 1e-4
    assert compared["star"].flops < answer.flops
    same = compared["one block"]
    assert (same.same_first_token, same.changed, answer.hidden_masses["one block"]) == (True, False, 0.0)
    assert same.kl < 1e-5


def test_an_answer_ends_with_the_end_token(checkpoints):
    _, megatron = checkpoints("qwen3")
    prompt = ComparedPrompt(random_tokens(60, seed=1), random_tokens(5, seed=2), None, 6)
    ((answer, _),) = run_ranks(1, comparisons, str(megatron), prompt, {})
    full = answer.tokens
    ended = ComparedPrompt(prompt.context, prompt.query, full[2], 6)
    ((answer, _),) = run_ranks(1, comparisons, str(megatron), ended, {})
    assert answer.tokens == full[: full.index(full[2]) + 1]
