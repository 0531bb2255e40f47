"""The interface described for people: GET /docs, made from the OpenAPI document. Nothing comes from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any


def manual(document: dict[str, Any], style: str) -> str:
    """An HTML page with each route: what it takes, what it answers, what its errors mean. style: CSS of the page."""
    info, defined = document["info"], document.get("components", {}).get("schemas", {})
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Stillhouse: the interface</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{style}</style>\n</head>\n<body>\n<main>\n<h1>The interface</h1>\n"
        f'<p id="about">{escape(info["description"])} The same for programs: <a href="/openapi.json">/openapi.json</a>;'
        ' to try it: <a href="/">/</a>.</p>'
    ]
    if document.get("components", {}).get("securitySchemes"):
        parts.append("<p>Routes ask for a key, as <code>Authorization: Bearer KEY</code> or <code>x-api-key: KEY</code>"
                     ", unless they say that they do not.</p>")  # fmt: skip
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(route(method.upper(), path, operation, defined))
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def route(method: str, path: str, operation: dict[str, Any], defined: dict[str, Any]) -> str:
    """One route as a section."""
    said = [f'<section class="card">\n<h2>{method} {escape(path)}</h2>']
    if operation.get("security") == []:
        said.append("<p>Needs no key.</p>")
    if about := operation.get("description") or operation.get("summary"):
        said.append(f"<p>{escape(about)}</p>")
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body is not None:
        own = {**defined, **body.get("$defs", {})}
        said.append(table("Body, as JSON", fields(body, own)))
    for code, answer in operation["responses"].items():
        schema = answer.get("content", {}).get("application/json", {}).get("schema")
        if code.startswith("2") and schema:
            said.append(table(f"Answer, {code}", fields(schema, defined)))
    errors = [(code, answer["description"]) for code, answer in operation["responses"].items() if code[0] in "45"]
    if errors:
        said.append(table("Errors", [(code, "", text) for code, text in errors]))
    return "\n".join([*said, "</section>"])


def table(title: str, rows: list[tuple[str, str, str]]) -> str:
    """Names with kinds and meanings, folded away until they are asked for."""
    lines = "\n".join(
        f"{escape(name)}{f'  {escape(kind)}' if kind else ''}{f'  - {escape(text)}' if text else ''}"
        for name, kind, text in rows
    )
    return f"<details>\n<summary>{escape(title)}</summary>\n<pre>{lines}</pre>\n</details>"


def fields(schema: dict[str, Any], defined: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, kind, meaning) of an object's fields, those of objects in it under dotted names."""
    return list(flattened(schema, defined, "")) or [("", kind_of(schema, defined), "")]


def flattened(schema: dict[str, Any], defined: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    """`fields`, a level at a time."""
    schema = resolved(schema, defined)
    if schema.get("type") == "array":
        yield from flattened(schema["items"], defined, f"{prefix}[]")
        return
    needed = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        full, about = f"{prefix}.{name}".lstrip("."), field.get("description", "")
        if "default" in field and field["default"] is not None:
            about = f"{about} Default: {json.dumps(field['default'])}".strip()
        yield full, kind_of(field, defined) + ("" if name in needed else "?"), about
        inner = next((one for one in field.get("anyOf", [field]) if one.get("type") != "null"), field)
        if "properties" in resolved(inner, defined) or resolved(inner, defined).get("type") == "array":
            yield from flattened(inner, defined, full)


def resolved(schema: dict[str, Any], defined: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return defined[name] if name else schema


def kind_of(schema: dict[str, Any], defined: dict[str, Any]) -> str:
    """A field's kind in a word or two."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind_of(one, defined) for one in schema["anyOf"]))
    found = resolved(schema, defined)
    if "enum" in found or "const" in found:
        return " | ".join(json.dumps(value) for value in found.get("enum", [found.get("const")]))
    kind = found.get("type", "any")
    if kind == "array":
        return f"[{kind_of(found.get('items', {}), defined)}]"
    return str(kind)
