"""Models on one GPU, which several ranks share, against a dense forward of Hugging Face's model."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import gpu_ranks
import pytest
import torch
from cases import CASES
from dense import case_logits
from distributed import run_ranks
from models import dense_logits, random_tokens
from pair import Pair
from passed_keys_oracle import answer_by_twin
from passed_keys_ranks import NUM_GENERATED, Case
from random_models import CONFIGS

from benchmarks.random_models import save_random_model
from checkpoints_tools.convert_hf_to_megatron import convert
from megatron_star.attention.kernels import KERNELS
from megatron_star.config import StarConfig

NUM_CONTEXT, NUM_LATER = 150, 9
STARS = [StarConfig(mode="exact"), StarConfig(block_size=32), StarConfig(block_size=32, anchor="recompute")]


def expected_logits(hf, token_ids, config):
    return dense_logits(hf, token_ids, NUM_CONTEXT, config)[NUM_CONTEXT:]


@pytest.mark.parametrize("config", STARS, ids=["exact", "broadcast", "recompute"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_star_in_float32_equals_a_dense_forward(checkpoints, model, num_ranks, config):
    hf, megatron = checkpoints(model)
    token_ids = random_tokens(NUM_CONTEXT + NUM_LATER)
    arguments = (str(megatron), token_ids, NUM_CONTEXT, config, torch.float32)
    expected = expected_logits(hf, token_ids, config)
    for logits in run_ranks(num_ranks, gpu_ranks.star_logits, *arguments):
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_passed_keys_in_float32_equal_a_dense_forward(checkpoints, num_ranks):
    """The slow twin names keys of the same values on the CPU."""
    hf, megatron = checkpoints("llama")
    star = StarConfig(block_size=32, anchor_size=5, passed_keys=8)
    token_ids = random_tokens(NUM_CONTEXT + 1 + NUM_GENERATED)
    arguments = (str(megatron), token_ids, NUM_CONTEXT, star, torch.float32)
    expected, _ = answer_by_twin(hf, tuple(token_ids), Case(star, (NUM_CONTEXT,), query=1))
    for logits in run_ranks(num_ranks, gpu_ranks.star_logits, *arguments):
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kernel", [name for name, info in KERNELS.items() if info.device_type == "cuda"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_star_in_bfloat16_is_as_close_as_rounding_lets_it(gpu, checkpoints, kernel, num_ranks):
    """bf16 moves logits of any implementation; star may move them no further than one rank's exact run."""
    info = KERNELS[kernel]
    if reason := info.obstacle(gpu, torch.bfloat16, 16):
        pytest.skip(reason)
    if not info.is_installed:
        pytest.skip(f"{info.distribution} is not installed")
    hf, megatron = checkpoints("llama")
    token_ids = random_tokens(NUM_CONTEXT + NUM_LATER)

    def error(ranks: int, config: StarConfig, name: str) -> float:
        arguments = (str(megatron), token_ids, NUM_CONTEXT, config, torch.bfloat16, name)
        logits = run_ranks(ranks, gpu_ranks.star_logits, *arguments)[0]
        return (logits - expected_logits(hf, token_ids, config)).pow(2).mean().sqrt().item()

    assert error(num_ranks, StarConfig(block_size=32), kernel) <= 2 * error(
        1, StarConfig(mode="exact"), "torch-efficient"
    )


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_compiled_layers_give_the_same_logits(checkpoints, num_ranks):
    hf, megatron = checkpoints("qwen3")
    token_ids = random_tokens(NUM_CONTEXT + NUM_LATER)
    config = StarConfig(block_size=32)
    arguments = (str(megatron), token_ids, NUM_CONTEXT, config, torch.float32, "auto", "local", [2])
    expected = expected_logits(hf, token_ids, config)
    for logits in run_ranks(num_ranks, gpu_ranks.star_logits, *arguments):
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_transformer_engines_layers_are_as_close_as_local_ones(checkpoints):
    """In bfloat16, since its products of float32 tensors are of TF32."""
    pytest.importorskip("transformer_engine.pytorch", reason="transformer-engine is not installed")
    hf, megatron = checkpoints("llama")
    token_ids = random_tokens(NUM_CONTEXT + NUM_LATER)
    config = StarConfig(block_size=32)
    expected = expected_logits(hf, token_ids, config)

    def error(transformer_impl: str) -> float:
        arguments = (str(megatron), token_ids, NUM_CONTEXT, config, torch.bfloat16, "auto", transformer_impl)
        [logits] = run_ranks(1, gpu_ranks.star_logits, *arguments)
        return (logits - expected).pow(2).mean().sqrt().item()

    assert error("transformer_engine") <= 2 * error("local")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_only_the_kv_stays_in_memory_after_encoding(checkpoints, num_ranks):
    _, megatron = checkpoints("llama")
    arguments = (str(megatron), random_tokens(4_000), StarConfig(block_size=512))
    for kept, kv in run_ranks(num_ranks, gpu_ranks.encoding_memory, *arguments):
        assert kv <= kept <= kv * 1.05 + (1 << 20)


def check_a_family(pair, num_ranks, dtype=torch.float32, ep_size=1):
    """Logits of star are those of transformers with the plan's mask; in bfloat16 nearly."""
    case = CASES["star, one neighbor, in waves"]
    (num_context,) = case.turns
    arguments = (
        str(pair.megatron),
        case.token_ids,
        num_context,
        case.star,
        dtype,
        "auto",
        "local",
        (),
        ep_size,
    )
    expected = case_logits(pair.hf, case)
    for logits in run_ranks(num_ranks, gpu_ranks.star_logits, *arguments):
        found = logits[-len(expected) :]
        if dtype == torch.bfloat16:
            assert (found - expected).norm() <= 0.1 * expected.norm()
            continue
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text"])
def test_windows_sinks_and_two_rotary_bases_give_the_logits_of_transformers(converted, name, num_ranks):
    check_a_family(converted(name), num_ranks)


@pytest.fixture(scope="module")
def of_eights(tmp_path_factory) -> Callable[[str], Pair]:
    """As `converted`; heads of latent attention have sizes that 8 divides, as kernels on CUDA want it."""

    @cache
    def make(name: str) -> Pair:
        config = deepcopy(CONFIGS[name])
        if hasattr(config, "qk_nope_head_dim"):
            config.qk_nope_head_dim = config.v_head_dim = 16
        folder = tmp_path_factory.mktemp(name)
        pair = Pair(folder / "hf", folder / "megatron")
        save_random_model(config, pair.hf)
        convert(*pair)
        return pair

    return make


@pytest.mark.parametrize(("num_ranks", "ep_size"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_experts_and_latent_attention_give_the_logits_of_transformers(of_eights, name, num_ranks, ep_size):
    check_a_family(of_eights(name), num_ranks, ep_size=ep_size)


@pytest.mark.parametrize(("num_ranks", "ep_size"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_grouped_products_and_latent_kernels_of_bfloat16_are_near(of_eights, name, num_ranks, ep_size):
    check_a_family(of_eights(name), num_ranks, torch.bfloat16, ep_size)
