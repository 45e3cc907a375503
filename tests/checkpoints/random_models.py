"""Small random Hugging Face checkpoints, one for each family and each way of the rotary embedding."""

from pathlib import Path

import torch
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    CwmConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    ExaoneConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteSWAConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    HyperCLOVAXConfig,
    InternLM3Config,
    IQuestCoderConfig,
    Jais2Config,
    Llama4TextConfig,
    LlamaConfig,
    MiniCPM3Config,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SarvamMLAConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    VaultGemmaConfig,
    YoutuConfig,
)

VOCAB_SIZE = 259
_WINDOW = 13  # tokens; as tests/families/cases.py says
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Epsilons are large enough to be seen.
_FEW = _SIZES | {"num_hidden_layers": 2, "rms_norm_eps": 1e-3}
_FEW_LAYERNORM = _SIZES | {"num_hidden_layers": 2, "layer_norm_eps": 1e-3}
_PHI3 = {"hidden_size": 64}  # whose heads are a part of it, and whose factors fit them
_HEAD = {"head_dim": 16}  # not hidden_size / num_attention_heads
_DEFAULT = {"rope_type": "default", "rope_theta": 1000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_NTK_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.7, 2.5],
    "long_factor": [1.0, 3.0, 12.0, 48.0],
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA4 = {
    **_SIZES,
    **_HEAD,
    "intermediate_size_mlp": 56,
    "no_rope_layers": [0, 1, 0],
    "attention_chunk_size": _WINDOW,
    "num_local_experts": 3,
    "floor_scale": 7,
    "attn_scale": 0.6,
}

