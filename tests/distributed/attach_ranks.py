"""What test_attach.py runs on ranks."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.fusions import fused_softmax
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

import megatron_star as star

SMALL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "use_cpu_initialization": True}
VOCAB_SIZE = 96


def _window_mask(sq: int, sk: int, window_size: tuple[int, int]) -> Tensor:
    """True where a query does not see a key; Megatron makes it on a GPU."""
    seen = torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq - window_size[0]).tril(sk - sq + window_size[1])
    return ~seen


_WINDOW_MASK_ON_CPU = (fused_softmax, "get_sliding_window_causal_mask", _window_mask)


def gpt_model(
    groups: star.StarGroups,
    swap: Callable[[ModuleSpec], Any] = star.with_star_attention,
    options: dict[str, Any] | None = None,
    **config: Any,
) -> GPTModel:
    """A small model as anybody builds it, with the same random weights for the same configuration."""
    with_norms, is_latent = config.get("qk_layernorm", False), "kv_lora_rank" in config
    make_config = MLATransformerConfig if is_latent else TransformerConfig
    model = GPTModel(
        make_config(**SMALL | config),
        swap(get_gpt_layer_local_spec(qk_layernorm=with_norms, multi_latent_attention=is_latent)),
        VOCAB_SIZE,
        512,
        pg_collection=groups.model,
        **{"position_embedding_type": "rope"} | (options or {}),
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=2.0 if name.endswith("softmax_offset") else 0.2)
    return model.eval()


def one_rank() -> star.StarGroups:
    """Groups of a rank that is alone, on a machine that may have no GPU."""
    star.use_cpu_where_cuda_is_absent()
    return star.initialize_groups(tp_size=1, cp_size=dist.get_world_size())


def refusals(fields: dict[str, Any], config: dict[str, Any] | None = None) -> dict[str, str]:
    """For each of these fields of a model's configuration with this value: what `attach` says."""
    groups = one_rank()
    model, said = gpt_model(groups, **config or {}), {}
    config = model.config
    for name, value in fields.items():
        model.config = copy(config)
        setattr(model.config, name, value)
        said[name] = _refusal(lambda: star.attach(model, groups))
    model.config = config
    said["as it is"] = _refusal(lambda: star.attach(model, groups))
    return said


def refused_modules() -> dict[str, str]:
    """What is said of models and specifications whose modules cannot be run."""
    groups = one_rank()

    class Capped(DotProductAttention):
        """Attention with a soft cap, say."""

    def capped(spec: ModuleSpec) -> ModuleSpec:
        spec.submodules.self_attention.submodules.core_attention = Capped
        return spec

    def crossing(spec: ModuleSpec) -> ModuleSpec:
        spec = star.with_star_attention(spec)
        spec.submodules.cross_attention = torch.nn.Identity
        return spec

    def normalised_by_megatrons_router() -> GPTModel:
        model = gpt_model(
            groups,
            swap=lambda _: star.with_star_attention(get_gpt_layer_local_spec(num_experts=2)),
            num_moe_experts=2,
            moe_router_topk=1,
            moe_router_pre_softmax=True,
            moe_router_load_balancing_type="none",
        )
        model.config.moe_router_normalised = True
        return model

    makers = {
        "another router": normalised_by_megatrons_router,
        "no swap": lambda: gpt_model(groups, swap=lambda spec: spec),
        "cross-attention": lambda: gpt_model(groups, swap=crossing),
        "core attention": lambda: gpt_model(groups, swap=lambda spec: star.with_star_attention(capped(spec))),
        "first stage": lambda: gpt_model(groups, options={"post_process": False}),
        "last stage": lambda: gpt_model(groups, options={"pre_process": False}),
        "mrope": lambda: gpt_model(
            groups, options={"position_embedding_type": "mrope"}, mrope_section=[2, 3, 3]
        ),
        "no GPTModel": lambda: torch.nn.Linear(2, 2),
    }
    return {name: _refusal(lambda make=make: star.attach(make(), groups)) for name, make in makers.items()}


def _refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "accepted"


class _LatentCapable(DotProductAttention):
    """Megatron's own, which does not know the sizes that latent attention hands it, nor need them."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)


def _as_megatron_has_it(spec: ModuleSpec) -> ModuleSpec:
    if spec.submodules.self_attention.module is MLASelfAttention:
        spec.submodules.self_attention.submodules.core_attention = _LatentCapable
    return spec


def logits_of_both(
    config: dict[str, Any], options: dict[str, Any], token_ids: list[int], num_context: int, fast: bool
) -> tuple[Tensor, Tensor]:
    """[1 + later tokens, vocabulary]: of the attached model with exact attention, and of Megatron's own."""
    groups = one_rank()
    star_model = star.attach(gpt_model(groups, options=options, **config), groups)
    if fast:
        star_model = star.with_speed(star_model, decode_weights="sliced")
    plan = star.ContextPlan.build(num_context, groups.cp.size(), star.StarConfig(mode="exact"))
    context = star.encode_context(star_model, token_ids[:num_context], plan)
    sequence = star.Sequence(context, tail_rank=groups.cp.size() - 1)
    steps = [token_ids[num_context:-2], token_ids[-2:-1], token_ids[-1:]]
    ours = torch.cat([star.generate_step(star_model, [(sequence, tokens)]) for tokens in steps])
    own = gpt_model(groups, swap=_as_megatron_has_it, options=options, **config)
    length = len(token_ids)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    # Dropout's generator, which is of CUDA and not used in evaluation.
    without_rng = patch.object(
        tensor_parallel, "get_cuda_rng_tracker", lambda: SimpleNamespace(fork=nullcontext)
    )
    with torch.inference_mode(), without_rng, patch.object(*_WINDOW_MASK_ON_CPU):
        theirs = own(torch.tensor([token_ids]), torch.arange(length)[None], future)[0]
    return ours, theirs[-3:].float()
