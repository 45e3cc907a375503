"""instructor as it is on PyPI, against a running server: tools, JSON schemas, and answers that come in parts.

    python tests/clients/instructor_modes.py http://127.0.0.1:5000 smollm2

`run.sh` installs it and starts the server. It prints a line a case; the status is 1 if one failed.
"""

import sys
import traceback
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=40)
    kind: Literal["child", "adult"]


def main() -> int:
    """The exit status."""
    url, model = sys.argv[1:]
    failed = 0
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(
            OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0), mode=mode
        )
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": "Describe a person named Bo."}],
            "temperature": 0,
            "max_tokens": 120,
            "max_retries": 0,
        }
        for name, found in (
            ("whole", lambda: client.create(response_model=Person, **asked)),
            ("in parts", lambda: list(client.create_partial(response_model=Person, **asked))[-1]),
        ):
            try:
                assert found().kind in ("child", "adult")
                print(f"passed  instructor: {mode.name}, {name}")
            except Exception:
                failed += 1
                print(f"FAILED  instructor: {mode.name}, {name}:\n{traceback.format_exc()}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
