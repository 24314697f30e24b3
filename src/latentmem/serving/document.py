"""The OpenAPI document of the server: what each route takes, and every status that it may answer with.

All routes describe themselves. Here they get what the gate and the server add to each: its key and scope, and errors.
"""

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from latentmem.serving.face.described import ERROR
from latentmem.serving.operators.doors import DOORS

_ERRORS = {
    400: "A part of the request is wrong; `param` names it.",
    401: "There is no valid key.",
    403: "The key lacks a scope, or the request comes from where none may come.",
    404: "There is no such thing, or it is another tenant's.",
    405: "There is no such method.",
    409: "It is in another state: it has ended, or exists already.",
    413: "The body is too long.",
    415: "The body is no JSON.",
    429: "A limit of the key is reached, or the queue is full; `Retry-After` tells when to come again.",
    500: "The server failed.",
    503: "Not now; `Retry-After` tells when to come again.",
    507: "The disk is full.",
}


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """Return the document of an application with all its routes; it is made once."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(
        title=app.title,
        version=version("latentmem"),
        summary="Agent programs, served with a memory.",
        routes=app.routes,
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for schema in schemas.values():
        _say_names(schema)
    schemas["Error"] = ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _complete(operation, f"{method.upper()} {path}")
    app.openapi_schema = document
    return document


def _say_names(schema: dict[str, Any]) -> None:
    """Say of objects whose keys have a pattern that they have no other keys."""
    for part in schema.get("properties", {}).values():
        if patterns := part.pop("patternProperties", None):
            ((pattern, values),) = patterns.items()
            part |= {"additionalProperties": values, "propertyNames": {"pattern": pattern, "maxLength": 200}}


def _complete(operation: dict[str, Any], words: str) -> None:
    """Add the errors that a route may give, and the key that it needs."""
    responses = operation["responses"]
    responses.pop("422", None)
    for response in responses.values():  # what an event holds has no schema of its own
        response.get("content", {}).get("text/event-stream", {}).pop("schema", None)
    for status, text in _ERRORS.items():
        error = {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        responses.setdefault(str(status), error)
    scope = DOORS.get(words.replace(":path}", "}"), "operator")
    operation["security"] = [] if scope == "none" else [{}, {"key": []}]
    if scope not in ("none", "any"):
        operation["description"] = f"{operation.get('description', operation['summary'])} Scope: {scope}."
