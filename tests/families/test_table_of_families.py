"""The table of families in docs/checkpoints.md says what is tested."""

from pathlib import Path

from dense import CHUNK, FULL, WINDOW, kinds_of_layers
from random_models import CONFIGS

from checkpoints_tools.families import FAMILIES

DOCUMENT = Path(__file__).parents[2] / "docs/checkpoints.md"
KINDS = {FULL: "full", WINDOW: "window", CHUNK: "chunk"}


def rows() -> dict[str, tuple[set[str], set[str]]]:
    """By `model_type`: the kinds of layers, and the names of the small models."""
    lines = DOCUMENT.read_text("utf-8").partition("| `model_type` |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        model_type.strip("`"): (set(kinds.split(", ")), {name.strip("`") for name in names.split(", ")})
        for model_type, _, kinds, _, names in cells
    }


def test_every_family_has_a_row_with_its_kinds_of_layers_and_its_small_models():
    expected = {}
    for model_type in FAMILIES:
        configs = {
            name: config
            for name, config in CONFIGS.items()
            if config.model_type == FAMILIES[model_type].config_type
        }
        kinds = {KINDS[kind] for config in configs.values() for kind in kinds_of_layers(config)}
        expected[model_type] = (kinds, set(configs))
    found = rows()
    for model_type in expected.keys() | found.keys():
        assert found.get(model_type) == expected.get(model_type), model_type
