"""instructor as it is on PyPI, against a running server: tools, JSON schemas, and answers that come in parts.

    python tests/clients/instructor_modes.py http://127.0.0.1:5000 smollm2

`run.sh` installs it and starts the server. It prints a line a case; the status is 1 if one failed.
"""

import sys
import traceback
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=40)
    kind: Literal["child", "adult"]


def whole(client: instructor.Instructor, asked: dict[str, Any]) -> Person:
    """An answer when it is there."""
    return client.create(response_model=Person, **asked)


def in_parts(client: instructor.Instructor, asked: dict[str, Any]) -> Person:
    """The last of those that come while it is made."""
    return list(client.create_partial(response_model=Person, **asked))[-1]


def main() -> int:
    """The exit status."""
    url, model = sys.argv[1:]
    messages = [{"role": "user", "content": "Describe a person named Bo."}]
    asked = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 120, "max_retries": 0}
    failed = 0
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        openai = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        client = instructor.from_openai(openai, mode=mode)
        for ask in (whole, in_parts):
            try:
                assert ask(client, asked).kind in ("child", "adult")
                print(f"passed  instructor: {mode.name}, {ask.__name__}")
            except Exception:
                failed += 1
                print(f"FAILED  instructor: {mode.name}, {ask.__name__}:\n{traceback.format_exc()}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
