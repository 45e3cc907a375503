"""Contexts that an engine has written are read back by another one, instead of being encoded."""

from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from megatron.core.inference.sampling_params import SamplingParams
from models import random_tokens
from safetensors import safe_open
from small_model import SMALL
from store_ranks import Served, serve

from megatron_star.config import StarConfig
from megatron_star.engine.request import StarRequest

KINDS = SMALL | {"num_layers": 4, "window_size": [12, 0], "window_attn_skip_freq": [0, 1, 0, 0]}
TOKENS = random_tokens(120)

CONTEXTS = {
    "exact": (StarConfig(mode="exact"), ()),
    "star in waves, windows": (StarConfig(block_size=20, anchor_size=5, wave_tokens=23), ()),
    "passed keys of spread blocks": (
        StarConfig(block_size=50, anchor_size=4, passed_keys=6, wave_tokens=17),
        (),
    ),
    "turns that pass keys": (
        StarConfig(block_size=20, anchor_size=4, passed_keys=6, neighbor_blocks=1),
        (40, 77),
    ),
}


def question(name: str, num_tokens: int = 97, more_turns: tuple[int, ...] = ()) -> StarRequest:
    """About a context of `CONTEXTS`."""
    star, turns = CONTEXTS[name]
    turns += more_turns
    return StarRequest(
        context_tokens=TOKENS[:num_tokens],
        query_tokens=random_tokens(5, seed=3),
        star=star,
        sampling=SamplingParams(num_tokens_to_generate=4, top_k=1),
        turn_edges=turns,
    )


def on_ranks(num_ranks: int, folder: Path, requests: list[StarRequest], **options: object) -> Served:
    """What `store_ranks.serve` returns on the driver."""
    return run_ranks(num_ranks, partial(serve, **options), KINDS, folder, requests)[0]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("name", CONTEXTS)
def test_an_answer_is_the_same_whether_its_context_is_encoded_or_restored(name, before, after, tmp_path):
    """To the bit with as many ranks as have written it, and else to the rounding."""
    (encoded,) = (first := on_ranks(before, tmp_path, [question(name)])).asked
    (restored,) = (second := on_ranks(after, tmp_path, [question(name)])).asked
    num_turns = 1 + len(CONTEXTS[name][1])
    assert (first.num_encoded, first.counts["written"]) == (num_turns, num_turns)
    assert (second.num_encoded, second.counts["restored"]) == (0, num_turns)
    assert restored.result.tokens == encoded.result.tokens
    tolerance = 0 if before == after else 1e-4
    torch.testing.assert_close(restored.logits, encoded.logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), (3, 2)])
def test_a_restored_context_passes_its_keys_to_a_turn_that_is_encoded_after_it(before, after, tmp_path):
    name = "turns that pass keys"
    on_ranks(before, tmp_path / "store", [question(name)])
    longer = question(name, 119, more_turns=(97,))
    served = on_ranks(after, tmp_path / "store", [longer])
    assert (served.num_encoded, served.counts["restored"]) == (1, 3)
    (encoded,) = on_ranks(after, tmp_path / "empty", [longer]).asked
    torch.testing.assert_close(served.asked[0].logits, encoded.logits, rtol=1e-4, atol=1e-4)


def test_a_conversation_without_windows_finds_its_turns_again(tmp_path):
    """Without a store, one context would be enough for all of them."""
    asked = [question("exact", 40), question("exact", 77, (40,)), question("exact", 97, (40, 77))]
    full = SMALL | {"num_layers": 2}
    run_ranks(2, serve, full, tmp_path / "store", asked[:2])
    (found, *_) = run_ranks(2, serve, full, tmp_path / "store", asked[2:])
    assert (found.num_encoded, found.counts["restored"]) == (1, 2)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 2)])
def test_what_is_kept_in_8_bits_is_written_and_restored_in_8_bits(before, after, tmp_path):
    name = "turns that pass keys"
    first = on_ranks(before, tmp_path / "int8", [question(name)], kv_dtype="int8")
    second = on_ranks(after, tmp_path / "int8", [question(name)], kv_dtype="int8")
    assert second.num_encoded == 0
    tolerance = 0 if before == after else 1e-4
    logits = (served.asked[0].logits for served in (second, first))
    torch.testing.assert_close(*logits, rtol=tolerance, atol=tolerance)
    for path in (tmp_path / "int8").glob("*/rank-*"):
        with safe_open(path, "pt") as file:
            assert {str(file.get_tensor(name).dtype) for name in ("1.0", "1.2")} == {"torch.int8"}
