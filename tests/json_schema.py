"""As much of JSON Schema as docs/results.schema.json uses."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "docs" / "results.schema.json").read_text())
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
_KNOWN = {
    "$ref", "type", "properties", "required", "additionalProperties", "items", "enum", "const", "minimum", "maximum",
    "description",
}  # fmt: skip


def _is(value, kind):
    if isinstance(value, bool) and kind in ("integer", "number"):
        return False
    return isinstance(value, _TYPES[kind])


def problems(value, schema, path="document"):
    """What of the value does not fit, each with its path."""
    assert set(schema) <= _KNOWN, schema
    if "$ref" in schema:
        yield from problems(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], path)
        return
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{path}: expected {' or '.join(kinds)}, got {value!r:.80}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{path}: expected {schema['const']!r}, got {value!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: expected one of {schema['enum']}, got {value!r}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            yield f"{path}: {value} is out of range"
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from problems(item, schema["items"], f"{path}[{i}]")
    if isinstance(value, dict):
        own = schema.get("properties", {})
        yield from (f"{path}: {name!r} is missing" for name in schema.get("required", []) if name not in value)
        more = schema.get("additionalProperties", True)
        for name, item in value.items():
            if name in own:
                yield from problems(item, own[name], f"{path}.{name}")
            elif more is False:
                yield f"{path}: {name!r} is not in the schema"
            elif isinstance(more, dict):
                yield from problems(item, more, f"{path}.{name}")


def check(document):
    """The document fits the schema that it names."""
    kinds = {d["properties"]["schema"]["const"]: d for d in SCHEMA["$defs"].values() if "schema" in d["properties"]}
    assert document["schema"] in kinds
    document = json.loads(json.dumps(document, allow_nan=False))  # as a reader gets it
    assert list(problems(document, kinds[document["schema"]])) == []
