"""What ranks run with Megatron-LM's own code: its arguments, its model, its load_checkpoint and saving."""

import io
import sys
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.training import global_vars
from megatron.training.arguments import core_transformer_config_from_args, parse_args
from megatron.training.checkpointing import load_args_from_checkpoint, load_checkpoint
from torch.distributed.checkpoint import FileSystemWriter, save

from checkpoints_tools.megatron_args import args_for_megatron
from checkpoints_tools.whole_sequence import megatron_logits
from megatron_star.model.build import build_gpt_model
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.cpu import use_cpu_where_cuda_is_absent
from megatron_star.model.stored_weights import load_weights
from megatron_star.parallel.groups import initialize_groups

_CPU_FLAGS = (
    *("--transformer-impl", "local"),
    *("--micro-batch-size", "1"),
    *("--ckpt-format", "torch_dist"),
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",
    "--use-cpu-initialization",
    "--use-checkpoint-args",
    "--no-load-optim",
    "--no-load-rng",
    "--exit-on-missing-checkpoint",
)
_make_tensor = torch.tensor


def _tensor_on_cpu(*args: Any, device: object = None, **kwargs: Any) -> torch.Tensor:
    """Stands in for `torch.tensor`: Megatron compares iteration numbers in tensors on `cuda`."""
    return _make_tensor(*args, device=None if device == "cuda" else device, **kwargs)


def load_with_megatron(checkpoint: str, tp_size: int, num_layers: int) -> dict[str, torch.Tensor]:
    """The parameters of a plain GPTModel, built from the checkpoint's `args`, after load_checkpoint."""
    use_cpu_where_cuda_is_absent()
    initialize_groups(tp_size=tp_size, cp_size=1)
    argv = ["megatron", *_CPU_FLAGS, "--load", checkpoint, "--tensor-model-parallel-size", str(tp_size)]
    with (
        patch.object(sys, "argv", argv),
        patch.object(torch, "tensor", _tensor_on_cpu),
        redirect_stdout(io.StringIO()),
    ):
        args = parse_args()
        args, _ = load_args_from_checkpoint(args)
        assert args.num_layers == num_layers
        args.use_dist_ckpt, args.params_dtype = True, torch.float32
        args.norm_epsilon = read_checkpoint_info(checkpoint).args["norm_epsilon"]
        global_vars.set_args(args)
        init_num_microbatches_calculator(0, None, 1, 1, 1)
        try:
            model = _plain_model(args)
            load_checkpoint([model], None, None)
        finally:
            global_vars.unset_global_variables()
            destroy_num_microbatches_calculator()
    return {name: value.clone() for name, value in model.state_dict().items() if value is not None}


def _plain_model(args) -> GPTModel:
    return GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm, normalization=args.normalization
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
    )


def load_with_ours(checkpoint: str, tp_size: int) -> dict[str, torch.Tensor]:
    """The parameters of our model after `load_weights`."""
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=tp_size, cp_size=1)
    info = read_checkpoint_info(checkpoint)
    model = build_gpt_model(info.args, groups.model, dtype=torch.float32, device=device)
    pointers = {name: value.data_ptr() for name, value in model.named_parameters()}
    load_weights(model, info)
    assert pointers == {name: value.data_ptr() for name, value in model.named_parameters()}
    return {name: value.clone() for name, value in model.state_dict().items() if value is not None}


def objects_wanted(checkpoint: str) -> list[str]:
    """The keys of what Megatron's model would load besides tensors."""
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=1, cp_size=1)
    info = read_checkpoint_info(checkpoint)
    state = build_gpt_model(info.args, groups.model, dtype=torch.float32, device=device).sharded_state_dict()
    return [value.unique_key for value in nested_values(state) if isinstance(value, ShardedObject)]


def save_with_megatron(source: str, target: str, tp_size: int, metadata: dict | None) -> None:
    """Save the model of `source` with Megatron's dist_checkpointing, as training does after a step."""
    device = use_cpu_where_cuda_is_absent()
    groups = initialize_groups(tp_size=tp_size, cp_size=1)
    info = read_checkpoint_info(source)
    model = build_gpt_model(info.args, groups.model, dtype=torch.float32, device=device)
    load_weights(model, info)
    state = {
        "args": args_for_megatron(info.args, info.tokenizer_directory, torch.float32),
        "model": model.sharded_state_dict(metadata=metadata),
        "iteration": 7,
        "checkpoint_version": 3.0,
    }
    with patch.object(TorchDistSaveShardedStrategy, "save", _save_in_this_process):
        dist_checkpointing.save(state, target, content_metadata=metadata)
    dist.barrier()


def _save_in_this_process(strategy: object, sharded_state_dict: dict, checkpoint_dir: str) -> None:
    """What the strategy does, without its writer processes, which take half a minute and need psutil."""
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    save(
        mcore_to_pyt_state_dict(by_key, False),
        storage_writer=FileSystemWriter(checkpoint_dir),
        planner=planner,
    )


def logits_of(
    megatron: str, token_ids: list[int], tp_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[tokens, vocabulary]."""
    return megatron_logits(read_checkpoint_info(megatron), token_ids, tp_size=tp_size, dtype=dtype)
