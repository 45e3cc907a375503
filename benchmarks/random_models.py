"""Hugging Face models with random weights, which tests and benchmarks make here and nowhere else."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def random_hugging_face_model(
    config: PreTrainedConfig, *, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A model of this configuration, as transformers initialises it."""
    with device:  # 8 billion random numbers take a GPU a second and a CPU minutes
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save_random_model(config: PreTrainedConfig, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint of this configuration, the same at every call; biases and norms are random too."""
    torch.manual_seed(0)
    model = random_hugging_face_model(config, device=torch.device("cpu"), dtype=torch.float32)
    biases = {name: value for name, value in model.named_buffers() if name.endswith("correction_bias")}
    for name, parameter in [*model.named_parameters(), *biases.items()]:
        if parameter.dim() == 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    model.to(dtype).save_pretrained(directory)
