"""Random JSON schemas, and whether an answer is what one describes, by the judgement of jsonschema and of llguidance.

The same seed gives the same schemas. Knows JSON; knows no model.
"""

import json
import random
from typing import Any

UNBOUNDED: dict[str, dict[str, Any]] = {  # schemas whose values may be of any length
    "strings": {"type": "array", "items": {"type": "string"}},
    "tree": {"type": "object", "additionalProperties": {"$ref": "#"}},
    "number": {"type": "number"},
    "object": {"type": "object"},
}
ENUM = [1, -2.5, None, True, "é", "日本", 'a"\\', [1, {"a": []}]]
NAMES = ["a", "née", "key", "b c"]


def draw_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose values have a largest length."""
    kinds = ["string", "enum", "integer", "boolean", "null"] + ["object", "array", "anyOf"] * 2 * (depth > 0)
    kind = rng.choice(kinds) if depth < 2 else "object"
    match kind:
        case "string":
            return {"type": "string", "minLength": rng.randrange(2), "maxLength": rng.randrange(1, 5)}
        case "enum":
            return {"enum": rng.sample(ENUM, 3)}
        case "integer":
            return {"type": "integer", "minimum": rng.randrange(-200, 0), "maximum": rng.randrange(300)}
        case "anyOf":
            return {"anyOf": [draw_schema(rng, depth - 1) for _ in range(2)]}
        case "array":
            return {"type": "array", "items": draw_schema(rng, depth - 1), "maxItems": rng.randrange(1, 4)}
        case "object":
            properties = {name: draw_schema(rng, depth - 1) for name in rng.sample(NAMES, 2)}
            required = rng.sample([*properties], rng.randrange(3))
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def as_response_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def find_fault(text: str, schema: dict[str, Any]) -> str | None:
    """Why a text is no JSON of the schema; None if it is."""
    import jsonschema  # a package of the tests

    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as e:
        return str(e).splitlines()[0]
    return None


def is_prefix(text: str, response_format: dict[str, Any]) -> bool:
    """Whether a text of the format may begin so, read as bytes."""
    from llguidance import LLMatcher, LLTokenizer  # a package of the extra `grammar`

    from ..engine.grammar import write_grammar

    data = list(text.encode())
    return LLMatcher(LLTokenizer("byte"), write_grammar(response_format)).try_consume_tokens(data) == len(data)
