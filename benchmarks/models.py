"""Models to measure: a checkpoint, or random weights in the shape of a known model, without a download."""

from argparse import Namespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.random_models import random_hugging_face_model
from megatron_star.algorithm.star_model import attach
from megatron_star.job.argument_types import ArgumentParser
from megatron_star.job.loading import load_star_model
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.parallel.groups import StarGroups
from megatron_star.planning.known_models import KNOWN_MODELS
from megatron_star.speed.attach import with_speed
from megatron_star.speed.fast_model import FastStarModel

LLAMA = {
    "group_query_attention": True,
    "num_query_groups": 8,
    "kv_channels": 128,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "vocab_size": 128256,
    "padded_vocab_size": 128256,
    "max_position_embeddings": 131072,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "use_rope_scaling": True,
    "rope_scaling_factor": 8.0,
}
GEMMA_3_270M = LLAMA | {
    "num_layers": 18,
    "hidden_size": 640,
    "ffn_hidden_size": 2048,
    "num_attention_heads": 4,
    "num_query_groups": 1,
    "kv_channels": 256,
    "norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    # Of its 262,144 tokens, which would take as long as all of its layers.
    "vocab_size": 32768,
    "padded_vocab_size": 32768,
    "untie_embeddings_and_output_weights": False,
    "rotary_base": 1000000,
    "use_rope_scaling": False,
    "window_rotary_base": 10000,
    "window_size": [511, 0],
    "window_attn_skip_freq": ([1] * 5 + [0]) * 3,
    "qk_layernorm": True,
    "norm_placement": "both",
    "apply_layernorm_1p": True,
    "swiglu": False,
    "activation": "gelu_tanh",
    "gated_mlp": True,
    "embedding_multiplier": 640**0.5,
}
QWEN_3_MOE_1B = LLAMA | {
    "num_layers": 6,
    "hidden_size": 1024,
    "ffn_hidden_size": 768,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "kv_channels": 64,
    "qk_layernorm": True,
    "norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    "vocab_size": 16384,
    "padded_vocab_size": 16384,
    "untie_embeddings_and_output_weights": False,
    "rotary_base": 1000000,
    "use_rope_scaling": False,
    # Each expert as in Qwen3-MoE, gated and of three quarters of the hidden size; 906 million weights of 939.
    "num_experts": 64,
    "moe_router_topk": 16,
    "moe_ffn_hidden_size": 768,
    "moe_router_pre_softmax": False,
}
QWEN_3_30B_A3B = QWEN_3_MOE_1B | {
    "num_layers": 48,
    "hidden_size": 2048,
    "ffn_hidden_size": 6144,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "vocab_size": 151936,
    "padded_vocab_size": 151936,
    "untie_embeddings_and_output_weights": True,
    "num_experts": 128,
    "moe_router_topk": 8,
}
DEEPSEEK_V3 = (
    LLAMA
    | KNOWN_MODELS["deepseek-v3"]
    | {
        "group_query_attention": False,
        "qk_layernorm": True,
        "padded_vocab_size": 129280,
        "rotary_base": 10000,
        "rotary_interleaved": True,
        "use_rope_scaling": False,
        "moe_router_pre_softmax": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_router_topk_scaling_factor": 2.5,
    }
)
Shape = dict[str, Any]
SHAPES: dict[str, Shape] = {
    "tiny": LLAMA
    | {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8}
    | {"kv_channels": 32, "num_query_groups": 2, "vocab_size": 512, "padded_vocab_size": 512},
    "llama-3.2-1b": LLAMA
    | {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32}
    | {"kv_channels": 64, "untie_embeddings_and_output_weights": False},
    "llama-3.1-8b": LLAMA
    | {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32},
    "llama-3.1-70b": LLAMA
    | {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64},
    "qwen3-moe-1b": QWEN_3_MOE_1B,
    "tiny-qwen3-moe": QWEN_3_MOE_1B
    | {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 32, "moe_ffn_hidden_size": 32, "num_experts": 8}
    | {"moe_router_topk": 3, "vocab_size": 512, "padded_vocab_size": 512},
    "qwen3-30b-a3b": QWEN_3_30B_A3B,
    "deepseek-v3": DEEPSEEK_V3,
    "gemma-3-270m": GEMMA_3_270M,
    "tiny-gemma-3": GEMMA_3_270M
    | {"num_layers": 6, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 32, "window_size": [63, 0]}
    | {"window_attn_skip_freq": [1] * 5 + [0], "vocab_size": 512, "padded_vocab_size": 512},
}


