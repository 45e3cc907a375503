"""The stage about experts and latent attention: some layers of large models, as one rank has them."""

from benchmarks.gpu.bench import Bench, plan_of, written
from benchmarks.gpu.decoding import step_figures
from benchmarks.gpu.encoding import encoding_figures, encoding_options, timed_encoding
from benchmarks.models import SHAPES, Shape

LAYERS = {"qwen3-30b-a3b": [1] * 12, "deepseek-v3": [0, 1]}
"""Of a model: for each layer that is run, whether it has experts."""

SMALL_LAYERS = {"tiny-qwen3-moe": [1, 1]}
NUM_UNITS = 4


def experts(bench: Bench) -> None:
    """32K tokens, exact and with passed keys, and tokens of 1 and 8 sequences after them."""
    bench.forget_models()
    for name, layers in (LAYERS if bench.device.type == "cuda" else SMALL_LAYERS).items():
        with bench.figure("experts", f"{name}, {len(layers)} layers") as found:
            _figures_of(bench, name, _some_layers(SHAPES[name], layers))
            found["layers"] = len(layers)
        bench.forget_models()


def _some_layers(shape: Shape, layers: list[int]) -> Shape:
    return shape | {"num_layers": len(layers), "moe_layer_freq": layers}


def _figures_of(bench: Bench, name: str, shape: Shape) -> None:
    star_model, num_tokens = bench.random_model(shape), NUM_UNITS * bench.unit
    for way in ("exact", "passed"):
        plan, costs = plan_of(star_model, num_tokens, **encoding_options(way, bench.unit))
        if bench.has_time_for(plan.cost(costs), repeats=3):
            with bench.figure("experts", f"{name}: {written(num_tokens)} {way}") as found:
                timed_encoding(bench, star_model, plan)  # libraries begin
                found |= encoding_figures(bench, star_model, plan, costs)[0]
    for num_sequences in (1, 8):
        step_figures(bench, star_model, "experts", NUM_UNITS, num_sequences, name=f"{name}: ")
