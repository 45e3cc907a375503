"""The stage that compares whole models: every kernel with one kernel, and with a dense forward pass."""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import models as small_models  # of tests/, which scripts/gpu_check.py puts on the path
import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, plan_of
from benchmarks.random_models import save_random_model
from checkpoints_tools.convert_hf_to_megatron import convert
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.attention.kernels import select_kernel
from megatron_star.config import StarConfig
from megatron_star.job.loading import load_star_model
from megatron_star.model.checkpoint import read_checkpoint_info

BASE = "torch-efficient"
NUM_CONTEXT, NUM_QUERY, NUM_STEPS = 2048, 7, 4
SMALL_CONTEXT, SMALL_BLOCK = 150, 32


def parity(bench: Bench) -> None:
    """The model with each kernel against the same with one kernel; a small one against transformers."""
    _against_one_kernel(bench)
    _against_a_dense_forward(bench)


def _against_one_kernel(bench: Bench) -> None:
    """Random weights: logits that differ by rounding differ little, and their largest may change."""
    head_size = bench.shape["kv_channels"]
    names, token_ids = bench.kernels(head_size), bench.tokens(NUM_CONTEXT + NUM_QUERY + NUM_STEPS)
    expected: Tensor | None = None
    for name in sorted(names, key=lambda name: name != BASE):
        with bench.figure("parity", f"{bench.model_name}: {name}") as found:
            kernel = select_kernel(name, device=bench.device, dtype=bench.dtype, head_size=head_size)
            model = replace(bench.star_model, kernel=kernel)
            logits = star_logits(model, token_ids, NUM_CONTEXT, StarConfig(block_size=NUM_CONTEXT // 4))
            expected = logits if expected is None else expected
            found |= {"relative_error": _relative(logits, expected), "finite": bool(logits.isfinite().all())}
            found["same_tokens"] = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()


def _against_a_dense_forward(bench: Bench) -> None:
    """A small Llama: transformers' logits under the plan's mask, in float32."""
    with TemporaryDirectory() as folder:
        hf, megatron = Path(folder) / "hf", Path(folder) / "megatron"
        save_random_model(small_models.MODELS["llama"], hf)
        convert(hf, megatron)
        config = StarConfig(block_size=SMALL_BLOCK)
        token_ids = small_models.random_tokens(SMALL_CONTEXT + NUM_QUERY + NUM_STEPS)
        dense = small_models.dense_logits(hf, token_ids, SMALL_CONTEXT, config)[
            SMALL_CONTEXT + NUM_QUERY - 1 :
        ]
        kinds = [("auto", torch.float32), *((name, bench.dtype) for name in bench.kernels(16))]
        for name, dtype in kinds:
            with bench.figure(
                "parity", f"dense forward: {name}, {str(dtype).removeprefix('torch.')}"
            ) as found:
                info = read_checkpoint_info(str(megatron))
                options = {"device": bench.device, "dtype": dtype, "kernel": name}
                model = load_star_model(info, bench.groups, **options)
                logits = star_logits(model, token_ids, SMALL_CONTEXT, config)
                found |= {"relative_error": _relative(logits, dense), "finite": bool(logits.isfinite().all())}
                found["same_tokens"] = (logits.argmax(-1) == dense.argmax(-1)).float().mean().item()


def star_logits(
    star_model: StarModel, token_ids: SequenceOf[int], num_context: int, config: StarConfig
) -> Tensor:
    """[steps, vocabulary] on the CPU: after a query of NUM_QUERY tokens, and after each token behind it."""
    options = {"mode": config.mode, "block_size": config.block_size}
    plan, _ = plan_of(star_model, num_context, **options)
    sequence = Sequence(encode_context(star_model, token_ids[:num_context], plan), tail_rank=0)
    query, later = token_ids[num_context : num_context + NUM_QUERY], token_ids[num_context + NUM_QUERY :]
    steps = [list(query), *([token] for token in later)]
    return torch.cat([generate_step(star_model, [(sequence, tokens)]).cpu() for tokens in steps])


def _relative(logits: Tensor, expected: Tensor) -> float:
    difference = logits.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()
