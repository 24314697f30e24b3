"""What the OpenAPI document says about the endpoints: the schema of a request is the very one it is read by."""

from typing import Any

from pydantic import BaseModel

from latentmem.serving.identity import NAME

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS = {
    400: "A field is at fault, or is not served; `param` names it.",
    401: "There are keys, and the request has none.",
    403: "The key or the session's token does not allow it.",
    404: "There is no such model.",
    409: "The session has ended.",
    413: "The body is too long.",
    415: "The body is not `application/json`.",
    429: "There is no place; `Retry-After` says when to come back.",
    500: "The server failed.",
    503: "The engine is away, or the server ends; `Retry-After` says when to come back.",
    507: "The disk is full.",
}
_OWN = {
    "type": "object",
    "required": ["session", "role", "role_is_known", "memory", "sources", "latent_tokens", "timings", "warnings"],
    "properties": {
        "session": {"type": "string"},
        "role": {"type": "string"},
        "role_is_known": {"type": ["boolean", "null"]},
        "memory": {"type": "string"},
        "sources": {"type": "array", "items": {"type": "string"}},
        "latent_tokens": {"type": "integer"},
        "timings": {"type": "object", "additionalProperties": {"type": "number"}},
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
}


def refusals() -> dict[int | str, dict[str, Any]]:
    """Return the responses that refuse a request."""
    json = {"application/json": {"schema": ERROR}}
    return {status: {"description": said, "content": json} for status, said in _REFUSALS.items()}


def request_body(form: type[BaseModel]) -> dict[str, Any]:
    """Return what a request's body is described by."""
    schema = form.model_json_schema(mode="validation")
    named = schema.pop("$defs", {})
    return {"required": True, "content": {"application/json": {"schema": _inlined(schema, named)}}}


def answers(kind: str, listed: str) -> dict[int | str, dict[str, Any]]:
    """Return the responses of an endpoint: an object of this kind with this list in it, or a stream, or a refusal."""
    schema = {
        "type": "object",
        "required": ["id", "object", "model", listed, "usage", "latentmem"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "model": {"type": "string"},
            listed: {"type": "array", "items": {"type": "object"}},
            "usage": {"type": "object"},
            "latentmem": _OWN,
        },
    }
    content = {"application/json": {"schema": schema}, "text/event-stream": {"schema": {"type": "string"}}}
    return {200: {"description": "The answer; a stream if `stream` is true.", "content": content}} | refusals()


def path_parameters(path: str) -> list[dict[str, Any]]:
    """Return the descriptions of what stands in braces in a path."""
    named = {"type": "string", "pattern": NAME}
    said = {
        "sid": ("The session's id.", named),
        "agent": ("The role's name.", named),
        "model": ("The model's name.", named),
    }
    return [
        {"name": name, "in": "path", "required": True, "description": text, "schema": schema}
        for name, (text, schema) in said.items()
        if f"{{{name}" in path
    ]


def _inlined(value: Any, named: dict[str, Any]) -> Any:
    """Return a schema with the schemas that it names written out."""
    if isinstance(value, list):
        return [_inlined(part, named) for part in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inlined(named[value["$ref"].rpartition("/")[2]], named)
    return {key: _inlined(part, named) for key, part in value.items() if key != "discriminator"}
