"""Let Megatron-Core run on a machine without CUDA."""

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


def use_cpu_where_cuda_is_absent() -> torch.device:
    """Make `torch.cuda.current_device()` name the CPU if there is no GPU; return the device to use.

    Megatron-Core asks for the current CUDA device in about ten places on the inference path (rotary
    embeddings, gathers over the TP group), always as a `device=` argument, where a `torch.device` also fits.
    Its all-to-all dispatcher of experts makes a stream; here nothing runs on it.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = torch.Stream(cpu)
    return cpu
