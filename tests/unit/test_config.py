"""What users can set is checked at once, by name."""

import pytest

from megatron_star.config import FieldError, StarConfig, parse_token_count


@pytest.mark.parametrize(
    ("text", "tokens"), [("0", 0), ("4096", 4096), ("32K", 32768), ("1M", 1048576), (" 2k ", 2048)]
)
def test_token_counts_are_read_in_powers_of_two(text, tokens):
    assert parse_token_count(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5K", "1e3", "32KB", "ten", "٣²"])
def test_what_is_no_token_count_is_refused_with_examples(text):
    with pytest.raises(ValueError, match="write 4096, 32K or 1M"):
        parse_token_count(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "ring"),
        ("anchor", "copy"),
        ("block_size", 0),
        ("block_size", 1.5),
        ("block_size", True),
        ("anchor_size", -1),
        ("neighbor_blocks", -1),
        ("passed_keys", -1),
        ("passed_keys", 0.5),
        ("passed_keys", "8"),
        ("wave_tokens", 0),
    ],
)
def test_a_value_out_of_bounds_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        StarConfig(**{field: value})


def test_passed_keys_are_refused_where_the_anchor_is_recomputed():
    """Then nothing is sent."""
    with pytest.raises(FieldError, match="passed_keys is 5: it must be 0 with anchor=recompute") as error:
        StarConfig(anchor="recompute", passed_keys=5)
    assert error.value.field == "passed_keys"
    assert StarConfig(anchor="recompute", passed_keys=0).passed_keys == 0


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'blocksize'.*block_size, anchor_size"):
        StarConfig.from_dict({"blocksize": 4})


def test_a_block_size_that_was_meant_in_thousands_is_pointed_out():
    assert "4K (4096 tokens) is probably meant" in StarConfig(block_size=4).warning()
    assert StarConfig(block_size=4096).warning() is None
    assert StarConfig(block_size=4, mode="exact").warning() is None
