"""Grammars of requests in the words of llguidance."""

import json
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from megatron_star.server.grammar_spec import GrammarSpec

WHITESPACE = r"(\r?\n)?[ \t]{0,32}"
"""Between the parts of JSON: a line and an indentation. Without an end, small models write nothing else."""


def grammar_text(spec: GrammarSpec) -> str:
    """For `LlguidanceGrammar`; what is wrong with it shows there. Raises ValueError."""
    return _WRITERS[spec.kind](spec.text)


def _of_json_schema(text: str) -> str:
    schema = json.loads(text)
    if '"allOf"' not in text:  # the parts of that must be open to each other's properties
        _close_objects(schema)
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})


def _close_objects(schema: Any) -> None:
    """An object that lists properties, and does not speak of others, has none: models find no end of them."""
    schemas = [schema]
    while schemas:
        part = schemas.pop()
        if not isinstance(part, dict):
            continue
        if "properties" in part and "patternProperties" not in part:
            part.setdefault("additionalProperties", False)
        schemas += [part[key] for key in ("items", "additionalProperties") if key in part]
        for key in ("properties", "patternProperties", "$defs", "definitions"):
            schemas += part[key].values() if isinstance(part.get(key), dict) else ()
        for key in ("anyOf", "oneOf", "prefixItems"):
            schemas += part[key] if isinstance(part.get(key), list) else ()


def _of_choice(text: str) -> str:
    # A text in JSON is one in Lark.
    choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
    return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))


def _of_lark(text: str) -> str:
    """Lark as llguidance has it, or what xgrammar and llama.cpp call EBNF and GBNF."""
    return LLMatcher.grammar_from_lark(any_to_lark(text) if "::=" in text else text)


_WRITERS = {
    "json_object": lambda text: _of_json_schema('{"type": "object"}'),
    "json_schema": _of_json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "choice": _of_choice,
    "lark": _of_lark,
}
