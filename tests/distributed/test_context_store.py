"""Contexts that an engine has written are read back by another one, instead of being encoded."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from megatron.core.inference.sampling_params import SamplingParams
from models import random_tokens
from safetensors import safe_open
from small_model import SMALL
from store_ranks import Served, serve, serve_side_by_side

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


def files_of(folder: Path) -> list[Path]:
    """The rank files of all entries."""
    return sorted(folder.glob("*/rank-*"))


def flip_a_bit(path: Path) -> None:
    """In the last tensor."""
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 8),
    "gone": lambda path: path.unlink(),
    "another's manifest": lambda path: (path.parent / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_one_rank_finds_damaged_all_encode_anew_and_it_is_written_again(damage, tmp_path):
    (encoded,) = on_ranks(2, tmp_path, [question("exact")]).asked
    DAMAGES[damage](files_of(tmp_path)[1])
    served = on_ranks(2, tmp_path, [question("exact"), question("exact")])
    assert (served.num_encoded, served.counts["restored"]) == (1, 0)
    assert torch.equal(served.asked[0].logits, encoded.logits)
    assert served.asked[1].result.cache_hit
    if damage != "gone":
        assert served.counts["unusable"] == served.counts["written"] == 1
        assert on_ranks(2, tmp_path, [question("exact")]).counts["restored"] == 1


def test_another_model_mask_text_or_code_is_another_context(tmp_path):
    on_ranks(1, tmp_path, [question("exact")])
    others = [question("star in waves, windows"), question("exact", 96)]
    served = on_ranks(1, tmp_path, others)
    assert (served.num_encoded, served.counts["restored"]) == (2, 0)
    for fact in ("model", "code", "dtype"):
        served = on_ranks(1, tmp_path, [question("exact")], facts={fact: "another"})
        assert (served.num_encoded, served.counts["restored"]) == (1, 0)


def test_contexts_beyond_the_limit_go_and_the_others_stay(tmp_path):
    asked = [question(name) for name in list(CONTEXTS)[:3]]
    size = on_ranks(1, tmp_path, asked[:1]).counts["bytes_written"]
    room = 2 * size + 3 * (1 << 20)  # beside what a header may take
    served = on_ranks(1, tmp_path, asked[1:], most_bytes=room)
    assert served.counts["written"] == 2
    assert len(files_of(tmp_path)) <= 3
    again = on_ranks(1, tmp_path, asked[2:], most_bytes=room)
    assert again.counts["restored"] == 1


def test_a_folder_that_cannot_be_written_is_read(tmp_path):
    on_ranks(1, tmp_path, [question("exact")])
    served = on_ranks(1, tmp_path, [question("exact"), question("exact", 80)], read_only=True)
    assert (served.num_encoded, served.counts["restored"], served.counts["written"]) == (1, 1, 0)
    assert len(files_of(tmp_path)) == 1


def test_two_engines_that_share_a_folder_write_and_read_what_is_right(tmp_path):
    asked = [question("exact", num_tokens) for num_tokens in (60, 70, 80, 60, 70)]
    alone = [one.result.tokens for one in on_ranks(1, tmp_path / "other", asked).asked]
    (both,) = run_ranks(1, serve_side_by_side, KINDS, tmp_path, asked)
    assert both == [alone, alone]
    assert len(files_of(tmp_path)) == 3
    assert not list(tmp_path.glob("writing-*")) and not list(tmp_path.glob("dropped-*"))
