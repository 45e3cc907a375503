"""Compare a Megatron checkpoint with its Hugging Face source: every tensor, then logits.

python -m checkpoints_tools.verify --hf DIR --megatron DIR [--hf-config DIR] [--skip-logits]
"""

import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from checkpoints_tools.command_line import EXIT_MISMATCH, command_parser, progress_bar, run_command
from checkpoints_tools.convert_megatron_to_hf import hf_tensors
from checkpoints_tools.describe import describe, stored_dtype
from checkpoints_tools.families import FAMILIES, family_named
from checkpoints_tools.hf_checkpoint import check_names_and_shapes, open_hf_checkpoint, open_hf_weights
from checkpoints_tools.hf_config import read_hf_config, read_whole_config
from checkpoints_tools.multimodal import surroundings_of
from checkpoints_tools.quantisation import Quantisation, quantisation_of
from checkpoints_tools.torch_dist import MegatronWeights
from checkpoints_tools.whole_sequence import megatron_logits
from megatron_star.model.checkpoint import CheckpointInfo, weights_directory
from megatron_star.parallel.groups import destroy_groups
from megatron_star.text.tokenizer import load_tokenizer

_TOLERANCE, _RELATIVE_TOLERANCE = 1e-4, 1e-5
_TEXT = """Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my \
purse, and nothing particular to interest me on shore, I thought I would sail about a little and see the \
watery part of the world. In 1851 that cost $3.50."""
_NUM_TOKENS_WITHOUT_TOKENIZER = 48
_BLOCK = 1 << 22  # values that are compared at a time


class Difference(NamedTuple):
    """The largest difference found, and where. `size` is infinite where a value is not a number."""

    size: float
    where: str


def compare_tensors(hf: Path, info: CheckpointInfo) -> Difference:
    """The largest difference of any value, after a cast to the dtype in the Megatron checkpoint.

    Raises:
        ValueError: names, shapes or dtypes are not those of the table.
    """
    source, weights = open_hf_weights(hf), MegatronWeights(weights_directory(info.directory))
    pieces = weights.check(check_names_and_shapes(source, family_named(info.family), info.args))
    dtype = stored_dtype(weights, pieces)
    if dtype != info.dtype:
        raise ValueError(f"{info.directory}: weights are {dtype}, star_checkpoint.json says {info.dtype}")
    worst = Difference(0.0, "nowhere")
    total = sum(piece.num_elements for piece in pieces) * dtype.itemsize
    with progress_bar(total, "comparing") as bar:
        values = hf_tensors(weights, pieces, info.args, bar)
        for piece, tensors in zip(pieces, values, strict=True):
            for expected, found in zip(piece.sources, tensors, strict=True):
                found_difference = _difference(
                    source.read(expected.name).to(found.dtype), found, expected.name
                )
                worst = max(worst, found_difference, key=lambda difference: difference.size)
    return worst


def _difference(expected: Tensor, found: Tensor, name: str) -> Difference:
    """Zero for the same bits, not-a-number included; else compares block by block, in float64."""
    if torch.equal(expected.flatten().view(torch.uint8), found.flatten().view(torch.uint8)):
        return Difference(0.0, name)
    size, at = 0.0, 0
    blocks = zip(expected.flatten().split(_BLOCK), found.flatten().split(_BLOCK), strict=True)
    for number, (a, b) in enumerate(blocks):
        differences = (a.double() - b.double()).abs().nan_to_num(nan=math.inf)
        largest = differences.argmax().item()
        if differences[largest].item() > size:
            size, at = differences[largest].item(), number * _BLOCK + largest
    index = [i.item() for i in torch.unravel_index(torch.tensor(at), expected.shape)]
    return Difference(size, f"{name}{index}")


def compare_arguments(hf: Path, info: CheckpointInfo) -> list[str]:
    """The arguments in which the description differs from the Hugging Face checkpoint."""
    checkpoint = open_hf_checkpoint(hf)
    expected = {"family": checkpoint.family, **checkpoint.args}
    found = {"family": info.family, **info.args}
    return [
        f"{name}: {found.get(name)!r}, config.json says {value!r}"
        for name, value in expected.items()
        if found.get(name) != value and name != "padded_vocab_size"
    ]


def compare_logits(hf: Path, info: CheckpointInfo) -> tuple[Difference, float]:
    """The largest difference of the logits on a fixed text, and what rounding explains.

    Both models are in float32 with these weights.
    """
    token_ids = _token_ids(info)
    expected = _hf_logits(hf, token_ids, info.dtype)
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        try:
            found = megatron_logits(info, token_ids, tp_size=1)
        finally:
            destroy_groups()
    if not expected.isfinite().all():
        return Difference(math.inf, "Hugging Face's own logits are not finite"), 0.0
    return _difference(expected, found, "[token, word] "), tolerance(expected)


