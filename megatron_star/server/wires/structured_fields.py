"""Fields that say what an answer must look like: OpenAI's `response_format`, vLLM's of today and of before.

Each becomes a `GrammarSpec` while the body is checked, since a schema may be long.
"""

import json
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from megatron_star.server.body import Body, Text
from megatron_star.server.grammar_spec import GrammarSpec
from megatron_star.server.wires.known_fields import only

ANY_OBJECT = '{"type": "object"}'
OPTIONS_OF_LLGUIDANCE = "x-guidance"
"""A part of a schema, as its own fields are."""


def _schema_text(schema: dict[str, Any] | str) -> str:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        is_object = isinstance(schema, dict) or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON schema: {error}") from None
    if not is_object:
        raise ValueError("a JSON schema is an object")
    return text


SchemaText = Annotated[dict[str, Any] | Text, AfterValidator(_schema_text)]
NonEmptyText = Annotated[Text, Field(min_length=1)]
Choices = Annotated[list[Text], Field(min_length=1), AfterValidator(json.dumps)]
"""As a JSON list."""


class JsonSchema(Body):
    """A schema with a name; it is kept to whether or not `strict` asks for it."""

    name: Annotated[str, Field(max_length=512)] | None = None
    description: str | None = None
    schema_text: SchemaText = Field(ANY_OBJECT, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Text, any JSON object, or JSON of a schema. vLLM's `structural_tag` is not supported."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: it goes with type 'json_schema', and only with it")
        return self

    def specs(self) -> list[GrammarSpec]:
        """What is asked; nothing for a text."""
        if self.json_schema:
            field = "response_format.json_schema.schema"
            return [GrammarSpec("json_schema", self.json_schema.schema_text, field)]
        return [GrammarSpec("json_object", ANY_OBJECT, "response_format")] * (self.type == "json_object")


class StructuredOutputs(Body):
    """vLLM's: one of the first five, and how JSON is written."""

    json_: SchemaText | None = Field(None, alias="json")
    regex: NonEmptyText | None = None
    choice: Choices | None = None
    grammar: NonEmptyText | None = Field(None, description="Lark as llguidance reads it, or GBNF")
    json_object: bool | None = None
    disable_fallback: only(True, False) = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: only(True, False) = None
    whitespace_pattern: NonEmptyText | None = Field(None, description="a regular expression")
    structural_tag: only() = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.specs():
            raise ValueError("one of json, regex, choice, grammar and json_object must be set")
        return self

    def specs(self) -> list[GrammarSpec]:
        """What is asked."""
        return _specs(
            "structured_outputs.", self.json_, self.regex, self.choice, self.grammar, self.json_object
        )


class StructuredFields(BaseModel):
    """On both OpenAI routes."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaText | None = None
    guided_regex: NonEmptyText | None = None
    guided_choice: Choices | None = None
    guided_grammar: NonEmptyText | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: NonEmptyText | None = None
    guided_decoding_backend: only("auto", "guidance") = None
    structural_tag: only() = None

    _spec: GrammarSpec | None = None

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        specs = self._specs()
        if len(specs) > 1:
            raise ValueError(f"{specs[0].field}: it cannot be together with {specs[1].field}")
        options = self._json_options()
        if options and not (specs and specs[0].kind in ("json_object", "json_schema")):
            raise ValueError(f"{' and '.join(options)}: only where JSON is asked for")
        self._spec = _with_options(specs[0], options) if options else next(iter(specs), None)
        return self

    def grammar(self) -> GrammarSpec | None:
        """What is asked, if anything."""
        return self._spec

    def _specs(self) -> list[GrammarSpec]:
        specs = self.response_format.specs() if self.response_format else []
        specs += self.structured_outputs.specs() if self.structured_outputs else []
        return specs + _specs(
            "guided_",
            self.guided_json,
            self.guided_regex,
            self.guided_choice,
            self.guided_grammar,
            self.guided_json_object,
        )

    def _json_options(self) -> dict[str, Any]:
        """How JSON is written, as llguidance calls it."""
        asked = self.structured_outputs or StructuredOutputs.model_construct()
        options = {}
        if pattern := asked.whitespace_pattern or self.guided_whitespace_pattern:
            options["whitespace_pattern"] = pattern
        if asked.disable_any_whitespace:
            options["whitespace_pattern"] = ""
        return options


def _specs(
    prefix: str,
    schema: str | None,
    regex: str | None,
    choices: str | None,
    grammar: str | None,
    anything: bool | None,
) -> list[GrammarSpec]:
    """Of those fields of a kind that are set."""
    texts = {"json": schema, "regex": regex, "choice": choices, "grammar": grammar}
    specs = [
        GrammarSpec(_KINDS[name], text, prefix + name) for name, text in texts.items() if text is not None
    ]
    return specs + [GrammarSpec("json_object", ANY_OBJECT, prefix + "json_object")] * bool(anything)


def _with_options(spec: GrammarSpec, options: dict[str, Any]) -> GrammarSpec:
    schema = json.loads(spec.text)
    if not isinstance(schema.get(OPTIONS_OF_LLGUIDANCE, {}), dict):
        raise ValueError(f"{spec.field}.{OPTIONS_OF_LLGUIDANCE}: it must be an object")
    schema[OPTIONS_OF_LLGUIDANCE] = {**schema.get(OPTIONS_OF_LLGUIDANCE, {}), **options}
    return replace(spec, kind="json_schema", text=json.dumps(schema, ensure_ascii=False))


_KINDS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}
