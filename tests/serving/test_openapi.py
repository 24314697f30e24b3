"""The document of the server is complete and true: schemathesis asks what it promises, and what it forbids."""

import io
import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from served import on_a_port, parts_of, scripted
from starlette.routing import Route
from starlette.testclient import TestClient

from latentmem.serving.operators.audit import AuditLog
from latentmem.serving.operators.doors import DOORS, door_of
from latentmem.serving.operators.keys import SCOPES, Keys
from latentmem.serving.operators.logs import RequestLog
from latentmem.serving.operators.operators import Operators

HERE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole server without keys, in this process."""
    folder = tmp_path_factory.mktemp("openapi")
    operators = Operators(Keys(folder / "keys"), AuditLog(folder / "audit"), RequestLog(io.StringIO()))
    with parts_of(folder, scripted("It is 19."), shares=operators.shares) as parts:
        app = parts.app(authenticate=operators.authenticate, watched=operators.watched, routers=[operators.routes()])
        yield app, operators.gate(app, parts.tokens.read), operators
    operators.close()


@pytest.fixture(scope="module")
def api(made):
    app, gate, _ = made
    with on_a_port(gate) as address:
        schema = schemathesis.openapi.from_dict(app.openapi())
        schema.config.update(base_url=address)
        yield schema


RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
ASKED = [(words, RIGHT) for words in DOORS if words != "GET /openapi.json"]
ASKED += [(words, WRONG) for words in DOORS if words.startswith("POST ") or words.endswith("/traces")]
"""What takes nothing but names in its path takes whatever stands there."""


@pytest.mark.parametrize(("words", "mode"), ASKED)
def test_what_the_document_says_is_so(api, words, mode):
    ask_at_random(api, words, mode, examples=8)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "mode"), ASKED)
def test_what_the_document_says_is_so_at_length(api, words, mode):
    ask_at_random(api, words, mode, examples=300)


def ask_at_random(api, words, mode, examples):
    method, path = words.split(" ")
    operation = api[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck], database=None
    )
    def ask(case):
        if mode is RIGHT:  # no schema can tell which characters are printable, and which responses and tools there are
            case.path_parameters = dict.fromkeys(case.path_parameters, "some-name")
            if isinstance(case.body, dict):
                for name in ("previous_response_id", "latentmem", "metadata", "tool_choice", "tools"):
                    case.body.pop(name, None)
        case.call_and_validate()

    ask()


def test_every_route_of_the_application_is_in_the_document_and_has_a_scope(made):
    app, _, _ = made
    paths = app.openapi()["paths"]
    routes = {
        (method, re.sub(r":path\}", "}", route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods - {"HEAD"}
        if route.path != "/openapi.json"
    }
    told = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert told >= routes
    for method, path in told:
        assert f"{method} {path}" in DOORS, (method, path)


def test_each_template_is_found_by_a_path_of_it():
    for words in DOORS:
        method, template = words.split(" ")
        path = re.sub(r"\{\w+\}", "some-name", template)
        assert door_of(method, path).name == template


def test_the_document_itself_needs_any_key(made):
    _, gate, operators = made
    with TestClient(gate, base_url=HERE) as client:
        key, secret = operators.keys.create("acme", ["infer"])
        try:
            assert client.get("/openapi.json").status_code == 401
            answer = client.get("/openapi.json", headers={"Authorization": f"Bearer {secret}"})
            assert answer.json()["info"]["title"] == "LatentMem"
            assert client.get("/docs", headers={"Authorization": f"Bearer {secret}"}).status_code == 404
        finally:
            operators.keys.close()
            operators.keys.path.unlink()
            operators.keys._were_there = False
    assert SCOPES[0] in key.scopes
