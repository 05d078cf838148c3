"""Grammars that a text follows, of JSON schemas and regular expressions, by llguidance."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

# Bounds where a schema has none: greedy decoding of a small model repeats itself, and would never close a string.
LONGEST_STRING = 256  # characters
MOST_ITEMS = 16  # of an array
LARGEST = 2**53 - 1  # of an integer, and its opposite: beyond it programs read JSON's numbers differently (RFC 8259)
SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems")  # lists of schemas
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # names with schemas
ONE = ("items", "additionalProperties", "contains")


def compile_grammar(json_schema: dict[str, Any] | None, regex: str | None) -> str | None:
    """Return llguidance's grammar of a JSON schema, or of a regular expression; None where neither is given.

    JSON has no white space between its parts. Strings, arrays and integers without a bound of their own get one.

    Raises:
        ValueError: both are given, one is not understood, or llguidance is not installed.
    """
    if json_schema is None and regex is None:
        return None
    field, given = ("regex", regex) if json_schema is None else ("json_schema", json_schema)
    if json_schema is not None and regex is not None:
        raise ValueError("regex: does not go with json_schema; give one of them")
    if not isinstance(given, dict if field == "json_schema" else str):
        raise ValueError(f"{field}: {given!r} is not {'an object' if field == 'json_schema' else 'a text'}")
    if given == "":
        raise ValueError("regex: is empty, which only an empty answer matches; leave it out, or give one")
    try:
        text = given if field == "regex" else json.dumps(_bounded(given))
    except (ValueError, TypeError, RecursionError) as error:  # a dict that is no JSON
        raise ValueError(f"{field}: {error}") from error
    return _compiled(field, text)


@lru_cache(maxsize=64)  # settings are made several times for one text, and prompts of a file share theirs
def _compiled(field: str, text: str) -> str:
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise ValueError(f"{field}: needs llguidance, which is not installed; pip install llguidance") from error
    try:
        if field == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        wrong = LLMatcher.validate_grammar(grammar)
    except (ValueError, TypeError) as error:
        wrong = str(error)
    if wrong:
        lines = wrong.splitlines()  # of a regular expression with the place, and the reason behind that
        reason = next((line for line in lines if line.startswith("error: ")), lines[0])
        raise ValueError(f"{field}: {reason.removeprefix('error: ')}")
    return grammar


def _bounded(schema: Any) -> Any:
    """Return a schema whose strings, arrays and integers have bounds."""
    if not isinstance(schema, dict):
        return schema
    found = {
        name: {key: _bounded(each) for key, each in part.items()}
        if name in NAMED and isinstance(part, dict)
        else [_bounded(each) for each in part]
        if name in SEVERAL and isinstance(part, list)
        else _bounded(part)
        if name in ONE
        else part
        for name, part in schema.items()
    }
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" in kinds and not {"maxLength", "enum", "const", "pattern", "format"} & schema.keys():
        found["maxLength"] = max(LONGEST_STRING, schema.get("minLength", 0))
    if "array" in kinds and not {"maxItems", "enum", "const"} & schema.keys():
        found["maxItems"] = max(MOST_ITEMS, schema.get("minItems", 0))
    if "integer" in kinds and not {"enum", "const", "multipleOf"} & schema.keys():
        for end, largest in (("minimum", -LARGEST), ("maximum", LARGEST)):
            if not {end, f"exclusive{end.capitalize()}"} & schema.keys():
                found[end] = largest
    return found
