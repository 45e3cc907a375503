"""A quantised tensor of a checkpoint: where its values and scales lie, and what they stand for."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from checkpoints_tools.chunks import Shape
from checkpoints_tools.decoding import MXFP4_GROUP, decode_fp8, decode_mxfp4, scale_grid
from checkpoints_tools.quantisation import FP8, MXFP4, Quantisation
from checkpoints_tools.safetensors_header import DTYPES_IN_FILES, Entry

_FP8_VALUES = "F8_E4M3"
_BYTES = "U8"
_FP8_SCALES = ("_scale_inv", "_scale")  # whatever its name, a scale multiplies
_FP8_SCALE_DTYPES = (*DTYPES_IN_FILES, "F8_E8M0", _BYTES)
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale")


class QuantisedTensor(NamedTuple):
    """`names` are of all stored tensors that belong to it; `shape` is that of the decoded one."""

    values: Entry
    scale: Entry
    shape: Shape
    quantisation: Quantisation
    names: frozenset[str]

    def item(self, index: int) -> "QuantisedTensor":
        """An expert's, of a tensor of all experts; `names` are those of the whole."""
        return self._replace(
            values=self.values.item(index), scale=self.scale.item(index), shape=self.shape[1:]
        )

    def decode(self, read: Callable[[Entry], Tensor]) -> Tensor:
        """In float32 or bfloat16, whichever the format needs."""
        values, scale = read(self.values), read(self.scale)
        if self.quantisation.format == MXFP4:
            return decode_mxfp4(values, scale)
        return decode_fp8(values, scale, self.quantisation.block)


def find_quantised(
    entries: Mapping[str, Entry], name: str, quantisation: Quantisation
) -> QuantisedTensor | None:
    """The tensor of this name, if it is stored in quantised form.

    Raises:
        ValueError: its scales do not fit its values.
    """
    find = {FP8: _find_fp8, MXFP4: _find_mxfp4}[quantisation.format]
    return find(entries, name, quantisation)


def _find_fp8(entries: Mapping[str, Entry], name: str, quantisation: Quantisation) -> QuantisedTensor | None:
    values = entries.get(name)
    scale_name = next((name + end for end in _FP8_SCALES if name + end in entries), None)
    if values is None or values.dtype != _FP8_VALUES or scale_name is None:
        return None
    scale = entries[scale_name]
    if scale.dtype not in _FP8_SCALE_DTYPES:
        raise ValueError(f"{scale.file}: {scale_name} has dtype {scale.dtype}, which no scale has")
    if len(values.shape) != 2 or not scale_grid(values.shape, scale.shape, quantisation.block):
        raise ValueError(
            f"{scale.file}: {scale_name} has shape {scale.shape}: not the scales of a weight of shape "
            f"{values.shape} as {quantisation.described}"
        )
    of_activations = {f"{name.rpartition('.')[0]}.{end}" for end in _OF_ACTIVATIONS} & entries.keys()
    return QuantisedTensor(
        values, scale, values.shape, quantisation, frozenset({scale_name, *of_activations})
    )


def _find_mxfp4(
    entries: Mapping[str, Entry], name: str, quantisation: Quantisation
) -> QuantisedTensor | None:
    names = (f"{name}_blocks", f"{name}_scales")
    if not entries.keys() >= set(names):
        return None
    values, scale = (entries[each] for each in names)
    are_bytes = values.dtype == scale.dtype == _BYTES
    if not are_bytes or len(scale.shape) != 3 or values.shape != (*scale.shape, MXFP4_GROUP // 2):
        raise ValueError(
            f"{values.file}: {names[0]} has shape {values.shape} ({values.dtype}), {names[1]} {scale.shape} "
            f"({scale.dtype}): not a weight as {quantisation.described}"
        )
    experts, rows, groups = scale.shape
    return QuantisedTensor(
        values, scale, (experts, groups * MXFP4_GROUP, rows), quantisation, frozenset(names)
    )
