"""The OpenAPI document of the endpoints is true: what it admits is served, and what it does not is refused."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from latentmem.serving.face.routes import openai_routes
from scripted_desk import ScriptedDesk

ENDS = {"/v1/chat/completions": "post", "/v1/responses": "post", "/v1/models": "get", "/v1/models/{model}": "get"}
NOT_SAID = ("tools", "tool_choice", "previous_response_id")
"""Fields that no schema can tell all about: which tools there are, and which responses."""
CALL = '<tool_call>{"name": "weather"}</tool_call>'


@pytest.fixture(scope="module")
def app() -> Any:
    made = FastAPI()
    with ThreadPoolExecutor(4) as pool:
        made.router.routes.extend(openai_routes(ScriptedDesk(lambda ask, choice: CALL, step=50), pool))
        yield made


@pytest.fixture(scope="module")
def document(app: FastAPI) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_every_route_is_described(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    bases = ("", "/agents/{agent}", "/sessions/{sid}", "/sessions/{sid}/agents/{agent}")
    assert {path: list(kinds) for path, kinds in paths.items()} == {
        f"{base}{end}": [kind] for base in bases for end, kind in ENDS.items()
    }
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "model"} == set(body["required"])
    assert body["properties"]["n"]["anyOf"][0]["maximum"] == 8


@pytest.mark.parametrize("base", ["", "/sessions/{sid}/agents/{agent}"])
@pytest.mark.parametrize(
    ("end", "mode"),
    [*((end, "positive") for end in ENDS), ("/v1/chat/completions", "negative"), ("/v1/responses", "negative")],
)
def test_requests_made_from_the_document_are_answered_as_it_says(document: Any, base: str, end: str, mode: str) -> None:
    operation = document[f"{base}{end}"][ENDS[end].upper()]
    cases = operation.as_strategy(generation_mode=GenerationMode(mode))

    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def run(case: Any) -> None:
        response = case.call()
        param = response.json().get("error", {}).get("param") if response.status_code == 400 else None
        case.validate_response(response, excluded_checks=[positive_data_acceptance] if param in NOT_SAID else [])

    run()
