"""The `args` that Megatron-LM finds in a converted checkpoint."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools import latent_in_megatron


def args_for_megatron(model_args: Mapping[str, Any], tokenizer: Path, dtype: torch.dtype) -> Namespace:
    """A complete `args` of a converted checkpoint: the model, and what Megatron's loading looks up in it."""
    theirs = {"apply_layernorm_1p": False, **model_args, **latent_in_megatron.for_megatron(model_args)}
    return Namespace(
        **theirs,
        seq_length=model_args["max_position_embeddings"],
        add_position_embedding=False,
        use_rotary_position_embeddings=theirs["position_embedding_type"] == "rope",
        squared_relu=model_args.get("activation") == "relu2",
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer.absolute()),
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        no_save_optim=True,
        no_save_rng=True,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