def _token_ids(info: CheckpointInfo) -> list[int]:
    if (info.tokenizer_directory / "tokenizer_config.json").is_file():
        token_ids = load_tokenizer(info.tokenizer_directory)(_TEXT).input_ids
        if max(token_ids) < info.args["vocab_size"]:
            return token_ids
    return [7919 * i % info.args["vocab_size"] for i in range(_NUM_TOKENS_WITHOUT_TOKENIZER)]


def _hf_logits(hf: Path, token_ids: list[int], dtype: torch.dtype) -> Tensor:
    """[tokens, vocabulary], float32."""
    try:
        model = _hf_model(hf, dtype)
    except Exception as error:  # whatever transformers makes of this checkpoint is about it
        raise ValueError(f"{hf}: transformers cannot load it ({type(error).__name__}: {error})") from error
    with torch.inference_mode():
        return model.float().eval()(torch.tensor([token_ids])).logits[0]


def _hf_model(hf: Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model; quantised weights are decoded to `dtype`, by transformers where it can."""
    config = _hf_config(hf)
    quantisation = quantisation_of(read_hf_config(hf))
    is_multimodal = surroundings_of(read_whole_config(hf)) is not None
    model_class = AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM
    if quantisation and not _is_decoded_by_transformers(hf, quantisation):
        print(f"note: transformers does not decode {quantisation.described} here; its model has our weights")
        return _hf_model_of_decoded(hf, dtype)
    if quantisation:
        config.quantization_config["dequantize"] = True
    elif hasattr(config, "quantization_config"):
        del config.quantization_config  # an empty one, of which transformers asks the method
    model = model_class.from_pretrained(hf, config=config, dtype=dtype, trust_remote_code=False)
    inside = getattr(model, "language_model", None) if is_multimodal else None
    # Llama 4's is a model of its own, and the whole of it does not run in transformers 5.24.
    return inside if inside is not None and inside.get_output_embeddings() is not None else model


def _hf_config(hf: Path) -> PreTrainedConfig:
    whole = read_whole_config(hf)
    family = FAMILIES.get(whole["model_type"])
    if family and family.config_of:
        return CONFIG_MAPPING[family.config_of].from_dict(whole | {"model_type": family.config_of})
    return AutoConfig.from_pretrained(hf, trust_remote_code=False)


def _is_decoded_by_transformers(hf: Path, quantisation: Quantisation) -> bool:
    """It divides a weight into equal blocks, as many as there are scales: else the last ones are smaller."""
    if not quantisation.by_transformers or quantisation.block is None:
        return quantisation.by_transformers
    return all(
        size <= of_block or size % of_block == 0
        for tensor in open_hf_checkpoint(hf).weights.quantised.values()
        for size, of_block in zip(tensor.shape, quantisation.block, strict=True)
    )


def _hf_model_of_decoded(hf: Path, dtype: torch.dtype) -> PreTrainedModel:
    checkpoint = open_hf_checkpoint(hf)
    sources = (source for piece in checkpoint.pieces for source in piece.sources)
    names = {source.written(fused_experts=False)[0] for source in sources}
    weights = {name: checkpoint.weights.read(name).to(dtype) for name in names}
    described = {name: value for name, value in read_hf_config(hf).items() if name != "quantization_config"}
    config_type = family_named(checkpoint.family).config_type
    config = CONFIG_MAPPING[config_type].from_dict(described | {"model_type": config_type})
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, found = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    assert not any(found.values()), found
    return model


def tolerance(logits: Tensor) -> float:
    """How far float32 logits of two implementations may be apart: rounding grows with the largest of them."""
    return max(_TOLERANCE, _RELATIVE_TOLERANCE * logits.abs().max().item())


def main() -> int:
    parser = command_parser("verify", __doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--megatron", type=Path, required=True, help="Megatron checkpoint directory")
    parser.add_argument("--hf-config", type=Path, help="for a checkpoint without star_checkpoint.json")
    parser.add_argument("--skip-logits", action="store_true", help="for models larger than the memory")
    options = parser.parse_args()
    info = describe(options.megatron, options.hf_config)
    problems = compare_arguments(options.hf, info)
    tensors = compare_tensors(options.hf, info)
    if tensors.size > 0:
        problems.append(f"tensors differ by up to {tensors.size:g}, at {tensors.where}")
    else:
        print("tensors: all equal")
    if not options.skip_logits:
        logits, allowed = compare_logits(options.hf, info)
        print(f"logits, float32: largest difference {logits.size:.2g}")
        if not logits.size <= allowed:
            problems.append(f"logits differ by {logits.size:g} at {logits.where}, more than {allowed:g}")
    for problem in problems:
        print(f"MISMATCH {problem}")
    print("mismatch" if problems else "the same")
    return EXIT_MISMATCH if problems else 0


if __name__ == "__main__":
    run_command(main)
