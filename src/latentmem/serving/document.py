"""The OpenAPI document of the server: every route, what each takes, and every status that it may answer with.

Sessions and operators' routes describe themselves. OpenAI's endpoints are described by the very forms that read their
bodies; here they get their answers, and all routes the errors that the gate and the server may give.
"""

from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from latentmem.serving.face.body import MAX_MESSAGES
from latentmem.serving.face.chat_request import ChatRequest
from latentmem.serving.face.responses_request import ResponsesRequest
from latentmem.serving.face.routes import BASES
from latentmem.serving.operators.doors import DOORS

_SCHEMAS = "#/components/schemas/"
_TEXT = {"type": "string"}
_NAME = {"type": "string", "minLength": 1, "maxLength": 200, "description": "Printable characters."}
_COUNT = {"type": "integer", "minimum": 0}


def _object(properties: Mapping[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required}


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(items)}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"{_SCHEMAS}{name}"}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(schema), {"type": "null"}]}


_OWN = _object(
    {
        "session": _TEXT,
        "role": _TEXT,
        "memory": _TEXT,
        "sources": _list(_TEXT),
        "latent_tokens": _COUNT,
        "timings": {"type": "object", "additionalProperties": {"type": "number"}},
        "prompt_token_ids": _list({"type": "integer"}),
        "choices": _list({"type": "object"}),
    },
    "prompt_token_ids",
    "choices",
)
_ANSWERS: dict[str, dict[str, Any]] = {
    "Error": _object(
        {
            "error": _object(
                {"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)},
            )
        }
    ),
    "LatentMem": _OWN,
    "ChatCompletion": _object(
        {
            "id": _TEXT,
            "object": {"const": "chat.completion"},
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "message": _object(
                            {
                                "role": {"const": "assistant"},
                                "content": _or_null(_TEXT),
                                "refusal": _or_null(_TEXT),
                                "tool_calls": _list({"type": "object"}),
                            },
                            "tool_calls",
                        ),
                        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
                        "logprobs": _or_null({"type": "object"}),
                    }
                )
            ),
            "usage": _object(
                {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT, "latent_tokens": _COUNT}
            ),
            "latentmem": _ref("LatentMem"),
        }
    ),
    "Response": _object(
        {
            "id": _TEXT,
            "object": {"const": "response"},
            "created_at": {"type": "number"},
            "model": _TEXT,
            "status": {"enum": ["completed", "incomplete"]},
            "output": _list(_object({"type": {"enum": ["message", "function_call"]}, "id": _TEXT})),
            "usage": {"type": "object"},
            "latentmem": _ref("LatentMem"),
        }
    ),
    "Model": _object(
        {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": {"const": "latentmem"}}
    ),
    "Models": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
}
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
    schemas |= deepcopy(_ANSWERS)
    schemas |= _forms("Chat", ChatRequest, "messages") | _forms("Responses", ResponsesRequest, "input")
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for schema in schemas.values():
        _say_names(schema)
    for base in BASES:
        document["paths"] |= _openai_paths(base)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _complete(operation, f"{method.upper()} {path}")
    app.openapi_schema = document
    return document


def _forms(prefix: str, form: type[BaseModel], listed: str) -> dict[str, Any]:
    """Return the schema of a body and of all that it consists of, with names of their own."""
    schema = form.model_json_schema(ref_template=f"{_SCHEMAS}{prefix}{{model}}")
    parts = schema.pop("$defs", {})
    limited = schema["properties"][listed]
    for each in (limited, *limited.get("anyOf", ())):
        if each.get("type") == "array":
            each["maxItems"] = MAX_MESSAGES
    return {f"{prefix}{name}": part for name, part in parts.items()} | {form.__name__: schema}


def _say_names(schema: dict[str, Any]) -> None:
    """Say of objects whose keys have a pattern that they have no other keys."""
    for part in schema.get("properties", {}).values():
        if patterns := part.pop("patternProperties", None):
            ((pattern, values),) = patterns.items()
            part |= {"additionalProperties": values, "propertyNames": {"pattern": pattern, "maxLength": 200}}


def _openai_paths(base: str) -> dict[str, Any]:
    named = [
        {"name": name, "in": "path", "required": True, "schema": _NAME}
        for name in ("sid", "agent")
        if f"{{{name}}}" in base
    ]

    def operation(name: str, summary: str, answer: str, body: str | None = None, *more: dict[str, Any]) -> Any:
        made: dict[str, Any] = {
            "tags": ["openai"],
            "summary": summary,
            "operationId": f"{name}{'_of_agent' if len(named) == 2 else '_of_session' if named else ''}",
            "parameters": [*named, *more],
            "responses": {"200": {"description": summary, "content": {"application/json": {"schema": _ref(answer)}}}},
        }
        if body is not None:
            made["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
            made["responses"]["200"]["content"]["text/event-stream"] = {}
        return made

    model = {"name": "model", "in": "path", "required": True, "schema": _NAME}
    return {
        f"{base}/v1/chat/completions": {
            "post": operation("chat", "Ask for the next message of a chat.", "ChatCompletion", "ChatRequest")
        },
        f"{base}/v1/responses": {
            "post": operation("respond", "Ask for the next message.", "Response", "ResponsesRequest")
        },
        f"{base}/v1/models": {"get": operation("models", "List the models that can be asked.", "Models")},
        f"{base}/v1/models/{{model}}": {"get": operation("model", "Tell of one model.", "Model", None, model)},
    }


def _complete(operation: dict[str, Any], words: str) -> None:
    """Add the errors that a route may give, and the key that it needs."""
    responses = operation["responses"]
    responses.pop("422", None)
    for status, text in _ERRORS.items():
        error = {"description": text, "content": {"application/json": {"schema": _ref("Error")}}}
        responses.setdefault(str(status), error)
    scope = DOORS.get(words, "operator")
    operation["security"] = [] if scope == "none" else [{}, {"key": []}]
    if scope not in ("none", "any"):
        operation["description"] = f"{operation.get('description', operation['summary'])} Scope: {scope}."
