"""What a config.json says of quantised weights, checked: what is not understood is refused by name.

Weights are decoded when they are read. How activations would be quantised is left out: they are not.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron_star.checked_input import shown
from megatron_star.model.checked_values import CheckedValues

FP8, MXFP4 = "FP8", "MXFP4"
_SOURCE = "config.json: quantization_config"
_BLOCK_OF_TRANSFORMERS = (128, 128)  # where nothing is said
_NOTHING = (None, False, {}, [])


class Quantisation(NamedTuple):
    """How a checkpoint's quantised tensors are stored: as FP8 or MXFP4.

    Attributes:
        method: its name in config.json.
        block: of an FP8 weight, rows and columns with one scale; None where a row or the weight has one.
        by_transformers: whether transformers decodes it on any machine, without other packages.
    """

    method: str
    format: str = FP8
    block: tuple[int, int] | None = None
    by_transformers: bool = False

    @property
    def described(self) -> str:
        """In a few words."""
        if self.block is None:
            return f"{self.format} ({self.method})"
        return f"{self.format} in blocks of {self.block[0]} x {self.block[1]} ({self.method})"


def quantisation_of(config: Mapping[str, Any]) -> Quantisation | None:
    """Of a checkpoint with this config.json; None: nothing is quantised.

    Raises:
        ValueError: it says something that we do not decode.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{_SOURCE}={shown(found)} is not supported")
    method = found.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(
            f"{_SOURCE}: quant_method {shown(method)} is not supported; {', '.join(_METHODS)} are"
        )
    return _METHODS[method](found)


def _of_blocks(found: Mapping[str, Any]) -> Quantisation:
    """transformers' "fp8", of DeepSeek, Qwen and Ministral; also vLLM's, with one scale for each weight."""
    _refuse_but(
        found,
        allowed={
            "activation_scheme": ("dynamic", "static"),
            "scale_fmt": ("float", "ue8m0"),
            "expert_dtype": ("fp8",),
            "fmt": ("e4m3",),
            "kv_cache_scheme": None,
            "weight_block_size": None,
        },
        without_effect=("modules_to_not_convert", "ignored_layers", "modules_to_convert", "dequantize"),
    )
    size = found.get("weight_block_size", _BLOCK_OF_TRANSFORMERS)
    return Quantisation("fp8", block=_block(size, "weight_block_size"), by_transformers=True)


def _of_rows(found: Mapping[str, Any]) -> Quantisation:
    """FBGEMM's, of Llama 3.1 405B: one scale for each row."""
    _refuse_but(found, without_effect=("activation_scale_ub", "modules_to_not_convert"))
    return Quantisation("fbgemm_fp8")


def _of_groups(found: Mapping[str, Any]) -> Quantisation:
    """compressed-tensors and ModelOpt: for each group of layers, how its weights are stored."""
    method = found["quant_method"]
    _refuse_but(
        found,
        allowed={
            "format": ("float-quantized", "naive-quantized"),
            "quantization_status": ("compressed", "frozen"),
            "quant_algo": ("FP8",),
            "config_groups": None,
            "sparsity_config": ({"format": "dense"},),
        },
        without_effect=(
            *(
                "ignore",
                "global_compression_ratio",
                "kv_cache_scheme",
                "version",
                "producer",
                "run_compressed",
            ),
        ),
    )
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{_SOURCE}: config_groups={shown(groups)}: it must say how weights are stored")
    blocks = {_block_of_group(name, group) for name, group in groups.items()}
    if len(blocks - {None}) > 1:
        raise ValueError(f"{_SOURCE}: config_groups has blocks of several sizes, which is not supported")
    return Quantisation(method, block=max(blocks, key=lambda block: block is not None))


def _block_of_group(name: str, group: Any) -> tuple[int, int] | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"{_SOURCE}: config_groups: {shown(name)} does not say how its weights are stored")
    _refuse_but(
        weights,
        allowed={
            "num_bits": None,
            "type": None,
            "symmetric": None,
            "strategy": ("tensor", "channel", "block"),
            "block_structure": None,
        },
        without_effect=("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
    )
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("symmetric", True))
    if kind != (8, "float", True):
        raise ValueError(f"{_SOURCE}: config_groups: {shown(name)} is not of symmetric 8-bit floats")
    return _block(weights.get("block_structure"), "block_structure")


def _of_mxfp4(found: Mapping[str, Any]) -> Quantisation:
    """OCP's microscaling format, of the experts of gpt-oss."""
    _refuse_but(found, without_effect=("modules_to_not_convert", "dequantize"))
    return Quantisation("mxfp4", format=MXFP4, by_transformers=True)


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Quantisation]] = {
    "fp8": _of_blocks,
    "fbgemm_fp8": _of_rows,
    "compressed-tensors": _of_groups,
    "modelopt": _of_groups,
    "mxfp4": _of_mxfp4,
}


def _block(size: Any, key: str) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(f"{_SOURCE}: {key}={shown(size)}: it must be two sizes")
    sizes = CheckedValues({f"{key}[{i}]": n for i, n in enumerate(size)}, _SOURCE)
    return sizes.integer(f"{key}[0]"), sizes.integer(f"{key}[1]")


def _refuse_but(
    found: Mapping[str, Any],
    *,
    allowed: Mapping[str, tuple[Any, ...] | None] | None = None,
    without_effect: tuple[str, ...] = (),
) -> None:
    """Of any key that has another value than these, or that nobody knows and that says something.

    Args:
        allowed: the values of keys; None where the caller looks at them.
    """
    for key, value in found.items():
        if key in ("quant_method", *without_effect) or any(value == nothing for nothing in _NOTHING):
            continue
        values = (allowed or {}).get(key, ())
        if values is not None and value not in values:
            raise ValueError(f"{_SOURCE}: {key}={shown(value)} is not supported")
