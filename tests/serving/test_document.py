"""The document of the server is complete and true: schemathesis asks what it promises, and what it forbids."""

import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from served import scripted
from starlette.routing import Route
from whole import whole

from latentmem.serving.operators.doors import DOORS, door_of


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A whole server without keys."""
    with whole(tmp_path_factory.mktemp("openapi"), scripted("It is 19.")) as made:
        yield made


@pytest.fixture(scope="module")
def api(server):
    schema = schemathesis.openapi.from_dict(server.app.openapi())
    schema.config.update(base_url=server.address)
    return schema


RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
ASKED = [(words, RIGHT) for words in DOORS if words != "GET /openapi.json"]
ASKED += [(words, WRONG) for words in DOORS if words.startswith("POST ") or words.endswith(("/traces", " /sessions"))]
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
                if words == "POST /forget":  # without any filter it is refused
                    case.body["session"] = "some-name"
        response = case.call()
        if response.status_code != 413:  # refused too, which schemathesis does not count as such
            case.validate_response(response)

    ask()


def test_every_route_of_the_application_is_in_the_document_and_has_a_scope(server):
    paths = server.app.openapi()["paths"]
    routes = {
        (method, re.sub(r":path\}", "}", route.path))
        for route in server.app.routes
        if isinstance(route, Route)
        for method in route.methods - {"HEAD"}
        if route.path != "/openapi.json"
    }
    told = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert told >= routes
    assert {f"{method} {path}" for method, path in told} == set(DOORS) - {"GET /openapi.json"}


def test_each_template_is_found_by_a_path_of_it():
    for words in DOORS:
        method, template = words.split(" ")
        path = re.sub(r"\{\w+\}", "some-name", template)
        assert door_of(method, path).name == template


def test_the_document_itself_needs_any_key(tmp_path):
    with whole(tmp_path, scripted("19")) as made, made.client() as client:
        headers = made.key("acme", "infer")
        assert client.get("/openapi.json").status_code == 401
        assert client.get("/openapi.json", headers=headers).json()["info"]["title"] == "LatentMem"
        assert client.get("/docs", headers=headers).status_code == 404  # a page that would load scripts of others
