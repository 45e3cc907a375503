"""Files of keys, and what a key may have in flight."""

import pytest

from megatron_star.engine.request import StarRequest
from megatron_star.server.errors import RequestError
from megatron_star.server.key_usage import KeyUsage, tokens_in_flight
from megatron_star.server.keys import ApiKey, KeyLimits, KeyRing, parse_keys

TWO = """
[anna]
key = "first"
max_requests = 2
max_tokens = 100
share = 2
[karl]
key = "second"
highest_priority = -5
"""


@pytest.mark.parametrize("text", ["right-key\n", "abc==", "a=1", "two words", "'quoted'"])
def test_a_line_is_a_key_and_its_name_is_default(text):
    ring = KeyRing(parse_keys(text, "file"))
    assert ring.holder(text.strip().encode()) == KeyLimits(name="default")
    assert ring.holder(b"") is None and ring.holder(text.strip().encode() + b"x") is None


def test_a_table_for_each_key_names_it_and_bounds_it():
    ring = KeyRing(parse_keys(TWO, "file"))
    assert ring.names == ["anna", "karl"]
    assert ring.holder(b"first") == KeyLimits(name="anna", max_requests=2, max_tokens=100, share=2)
    assert ring.limits("karl") == ring.holder(b"second") == KeyLimits(name="karl", highest_priority=-5)
    assert ring.limits("gone") == KeyLimits(name="gone")
    assert "first" not in repr(parse_keys(TWO, "file"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the API key is empty"),
        ("\n\n", "the API key is empty"),
        ("one\ntwo\n", "neither a key in one line nor TOML"),
        ("k\u00e9y", "printable ASCII"),
        ("[a]\nshare = 1", r"\[a\] has no key"),
        ("[a]\nkey = ''", r"\[a\]: the API key is empty"),
        ("[a]\nkey = 5", r"\[a\]: the API key must be"),
        ("[a]\nkey = 'x'\nlimit = 3", r"\[a\] has 'limit': known are highest_priority"),
        ("[a]\nkey = 'x'\nmax_requests = 0", "max_requests is 0: it must be a whole number of at least 1"),
        ("[a]\nkey = 'x'\nmax_tokens = 1.5", "max_tokens is 1.5"),
        ("[a]\nkey = 'x'\nshare = nan", "share is nan"),
        ("[a]\nkey = 'x'\nshare = true", "share is True"),
        ("[a]\nkey = 'x'\nhighest_priority = 4294967296", "highest_priority is 4294967296"),
        ("['a b']\nkey = 'x'", "'a b' is no name"),
        ("[a]\nkey = 'x'\n[b]\nkey = 'x'", "two names have the same key"),
        ("\n".join(f"[k{i}]\nkey = '{i}'" for i in range(1025)), "1025 keys: at most 1024"),
    ],
)
def test_what_is_wrong_in_a_file_of_keys_is_said_with_its_name(text, message):
    with pytest.raises(ValueError, match=f"^keys.toml: .*{message}"):
        parse_keys(text, "keys.toml")


def test_keys_are_read_anew_and_stay_as_they_were_where_the_file_is_wrong(tmp_path):
    path = tmp_path / "keys"
    path.write_text("old")
    ring = KeyRing.of_file(path)
    path.write_text(TWO)
    assert ring.reload() == 2
    assert ring.holder(b"old") is None and ring.holder(b"first").name == "anna"
    path.write_text("one\ntwo")
    with pytest.raises(ValueError, match="neither"):
        ring.reload()
    assert ring.holder(b"first").name == "anna"


def test_a_file_that_everybody_can_read_is_warned_of(tmp_path):
    path = tmp_path / "keys"
    path.write_text("x")
    path.chmod(0o600)
    assert KeyRing.of_file(path).warning() is None
    path.chmod(0o604)
    assert "chmod 600" in KeyRing.of_file(path).warning()
    assert KeyRing([ApiKey.of("x")]).warning() is None


@pytest.mark.parametrize("what", ["max_requests", "max_tokens"])
def test_a_limit_names_itself_holds_for_its_key_alone_and_ends_with_what_is_given_back(what):
    usage, limits = KeyUsage(), KeyLimits(name="anna", **{what: 10})
    take = usage.take_sequences if what == "max_requests" else usage.take_tokens
    take(limits, 6)
    with pytest.raises(RequestError, match=f"'anna' has 6 of 10 .*{what}.*try again") as busy:
        take(limits, 5)
    assert busy.value.status == 429
    take(KeyLimits(name="karl", **{what: 10}), 10)
    take(limits, 4)
    usage.give_back("anna", sequences=10, tokens=10)
    take(limits, 10)
    with pytest.raises(RequestError, match=f"11 .* more than the 10 .*{what}") as never:
        take(limits, 11)
    assert never.value.status == 400


def test_tokens_in_flight_are_those_of_context_query_and_answer():
    request = StarRequest(context_tokens=[1] * 5, query_tokens=[1] * 3)
    request.sampling.num_tokens_to_generate = 7
    assert tokens_in_flight(request) == 15
