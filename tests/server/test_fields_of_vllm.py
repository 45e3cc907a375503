"""docs/fields.md against the schemas: each example is accepted or refused as its row says."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from pydantic import ValidationError

from megatron_star.server.errors import describe_validation
from megatron_star.server.wires.chat_schema import ChatRequest
from megatron_star.server.wires.completion_schema import CompletionRequest

ROOT = Path(__file__).parents[2]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "m", "prompt": "x"}
ROW = re.compile(r"^\| `(\w+)`[^|]*\| ([\w -]+) \| ([\w -]+) \| `(\{.*\})` \|(.*)\|$")
OURS = {"star", "contexts", "context_id"}


class Row(NamedTuple):
    field: str
    chat: str
    completions: str
    example: dict
    test: str


def rows() -> list[Row]:
    lines = (ROOT / "docs" / "fields.md").read_text().splitlines()
    found = [match.groups() for line in lines if (match := ROW.match(line))]
    return [
        Row(field, chat, plain, json.loads(text), test.strip()) for field, chat, plain, text, test in found
    ]


@pytest.mark.parametrize("row", rows(), ids=lambda row: "-".join([row.field, row.chat.replace(" ", "")]))
def test_a_field_does_what_its_row_says(row):
    for verdict, schema, body in (
        (row.chat, ChatRequest, CHAT),
        (row.completions, CompletionRequest, COMPLETION),
    ):
        if verdict in ("works", "no effect"):
            schema(**(body | row.example))
            assert row.field in schema.model_fields
        elif verdict == "refused":
            with pytest.raises(ValidationError) as error:
                schema(**(body | row.example))
            assert row.field in str(describe_validation(error.value.errors(include_url=False)))
        else:
            assert verdict == "-"


def test_every_field_of_the_schemas_has_a_row_and_every_line_of_a_table_is_read():
    for column, schema in (("chat", ChatRequest), ("completions", CompletionRequest)):
        told = {row.field for row in rows() if getattr(row, column) != "-"}
        assert set(schema.model_fields) - OURS - told == set()
    text = (ROOT / "docs" / "fields.md").read_text()
    assert len(rows()) == len(re.findall(r"^\| .*\| `\{", text, re.MULTILINE)) > 90


def test_tests_that_rows_name_are_there():
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = {row.test for row in rows() if row.test and f"def {row.test}(" not in written}
    assert not missing
    assert all(row.test for row in rows() if row.chat == "works" or row.completions == "works")
