"""A Hugging Face checkpoint as a whole: its configuration, and the tensors that it must have for it."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.chunks import Chunk, HfTensor, chunks
from checkpoints_tools.families import family_named
from checkpoints_tools.families.family import Family
from checkpoints_tools.hf_config import model_arguments, read_hf_config, read_whole_config
from checkpoints_tools.multimodal import prediction_layers, surroundings_of, text_config
from checkpoints_tools.quantisation import quantisation_of
from checkpoints_tools.safetensors_files import HfWeights
from checkpoints_tools.safetensors_header import DTYPES_IN_FILES
from megatron_star.checked_input import shown

# Tables that follow from the configuration, and the scales of a quantised KV cache: no model of ours reads
# them, and neither does transformers.
_WITHOUT_EFFECT = re.compile(r"rotary_emb\.inv_freq$|\.self_attn\.([kv]_proj\.)?(k|v|kv|q|prob)_scale$")


@dataclass(frozen=True)
class HfCheckpoint:
    """What is read of it.

    Attributes:
        args: the model in Megatron's argument names.
        pieces: what it is converted in.
    """

    directory: Path
    family: str
    args: dict[str, Any]
    weights: HfWeights
    pieces: list[Chunk]

    def dtype_of(self, piece: Chunk, common: torch.dtype) -> torch.dtype:
        """What the piece is converted to, where all others are converted to `common`."""
        found = self.weights.entries[piece.sources[0].name].dtype
        return piece.dtype(DTYPES_IN_FILES.get(found, common), common)


def open_hf_checkpoint(directory: Path) -> HfCheckpoint:
    """Reads the configuration and headers, and of weights the output layer of a tied model, if it is stored.

    Raises:
        ValueError, FileNotFoundError: it is not complete, or not supported.
    """
    config = read_hf_config(directory)
    args = model_arguments(config)
    family = family_named(config["model_type"])
    weights = open_hf_weights(directory)
    if not args["untie_embeddings_and_output_weights"] and _has_an_output_layer_of_its_own(weights, family):
        args["untie_embeddings_and_output_weights"] = True
    pieces = check_names_and_shapes(weights, family, args)
    return HfCheckpoint(directory, family.model_type, args, weights, pieces)


def open_hf_weights(directory: Path) -> HfWeights:
    """Its tensors, as its config.json says that they are stored.

    Raises:
        ValueError, FileNotFoundError: they cannot be read.
    """
    config = read_whole_config(directory)
    of_text = text_config(config)
    surroundings = surroundings_of(config)
    if family_named(of_text.get("model_type")).has_prediction_layers:
        surroundings = surroundings or prediction_layers(of_text)
    return HfWeights(directory, quantisation_of(of_text), surroundings)


def _has_an_output_layer_of_its_own(weights: HfWeights, family: Family) -> bool:
    """Whatever config.json says, transformers does not tie what is stored twice and differs."""
    names = (family.embedding.parts[0].name, family.output_layer.parts[0].name)
    entries = [weights.entries.get(name) for name in names]
    if None in entries:
        return False
    if any(entry.dtype not in DTYPES_IN_FILES for entry in entries):
        return True  # which is decoded, or refused, with the other tensors
    embedding, output = (weights.read(name) for name in names)
    if embedding.dtype != output.dtype:
        embedding, output = embedding.float(), output.float()
    return not torch.equal(embedding, output)


def notes(checkpoint: HfCheckpoint) -> list[str]:
    """What of the checkpoint is not converted as it is."""
    weights, found = checkpoint.weights, []
    if weights.quantised:
        described = next(iter(weights.quantised.values())).quantisation.described
        num_stored = len({tensor.names for tensor in weights.quantised.values()})
        found.append(f"{num_stored} tensors are stored as {described}, and decoded")
    if weights.left_out:
        num_bytes = sum(entry.end - entry.begin for entry in weights.left_out.values())
        modules = {_module(name) for name in weights.left_out}
        found.append(
            f"{len(weights.left_out)} tensors ({num_bytes / 1e9:.3f} GB) are no part of the language model, "
            f"and left out: {', '.join(sorted(modules))}"
        )
    return found


def _module(name: str) -> str:
    """`vision_tower`, or of a layer that predicts several tokens `layers.61`."""
    module, _, rest = name.removeprefix("model.").partition(".")
    return f"{module}.{rest.partition('.')[0]}" if module == "layers" else module


def check_names_and_shapes(weights: HfWeights, family: Family, args: Mapping[str, Any]) -> list[Chunk]:
    """The tensors are those of the family, all and only, of a known type, in the shapes of config.json.

    Returns the pieces, which are drawn one by one: a configuration may name more than would fit in memory.

    Raises:
        ValueError: they are not.
    """
    checked, names = [], set()
    for piece in chunks(family, args):
        for source in piece.sources:
            _check_tensor(weights, source)
            names.add(source.name)
        checked.append(piece)
    if not args["untie_embeddings_and_output_weights"]:
        names.add(family.output_layer.parts[0].name)
    for name in weights.entries.keys() - names - weights.taken:
        if not _WITHOUT_EFFECT.search(name):
            raise ValueError(f"{weights.entries[name].file}: {name} is not a tensor of this family")
    return checked


def _check_tensor(weights: HfWeights, source: HfTensor) -> None:
    entry = weights.take(source)
    if entry is None:
        raise ValueError(f"{weights.directory}: {source.name} is not in the checkpoint")
    if entry.shape != source.shape:
        raise ValueError(
            f"{entry.file}: {source.name} has shape {entry.shape}, config.json says {source.shape}"
        )
    if entry.dtype not in DTYPES_IN_FILES and source.name not in weights.quantised:
        raise ValueError(
            f"{entry.file}: {source.name} has dtype {shown(entry.dtype)}; {', '.join(DTYPES_IN_FILES)} are "
            "supported, and what quantization_config of config.json explains, with its scales"
        )


def common_dtype(checkpoint: HfCheckpoint) -> torch.dtype:
    """The dtype that all tensors have which are not quantised, and need not be float32; bfloat16 if all are.

    Raises:
        ValueError: they have several.
    """
    weights = checkpoint.weights
    dtypes = {
        source.name: weights.entries[source.name].dtype
        for piece in checkpoint.pieces
        for source in piece.sources
        if source.name not in weights.quantised
        and not (piece.may_be_float32 and weights.entries[source.name].dtype == "F32")
    }
    if not dtypes:
        return torch.bfloat16
    common = Counter(dtypes.values()).most_common(1)[0][0]
    for name, dtype in dtypes.items():
        if dtype != common:
            raise ValueError(
                f"{weights.entries[name].file}: {name} has dtype {dtype}, most tensors {common}; "
                "choose one with --dtype (float32, bfloat16 or float16)"
            )
    return DTYPES_IN_FILES[common]
