"""Damage to files and command lines: what a fuzz of a parser is fed with."""

import random

PIECES = rb"""" { } [ ] : , null true -1 1e999 NaN "" {} [] 0 0.5 \ud800 \u""".split()
PIECES += [b"", b"\x00", b"\xff", b"\n", b"\xe2\x80\xa8", b"\xef\xbb\xbf"]
PIECES += [b"[" * 5000, b"9" * 5000, b"9" * 30, b'{"id":' * 2000]
VALUES = [None, True, False, 0, -1, 1, 2, 1.5, -0.5, 10**6, 10**30, 1e300, 1e-300, "", "8", "x"]
VALUES += [[], {}, [1], {"a": 1}]


def mutated(content: bytes, generator: random.Random) -> bytes:
    """One to three pieces put in, taken out, or put in the place of something."""
    for _ in range(generator.randint(1, 3)):
        start = generator.randrange(len(content) + 1)
        end = min(len(content), start + generator.choice((0, 0, 1, 1, 5, 20)))
        content = content[:start] + generator.choice(PIECES) + content[end:]
    return content


def with_a_wrong_value(value: dict, generator: random.Random) -> dict:
    """A JSON object in which some values, maybe of inner objects, are others or gone."""
    value = {key: dict(inner) if isinstance(inner, dict) else inner for key, inner in value.items()}
    for _ in range(generator.randint(1, 3)):
        target = generator.choice(
            [value, *(inner for inner in value.values() if isinstance(inner, dict) and inner)]
        )
        key = generator.choice(list(target) or ["x"])
        if generator.random() < 0.2:
            target.pop(key, None)
        else:
            target[key] = generator.choice(VALUES)
    return value
