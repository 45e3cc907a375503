"""Our modules of a layer compute what transformers' classes compute."""

import pytest
import torch
from test_transformer_config import config_of
from transformers.activations import XIELUActivation
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from megatron_star.model.activations import XIELU
from megatron_star.model.layer_spec import layer_spec
from megatron_star.model.logits import soft_capped
from megatron_star.model.norms import RMSNormAfterRotation, norm
from megatron_star.model.residual import ResidualSum
from megatron_star.model.stored_weights import _stored_key

SIZE, EPS = 24, 1e-3
LAYER_NORM = {"normalization": "LayerNorm", "norm_epsilon": EPS}
NORMS = {
    "unit offset": ({"apply_layernorm_1p": True}, lambda: Gemma3RMSNorm(SIZE, EPS)),
    "rms": ({}, lambda: LlamaRMSNorm(SIZE, EPS)),
    "layer norm, unit offset": (
        LAYER_NORM | {"apply_layernorm_1p": True},
        lambda: NemotronLayerNorm1P(SIZE, EPS),
    ),
    "layer norm without a bias": (LAYER_NORM | {"norm_bias": False}, lambda: Cohere2LayerNorm(SIZE, EPS)),
}


def randomised(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """With parameters of which none is 0 or 1."""
    torch.manual_seed(2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=0.4, std=0.7)
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_transformers(name, dtype):
    args, theirs = NORMS[name]
    theirs = randomised(theirs(), dtype)
    ours = norm(config_of(**args), SIZE, EPS).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    hidden_states = (torch.randn(5, 1, SIZE) * 3 + 1).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # some of them round before the weight, too
    torch.testing.assert_close(ours(hidden_states), theirs(hidden_states), atol=tolerance, rtol=tolerance)
    assert ours(hidden_states).dtype == dtype


def test_gemmas_norm_rounds_once():
    theirs = randomised(Gemma3RMSNorm(SIZE, EPS), torch.bfloat16)
    ours = norm(config_of(apply_layernorm_1p=True), SIZE, EPS).bfloat16()
    ours.load_state_dict(theirs.state_dict())
    hidden_states = torch.randn(64, 1, SIZE).bfloat16()
    assert (ours(hidden_states) == theirs(hidden_states)).float().mean() > 0.99


def test_a_norm_without_training_scales_by_one():
    hidden_states = torch.randn(5, SIZE)
    for args, _ in NORMS.values():
        out = norm(config_of(**args), SIZE, EPS)(hidden_states)
        torch.testing.assert_close(out.square().mean(-1), torch.ones(5), atol=0.2, rtol=0)


def test_a_norm_after_rotation_does_nothing_before_it():
    late = randomised(RMSNormAfterRotation(SIZE, EPS))
    x = torch.randn(5, SIZE)
    assert torch.equal(late(x), x)
    plain = LlamaRMSNorm(SIZE, EPS)
    plain.weight = late.weight
    torch.testing.assert_close(late.after_rotation(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xielu_is_transformers_and_has_its_names(dtype):
    theirs = randomised(XIELUActivation(dtype=dtype), dtype)
    ours = XIELU().to(dtype)
    ours.load_state_dict({name: value.view(1) for name, value in theirs.state_dict().items()})
    values = torch.cat([torch.linspace(-4, 4, 101), torch.tensor([0.0, 1e-7, -1e-7])]).to(dtype)
    torch.testing.assert_close(
        ours(values), theirs(values), atol=0, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("placement", ["before", "after", "both"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_residual_sum_is_scaled_after_its_norm(placement, with_bias):
    config = config_of(norm_placement=placement, residual_multiplier=0.3)
    module = randomised(ResidualSum(config))
    output, residual, bias = torch.randn(5, 1, 64), torch.randn(5, 1, 64), torch.randn(64)
    before = residual.clone()
    added = module(False, False)((output, bias if with_bias else None), residual, 0.0)
    expected = output + bias if with_bias else output
    if placement != "before":
        theirs = LlamaRMSNorm(64, config.layernorm_epsilon)
        theirs.weight = module.norm.weight
        expected = theirs(expected)
    torch.testing.assert_close(added, residual + 0.3 * expected)
    assert torch.equal(residual, before), "it is the input of the next one, too"


def test_a_float32_residual_stays_float32():
    module = ResidualSum(config_of(norm_placement="after")).bfloat16()
    residual = torch.randn(5, 1, 64)
    assert module(False, True)((torch.randn(5, 1, 64).bfloat16(), None), residual, 0.0).dtype == torch.float32


def test_logits_are_capped_where_a_model_says_so():
    logits = torch.tensor([-500.0, -3.0, 0.1, 40.0])
    torch.testing.assert_close(
        soft_capped(logits, config_of(logits_softcap=30.0)), 30 * torch.tanh(logits / 30)
    )
    assert torch.equal(soft_capped(logits, config_of()), logits)


@pytest.mark.parametrize(
    "args", [{"norm_placement": "after"}, LAYER_NORM | {"norm_bias": False}, {"parallel_mlp": True}]
)
def test_what_transformer_engine_cannot_compute_is_refused_by_its_name(args):
    name = list(args)[-1]
    with pytest.raises(ValueError, match=f"TransformerEngine's layers do not compute {name}="):
        layer_spec(config_of(**args), "transformer_engine", None)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_norm_before_experts_is_found_under_the_key_that_checkpoints_have(kind):
    ours, stored = (
        f"decoder.layers.mlp.linear_fc1.layer_norm_{kind}",
        f"decoder.layers.pre_mlp_layernorm.{kind}",
    )
    assert _stored_key(ours, {stored: None}) == stored
    assert _stored_key(ours, {ours: None}) == ours