_WINDOW = 13  # see tests/families/cases.py
_FULL, _SLIDING = "full_attention", "sliding_attention"
_GRANITE = {
    "embedding_multiplier": 2.5,
    "attention_multiplier": 0.11,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.7,
}
_GRANITE_DENSE = {
    **_GRANITE,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 56,
    "layer_types": [_FULL] * 2,
    "mamba_n_heads": 2,
}
_GEMMA = {"sliding_window": _WINDOW, "final_logit_softcapping": 11.0, "query_pre_attn_scalar": 24}
# No two sizes are the same.
_LATENT = {
    **_FEW,
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
_LATENT_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
_DEEPSEEK_YARN = _YARN | {"mscale": 0.9, "mscale_all_dim": 0.6, "beta_fast": 16, "beta_slow": 2}
_KIMI_YARN = _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama2": LlamaConfig(**_SIZES | {"num_key_value_heads": 4}, **_HEAD),
    "llama_tied": LlamaConfig(**_SIZES | {"tie_word_embeddings": True}, **_HEAD),
    "llama3_scaled": LlamaConfig(**_SIZES, **_HEAD, rope_parameters=_LLAMA3),
    "mistral": MistralConfig(**_SIZES, **_HEAD, sliding_window=None, rms_norm_eps=1e-5),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen2_yarn": Qwen2Config(**_SIZES, rope_parameters=_YARN),
    "qwen3": Qwen3Config(**_SIZES, **_HEAD),
    "qwen3_yarn_attention_factor": Qwen3Config(
        **_SIZES, **_HEAD, rope_parameters=_YARN | {"attention_factor": 1.3, "truncate": False}
    ),
    "mistral_window": MistralConfig(**_FEW, **_HEAD, sliding_window=_WINDOW),
    "ministral": MinistralConfig(**_FEW, **_HEAD, sliding_window=_WINDOW, layer_types=[_FULL, _SLIDING]),
    "qwen2_windows": Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1
    ),
    "qwen3_windows": Qwen3Config(
        **_SIZES,
        **_HEAD,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=_WINDOW,
        layer_types=[_SLIDING, _FULL, _SLIDING],
    ),
    "ministral3": Ministral3Config(
        **_FEW,
        **_HEAD,
        rope_parameters=_YARN | {"llama_4_scaling_beta": 0.7, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "phi3": Phi3Config(
        **_FEW | _PHI3,
        sliding_window=_WINDOW,
        rope_parameters=_DEFAULT | {"partial_rotary_factor": 0.5},
    ),
    "phi3_longrope": Phi3Config(
        **_FEW | _PHI3,
        # Texts of tests are on both sides of it. Without it, it is 4096, whatever rope_parameters has.
        original_max_position_embeddings=32,
        rope_parameters=_LONGROPE | {"partial_rotary_factor": 0.5},
    ),
    "olmo3": Olmo3Config(
        **_SIZES,
        sliding_window=_WINDOW,
        layer_types=[_SLIDING, _FULL, _SLIDING],
        rope_parameters={
            _SLIDING: _DEFAULT,
            _FULL: _YARN | {"attention_factor": 1.2},
        },
    ),
    "granite_swa": GraniteSWAConfig(
        **_SIZES | {"tie_word_embeddings": True},
        **_GRANITE,
        sliding_window=_WINDOW,
        layer_types=[_FULL, _SLIDING, _SLIDING],
        layer_rope_theta=[10000.0, 500.0, 0],
    ),
    "vaultgemma": VaultGemmaConfig(
        **_FEW | {"tie_word_embeddings": True},
        **_HEAD,
        sliding_window=_WINDOW,
        layer_types=[_FULL, _SLIDING],
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "gemma": GemmaConfig(**_FEW | {"tie_word_embeddings": True}, **_HEAD),
    "cohere": CohereConfig(**_FEW_LAYERNORM | {"tie_word_embeddings": True}, logit_scale=0.4),
    "stablelm": StableLmConfig(
        **_FEW_LAYERNORM, use_qkv_bias=True, rope_parameters=_DEFAULT | {"partial_rotary_factor": 0.25}
    ),
    "stablelm_parallel": StableLmConfig(**_FEW_LAYERNORM, use_parallel_residual=True),
    "smollm3": SmolLM3Config(
        **_SIZES | {"tie_word_embeddings": True, "num_hidden_layers": 4},
        attention_bias=True,
        mlp_bias=True,
        no_rope_layers=[1, 0, 1, 0],
        use_sliding_window=True,
        sliding_window=_WINDOW,
        layer_types=[_FULL, _SLIDING, _SLIDING, _FULL],
    ),
    "olmo2": Olmo2Config(**_FEW, attention_bias=True),
    "granite": GraniteConfig(**_FEW, **_GRANITE, attention_bias=True, mlp_bias=True),
    "granite4_dense": GraniteMoeHybridConfig(
        **_FEW | {"tie_word_embeddings": True}, **_GRANITE_DENSE, position_embedding_type="nope"
    ),
    "hyperclovax": HyperCLOVAXConfig(**_FEW, **_GRANITE),
    "exaone": ExaoneConfig(**_FEW),
    "internlm3": InternLM3Config(**_FEW, **_HEAD, attention_bias=True, mlp_bias=True),
    "iquestcoder": IQuestCoderConfig(**_FEW, **_HEAD),
    "cwm": CwmConfig(
        **_FEW | {"bos_token_id": 0},
        **_HEAD,
        sliding_window=_WINDOW,
        layer_types=[_FULL, _SLIDING],
        rope_parameters=_LLAMA3,
    ),
    "helium": HeliumConfig(**_FEW, **_HEAD | {"head_dim": 18}),
    "jais2": Jais2Config(**_FEW_LAYERNORM),
    "gemma2": Gemma2Config(
        **_SIZES | {"tie_word_embeddings": True},
        **_HEAD,
        **_GEMMA,
        layer_types=[_SLIDING, _FULL, _SLIDING],
        attn_logit_softcapping=3.0,
    ),
    "gemma3_text": Gemma3TextConfig(
        **_SIZES | {"tie_word_embeddings": True},
        **_HEAD,
        **_GEMMA,
        layer_types=[_SLIDING, _FULL, _SLIDING],
        rope_parameters={
            _FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "cohere2": Cohere2Config(
        **_SIZES | {"tie_word_embeddings": True},
        layer_types=[_SLIDING, _FULL, _SLIDING],
        sliding_window=_WINDOW,
        attention_bias=True,
        logit_scale=0.25,
    ),
    "exaone4": Exaone4Config(**_SIZES, layer_types=[_SLIDING, _FULL, _SLIDING], sliding_window=_WINDOW),
    "exaone4_without_windows": Exaone4Config(**_SIZES, layer_types=[_FULL] * 3, sliding_window=None),
    "glm": GlmConfig(**_FEW, **_HEAD),
    "glm4": Glm4Config(**_FEW, **_HEAD),
    "mixtral": MixtralConfig(
        **_SIZES, **_HEAD, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_SIZES, **_HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True
    ),
    "qwen3_moe_not_renormalised": Qwen3MoeConfig(
        **_SIZES,
        **_HEAD,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        norm_topk_prob=False,
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **_SIZES | {"num_hidden_layers": 4},
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=48,
        decoder_sparse_step=2,
        layer_types=[_FULL, _SLIDING, _FULL, _SLIDING],
        use_sliding_window=True,
        sliding_window=_WINDOW,
    ),
    "qwen3_moe_dense_layers": Qwen3MoeConfig(
        **_SIZES,
        **_HEAD,
        attention_bias=True,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "olmoe": OlmoeConfig(
        **_FEW, num_experts=5, num_experts_per_tok=3, attention_bias=True, norm_topk_prob=False
    ),
    "granitemoe": GraniteMoeConfig(
        **_FEW, **_GRANITE, num_local_experts=5, num_experts_per_tok=3, attention_bias=True
    ),
    "glm4_moe": Glm4MoeConfig(
        **_FEW,
        **_HEAD,
        attention_bias=True,
        use_qk_norm=True,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        n_shared_experts=2,
        routed_scaling_factor=1.7,
        first_k_dense_replace=1,
        num_mtp_layers=0,
    ),
    "glm4_moe_groups": Glm4MoeConfig(
        **_FEW,
        **_HEAD,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=40,
        first_k_dense_replace=0,
        num_mtp_layers=0,
    ),
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **_SIZES | {"num_hidden_layers": 4},
        **_HEAD,
        moe_num_experts=6,
        moe_k=2,
        moe_intermediate_size=40,
        moe_num_shared_experts=2,
        moe_layer_interval=2,
    ),
    "llama_biases": LlamaConfig(**_SIZES, **_HEAD, attention_bias=True, mlp_bias=True),
    "seed_oss": SeedOssConfig(**_SIZES, **_HEAD, attention_out_bias=True),
    "arcee": ArceeConfig(**_SIZES, **_HEAD, rope_parameters=_YARN),
    "starcoder2": Starcoder2Config(**_SIZES, sliding_window=_WINDOW),
    "ernie4_5": Ernie4_5Config(**_SIZES, **_HEAD, use_bias=True),
    "nemotron": NemotronConfig(**_SIZES, **_HEAD, mlp_bias=True),
    "hunyuan_v1_dense": HunYuanDenseV1Config(**_SIZES, **_HEAD, rope_parameters=_NTK_ALPHA),
    "apertus": ApertusConfig(
        **_SIZES, **_HEAD, rope_parameters=_LLAMA3 | {"factor": 4.0, "original_max_position_embeddings": 64}
    ),
    "llama4_text_experts": Llama4TextConfig(**_LLAMA4),
    "llama4_text_some_experts": Llama4TextConfig(**_LLAMA4, interleave_moe_layer_step=2),
    "llama4_text": Llama4TextConfig(
        **_LLAMA4,
        moe_layers=[],
        attention_bias=True,
        rope_parameters=_LLAMA3 | {"high_freq_factor": 1.0, "original_max_position_embeddings": 64},
    ),
    "gpt_oss": GptOssConfig(
        **_SIZES,
        **_HEAD,
        sliding_window=_WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=0.8,
        rope_parameters=_YARN | {"truncate": False},
    ),
    "deepseek_v2": DeepseekV2Config(
        **_LATENT,
        **_LATENT_EXPERTS,
        topk_method="group_limited_greedy",
        first_k_dense_replace=1,
        rope_parameters=_DEEPSEEK_YARN,
    ),
    "deepseek_v2_lite": DeepseekV2Config(
        **_LATENT | {"q_lora_rank": None}, **_LATENT_EXPERTS, first_k_dense_replace=0
    ),
    "deepseek_v3": DeepseekV3Config(
        **_LATENT,
        **_LATENT_EXPERTS,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        rope_parameters=_DEEPSEEK_YARN,
    ),
    "deepseek_v3_not_normalised": DeepseekV3Config(
        **_LATENT | {"num_hidden_layers": 1},
        **_LATENT_EXPERTS | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
        first_k_dense_replace=0,
        norm_topk_prob=False,
        num_mtp_layers=0,
    ),
    "sarvam_mla": SarvamMLAConfig(
        **_LATENT | {"q_lora_rank": None},
        **_LATENT_EXPERTS | {"n_group": 1, "topk_group": 1},
        rope_parameters=_KIMI_YARN,
    ),
    "glm4_moe_lite": Glm4MoeLiteConfig(
        **_LATENT, **_LATENT_EXPERTS, mlp_layer_types=["sparse", "dense"], rope_parameters=_DEFAULT
    ),
    "youtu": YoutuConfig(**_LATENT | {"tie_word_embeddings": True}, rope_parameters=_DEFAULT),
    "minicpm3": MiniCPM3Config(
        **_LATENT | {"tie_word_embeddings": True}, scale_emb=3, scale_depth=1.1, dim_model_base=30
    ),
}
AS_OTHERS = ("deepseek_v2_lite", "deepseek_v3_not_normalised", "sarvam_mla", "glm4_moe_lite", "youtu")
"""Of CONFIGS, what is converted otherwise, and whose layers others have as well: not run on all ranks."""
LLAMAS = ("exaone", "internlm3", "iquestcoder")
"""Of CONFIGS, what transformers builds as Llama: its own are a configuration, and names of tensors."""


def random_token_ids(count: int = 45) -> list[int]:
    """Token ids of these models."""
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def hf_logits(directory: Path, token_ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[tokens, vocabulary] of the unmodified Hugging Face model, computed in this dtype."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]
