"""Models to measure: a checkpoint, or random weights in the shape of a known model, without a download."""

from argparse import Namespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from launch.argument_types import ArgumentParser
from megatron_star.attention.kernels import select_kernel
from megatron_star.inference.decode_weights import choose_sliced_parts
from megatron_star.inference.loading import lay_out_for_reading, load_star_model
from megatron_star.inference.star_model import StarModel
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.parallel.exchange import Exchange
from megatron_star.parallel.groups import StarGroups

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
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA
    | {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32}
    | {"kv_channels": 64, "untie_embeddings_and_output_weights": False},
    "llama-3.1-8b": LLAMA
    | {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32},
    "llama-3.1-70b": LLAMA
    | {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64},
}


def add_random_model_argument(parser: ArgumentParser) -> None:
    """`--random-model NAME`, instead of `--load`."""
    parser.add_argument(
        "--random-model", choices=SHAPES, help="random weights in this shape; --load is then ignored"
    )


def measured_model(args: Namespace, groups: StarGroups, device: torch.device) -> StarModel:
    """The model that the arguments name, on this rank."""
    if args.random_model:
        return _random_model(args, groups, device)
    info = read_checkpoint_info(args.load)
    dtype = args.dtype or info.dtype
    return load_star_model(
        info,
        groups,
        device=device,
        dtype=dtype,
        kernel=args.star_attention_kernel,
        decode_weights=args.decode_weights,
    )


def hugging_face_model(args: Namespace) -> PreTrainedModel:
    """The same model for transformers: of `--hf`, or with random weights in the shape of `--random-model`."""
    transformers_logging.disable_progress_bar()
    if not args.random_model:
        return AutoModelForCausalLM.from_pretrained(
            args.hf, dtype=args.dtype or torch.float32, attn_implementation="sdpa"
        ).eval()
    shape = SHAPES[args.random_model]
    config = LlamaConfig(
        num_hidden_layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["ffn_hidden_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_query_groups"],
        vocab_size=shape["vocab_size"],
        tie_word_embeddings=not shape["untie_embeddings_and_output_weights"],
        max_position_embeddings=shape["max_position_embeddings"],
        attn_implementation="sdpa",
        dtype=args.dtype or torch.bfloat16,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def _random_model(args: Namespace, groups: StarGroups, device: torch.device) -> StarModel:
    shape, dtype = SHAPES[args.random_model], args.dtype or torch.bfloat16
    model = build_gpt_model(
        shape, groups.model, dtype=dtype, device=device, transformer_impl=args.transformer_impl
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    lay_out_for_reading(model)
    exchange = Exchange(groups.cp)
    return StarModel(
        model=model,
        exchange=exchange,
        kernel=select_kernel(
            args.star_attention_kernel, device=device, dtype=dtype, head_size=shape["kv_channels"]
        ),
        vocab_size=shape["vocab_size"],
        device=device,
        sliced_parts=choose_sliced_parts(args.decode_weights, model, exchange),
    )