def add_random_model_argument(parser: ArgumentParser) -> None:
    """`--random-model NAME`, instead of `--load`."""
    parser.add_argument(
        "--random-model", choices=SHAPES, help="random weights in this shape; --load is then ignored"
    )


def measured_model(args: Namespace, groups: StarGroups, device: torch.device) -> FastStarModel:
    """The model that the arguments name, on this rank."""
    options = {
        "device": device,
        "kernel": args.star_attention_kernel,
        "decode_weights": args.decode_weights,
        "cuda_graph": args.cuda_graph,
    }
    if args.random_model:
        dtype = args.dtype or torch.bfloat16
        options |= {"dtype": dtype, "transformer_impl": args.transformer_impl}
        return random_star_model(SHAPES[args.random_model], groups, **options)
    info = read_checkpoint_info(args.load)
    return load_star_model(info, groups, dtype=args.dtype or info.dtype, **options)


def random_star_model(
    shape: Shape,
    groups: StarGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str = "auto",
    transformer_impl: str = "local",
    decode_weights: str = "auto",
    cuda_graph: str = "auto",
) -> FastStarModel:
    """A model of this shape with random weights."""
    model = build_gpt_model(
        shape, groups.model, dtype=dtype, device=device, transformer_impl=transformer_impl
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    star_model = attach(model, groups, kernel=kernel, vocab_size=shape["vocab_size"])
    return with_speed(star_model, decode_weights=decode_weights, cuda_graph=cuda_graph)


def share_of_a_tp_rank(shape: Shape, tp_size: int, num_layers: int) -> Shape:
    """What one of `tp_size` TP ranks computes of so many layers, as a model of its own."""
    return shape | {
        "num_layers": num_layers,
        "num_attention_heads": shape["num_attention_heads"] // tp_size,
        "num_query_groups": max(1, shape["num_query_groups"] // tp_size),
        "ffn_hidden_size": shape["ffn_hidden_size"] // tp_size,
        "vocab_size": shape["vocab_size"] // tp_size,
        "padded_vocab_size": shape["padded_vocab_size"] // tp_size,
    }


def hugging_face_model(args: Namespace, device: torch.device) -> PreTrainedModel:
    """The same model for transformers: of `--hf`, or with random weights in the shape of `--random-model`."""
    transformers_logging.disable_progress_bar()
    if args.random_model and "num_experts" in SHAPES[args.random_model]:
        raise ValueError(
            f"--hf beside --random-model {args.random_model}: no model of experts is made for it"
        )
    if args.random_model:
        random = random_gemma if "window_size" in SHAPES[args.random_model] else random_llama
        return random(SHAPES[args.random_model], device=device, dtype=args.dtype or torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        args.hf, dtype=args.dtype or torch.float32, attn_implementation="sdpa"
    )
    return model.to(device).eval()


def random_llama(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape for transformers with SDPA, with random weights."""
    config = LlamaConfig(**_hugging_face_sizes(shape))
    return random_hugging_face_model(config, device=device, dtype=dtype)


def random_gemma(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The same of a shape with windows."""
    kinds = ("full_attention", "sliding_attention")
    config = Gemma3TextConfig(
        **_hugging_face_sizes(shape),
        sliding_window=shape["window_size"][0] + 1,
        layer_types=[kinds[windowed] for windowed in shape["window_attn_skip_freq"]],
    )
    return random_hugging_face_model(config, device=device, dtype=dtype)


def _hugging_face_sizes(shape: Shape) -> dict[str, Any]:
    return {
        "num_hidden_layers": shape["num_layers"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["ffn_hidden_size"],
        "num_attention_heads": shape["num_attention_heads"],
        "num_key_value_heads": shape["num_query_groups"],
        "head_dim": shape["kv_channels"],
        "vocab_size": shape["vocab_size"],
        "tie_word_embeddings": not shape["untie_embeddings_and_output_weights"],
        "max_position_embeddings": shape["max_position_embeddings"],
        "attn_implementation": "sdpa",
    }
