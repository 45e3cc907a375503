"""Mixtures of two encodings hold what their names say, and the program tells star's losses from exact's."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "launch"))
from programs import python  # noqa: E402

from benchmarks.lost_needles import Mixture, mixtures
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.config import StarConfig
from megatron_star.planning.plan import ContextPlan

NUM_TOKENS, NUM_LAYERS, BLOCK_SIZE, NEEDLE = 40, 10, 10, 15
EXACT, STAR = 0.0, 1.0


@pytest.fixture
def encodings() -> tuple[EncodedContext, EncodedContext]:
    """Exact's KV is all `EXACT`, star's all `STAR`."""
    found = []
    for mode, value in (("exact", EXACT), ("star", STAR)):
        plan = ContextPlan.build(NUM_TOKENS, 1, StarConfig(mode=mode, block_size=BLOCK_SIZE))
        context = EncodedContext(plan, cp_rank=0)
        for layer_number in range(1, NUM_LAYERS + 1):
            for segment in plan.segments():
                rows = torch.full((segment.num_tokens, 1, 2, 4), value)
                context.store(layer_number, segment.start, rows, rows)
        found.append(context)
    return tuple(found)


def share_of_star(mixture: Mixture, encodings, block: int, layer_number: int) -> tuple[float, float]:
    """Of the keys and of the values, in one block and layer."""
    [held] = mixture.mixed(*encodings, NUM_LAYERS).held(layer_number)
    rows = slice(BLOCK_SIZE * block, BLOCK_SIZE * (block + 1))
    return tuple(float(tensor[rows].mean()) for tensor in held)


@pytest.mark.parametrize(
    ("name", "blocks", "layers"),
    [
        ("exact", [], []),
        ("star", [0, 1, 2, 3], range(1, 11)),
        ("star in layers 3 to 4 only", [0, 1, 2, 3], [3, 4]),
        ("star in layers 9 to 10 only", [0, 1, 2, 3], [9, 10]),
        ("star before the needle's block only", [0], range(1, 11)),
        ("star in the needle's block only", [1], range(1, 11)),
        ("star after the needle's block only", [2, 3], range(1, 11)),
        ("star but for the last block", [0, 1, 2], range(1, 11)),
    ],
)
def test_star_is_where_the_name_says(encodings, name, blocks, layers):
    mixture = mixtures(encodings[1].plan, NEEDLE, NUM_LAYERS)[name]
    for block in range(4):
        for layer_number in range(1, NUM_LAYERS + 1):
            expected = STAR if block in blocks and layer_number in layers else EXACT
            assert share_of_star(mixture, encodings, block, layer_number) == (expected, expected)


@pytest.mark.parametrize(("name", "expected"), [("star's keys only", (1, 0)), ("star's values only", (0, 1))])
def test_keys_and_values_can_be_of_different_encodings(encodings, name, expected):
    mixture = mixtures(encodings[1].plan, NEEDLE, NUM_LAYERS)[name]
    assert share_of_star(mixture, encodings, 2, 7) == expected


def test_the_question_sees_the_anchor_and_the_needles_block(encodings):
    mixture = mixtures(encodings[1].plan, 25, NUM_LAYERS)["star, anchor's and needle's block seen"]
    assert mixture.seen.nonzero().flatten().tolist() == [*range(10), *range(20, 30)]
    [(keys, values)] = mixture.mixed(*encodings, NUM_LAYERS).held(1)
    assert len(keys) == len(values) == 20 and keys.min() == STAR


@pytest.mark.smollm2
def test_the_program_reports_every_mixture(smollm2, tmp_path):
    output = tmp_path / "lost.json"
    arguments = ["--length", 512, "--block-sizes", 64, "--samples", 1, "--tasks", "niah_single_1"]
    finished = python("benchmarks/lost_needles.py", "--load", smollm2[1], *arguments, "--output", output)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(output.read_text())
    figures = result["summary"]["64"]
    assert figures["exact"]["right"] == 1.0
    assert figures["star"] != figures["exact"]
    assert len(figures) == 14 and len(result["rounds"]["64"]) == 1
