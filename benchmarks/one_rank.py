"""Time to first token on one rank, exact: ours, Hugging Face transformers with SDPA, and Megatron itself.

    OMP_NUM_THREADS=2 python benchmarks/one_rank.py --load .demo/megatron --hf .demo/hf \\
        --num-tokens 4K --repeats 3 --output result.json

The same weights, threads and tokens, in float32; each computes the logits of the last token only. Megatron's
is a prefill with its StaticInferenceContext, which is what its static engine runs.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks  # noqa: F401, I001  first, since it silences what Megatron-Core says at import
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.encoding_variants import engine_wave_tokens
from benchmarks.measuring import measure_rounds, median_ratio, run_on_ranks
from megatron_star.job.argument_types import ArgumentParser, token_count
from megatron_star.config import StarConfig
from megatron_star.planning.cost_model import choose_plan, token_costs
from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence, generate_step
from megatron_star.model.architecture import ModelParallelSizes, gpt_model_arguments, transformer_config
from megatron_star.model.layer_spec import layer_spec
from megatron_star.model.checkpoint import read_checkpoint_info
from megatron_star.model.stored_weights import load_weights
from megatron_star.parallel.groups import StarGroups

OURS, HUGGING_FACE, MEGATRON = "megatron-star, exact", "transformers, SDPA", "Megatron, static"
NUM_QUERY_TOKENS = 256
FirstToken = Callable[[list[int]], int]


def ours(star_model: StarModel) -> FirstToken:
    """The greedy first token by exact context encoding, and a query of the server's usual length."""
    costs = token_costs(star_model.model.config)
    star = StarConfig(mode="exact", wave_tokens=engine_wave_tokens(star_model.device))

    def first_token(token_ids: list[int]) -> int:
        edge = max(0, len(token_ids) - NUM_QUERY_TOKENS)
        _, plan = choose_plan(edge, 1, star, costs)
        context = encode_context(star_model, token_ids[:edge], plan)
        return int(generate_step(star_model, [(Sequence(context, 0), token_ids[edge:])]).argmax())

    return first_token


def hugging_face(directory: str, device: torch.device) -> FirstToken:
    """The same by transformers."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).eval()

    @torch.inference_mode()
    def first_token(token_ids: list[int]) -> int:
        answer = model(torch.tensor([token_ids], device=device), use_cache=True, logits_to_keep=1)
        return int(answer.logits[0, -1].argmax())

    return first_token


def megatron(directory: str, groups: StarGroups, device: torch.device) -> FirstToken:
    """The same by Megatron-Core without this project's attention."""
    initialize_rng_tracker(
        inference_rng_tracker=True, force_reset=True
    )  # dropout's, which needs CUDA otherwise
    info = read_checkpoint_info(directory)
    config = transformer_config(info.args, ModelParallelSizes(), dtype=torch.float32, device=device)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, "local", groups.model),
        pg_collection=groups.model,
        **gpt_model_arguments(info.args),
    )
    load_weights(model, info)
    model.to(device).eval()

    @torch.inference_mode()
    def first_token(token_ids: list[int]) -> int:
        num_tokens = len(token_ids)
        with InferenceMode.active():
            logits = model(
                input_ids=torch.tensor([token_ids], device=device),
                position_ids=torch.arange(num_tokens, device=device)[None],
                attention_mask=torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool, device=device).triu(
                    1
                ),
                inference_context=StaticInferenceContext(1, num_tokens),
                runtime_gather_output=True,
            )
        return int(logits[0, -1, : info.args["vocab_size"]].argmax())

    return first_token


def measure(first_token: FirstToken, token_ids: list[int]) -> dict[str, float]:
    """Seconds to the first token, and which it is."""
    start = perf_counter()
    token = first_token(token_ids)
    return {"ttft_s": perf_counter() - start, "token": token}


def run(args: Namespace, star_model: StarModel, groups: StarGroups) -> None:
    """All rounds, and the result."""
    peers = {OURS: ours(star_model), HUGGING_FACE: hugging_face(args.hf, star_model.device)}
    if args.megatron:
        peers[MEGATRON] = megatron(args.load, groups, star_model.device)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(star_model.vocab_size, (args.num_tokens,), generator=generator).tolist()
    for first_token in peers.values():
        first_token(token_ids[:512])
    summary = measure_rounds(
        args,
        lambda: {name: measure(first_token, token_ids) for name, first_token in peers.items()},
        summarise,
    )
    print(f"{'':<22}{'TTFT s':>10}{'/ ours':>10}{'same token':>12}")
    for name, figures in summary.items():
        print(
            f"{name:<22}{figures['ttft_s']:>10.2f}{figures['to_ours']:>10.2f}{figures['same_token']:>12.0f}"
        )


def summarise(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each peer: the median, its ratio to ours, and whether its token was always ours."""
    return {
        name: {
            "ttft_s": statistics.median(r[name]["ttft_s"] for r in rounds),
            "to_ours": median_ratio(rounds, name, OURS, "ttft_s"),
            "same_token": float(all(r[name]["token"] == r[OURS]["token"] for r in rounds)),
        }
        for name in rounds[0]
    }


def add_arguments(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--hf", required=True, metavar="DIR", help="the same model for transformers")
    parser.add_argument("--num-tokens", type=token_count, default=4096, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument(
        "--megatron", action="store_true", help="Megatron too; its scores take num_tokens^2 * heads values"
    )


if __name__ == "__main__":
    run_on_ranks("one_rank.py", __doc__.splitlines()[0], add_arguments, run)
