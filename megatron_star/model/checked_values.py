"""Values of users' files: each is checked where it is taken, and errors name file and key."""

import sys
from collections.abc import Mapping
from typing import Any

from megatron_star.checked_input import shown

LARGEST_SIZE = 2**31 - 1
_LARGEST_NUMBER = sys.float_info.max
_REQUIRED = object()


class CheckedValues:
    """The values of a mapping that came from `source`, which a message begins with.

    Each method returns the value of a key, or `default` where the key is absent. Raises ValueError where the
    value is not of the kind or not within the bounds, or where it is absent and there is no default.
    """

    def __init__(self, values: Mapping[str, Any], source: object) -> None:
        self._values = values
        self._source = source

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def any(self, key: str, default: Any = _REQUIRED) -> Any:
        """Unchecked."""
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise ValueError(f"{self._source}: {key} is missing")
        return value

    def integer(self, key: str, *, least: int = 1, most: int = LARGEST_SIZE, default: Any = _REQUIRED) -> int:
        """An integer from `least` to `most`."""
        value = self.any(key, default)
        if value is default and value is not _REQUIRED:
            return value
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"an integer from {least:,} to {most:,}")
        return value

    def number(self, key: str, *, above: float = 0.0, default: Any = _REQUIRED) -> float:
        """A finite number larger than `above`, as integer or float, whichever it is."""
        value = self.any(key, default)
        if value is default and value is not _REQUIRED:
            return value
        if type(value) not in (int, float) or not above < value <= _LARGEST_NUMBER:
            raise self.wrong(key, f"a finite number larger than {above:g}")
        return value

    def numbers(self, key: str) -> list[float]:
        """A list of numbers larger than 0."""
        found = self.any(key)
        if not isinstance(found, list) or not all(
            type(number) in (int, float) and 0 < number <= _LARGEST_NUMBER for number in found
        ):
            raise self.wrong(key, "a list of finite numbers larger than 0")
        return found

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self.any(key, default)
        if type(value) is not bool and value is not default:
            raise self.wrong(key, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = _REQUIRED) -> Any:
        """One of these values, and of its type: 0 is not false."""
        value = self.any(key, default)
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise self.wrong(key, " or ".join(map(shown, allowed)))
        return value

    def flags(self, key: str, count: int) -> list[int]:
        """A list of so many zeros and ones."""
        value = self.any(key)
        is_list = isinstance(value, list) and len(value) == count
        if not is_list or any(type(each) is not int or each not in (0, 1) for each in value):
            raise self.wrong(key, f"a list of {count:,} zeros and ones")
        return value

    def wrong(self, key: str, expected: str) -> ValueError:
        """The error that says what the value of `key` must be."""
        return ValueError(f"{self._source}: {key}={shown(self._values.get(key))}: it must be {expected}")
