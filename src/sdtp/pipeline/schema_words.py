"""How the config's schema and values are put into words, alike in messages and in the manual."""

import json
from typing import Any

Schema = dict[str, Any]

# JSON Schema's type names, as messages print them.
TYPES = {
    "object": "a block of keys",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


def kinds(node: Schema) -> list[str]:
    """JSON Schema's names of the types a node may have."""
    kind = node.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


def accepted(node: Schema) -> str:
    """What a schema node accepts, in words."""
    if "enum" in node:
        return "one of " + ", ".join(node["enum"])
    words = " or ".join(TYPES[kind] for kind in kinds(node))
    if node["type"] == "array":
        few = f" at least {node['minItems']}" if node.get("minItems") else ""
        words = f"a list of{few} distinct values, each {accepted(node['items'])}"
    if node.get("minLength"):
        words += f" of at least {node['minLength']} character"
    bounds = [
        f"{sign} {node[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in node
    ]
    if bounds:
        words += " " + " and ".join(bounds)
    if "multipleOf" in node:
        words += f", a multiple of {node['multipleOf']}"
    if "pattern" in node:
        words += f" matching `{node['pattern']}`"
    return words


def shown(value: Any) -> str:
    """A value as messages and the manual print it."""
    return json.dumps(value, ensure_ascii=False, default=str)
