"""What is answered where there is no route: where the API is, and what was probably meant."""

import doctest

import pytest
from served import client, on_a_port, parts_of, scripted
from whole import whole

from latentmem.serving.face import unknown
from latentmem.serving.face.unknown import nearest
from latentmem.serving.operators.doors import DOORS, TENANTS_DOORS


def test_the_examples_hold():
    assert doctest.testmod(unknown).failed == 0


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/v1/chat/completion", "POST /v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "POST /v1/chat/completions"),
        ("POST", "//v1/responses", "POST /v1/responses"),
        ("GET", "/v1/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/session/x/v1/chat/completions", "POST /sessions/x/v1/chat/completions"),
        ("POST", "/sessions/x/chat/completions", "POST /sessions/x/v1/chat/completions"),
        ("POST", "/sessions/x/agent/me/v1/responses", "POST /sessions/x/agents/me/v1/responses"),
        ("GET", "/sessions/x/trace", "GET /sessions/x/traces"),
        ("POST", "/sessions/x/finish", None),
        ("GET", "/", None),
        ("POST", "/v1/embeddings", None),
        ("GET", "/a-name-of-forty-characters-that-is-no-session", None),
        ("GET", "/" * 100, None),
    ],
)
def test_the_nearest_route_is_the_one_that_was_meant(method, path, meant):
    assert nearest(method, path, DOORS) == meant


def test_a_path_without_a_route_is_told_where_the_api_is(tmp_path):
    with parts_of(tmp_path, scripted("x")) as parts, on_a_port(parts.app()) as address, client(address) as http:
        at = f"OpenAI's API is at /v1 (base_url {address}/v1)"
        for method, path, said in (
            ("POST", "/chat/completions", f"{at}; did you mean POST /v1/chat/completions?"),
            ("POST", "/session/a/v1/responses", f"{at}; did you mean POST /sessions/a/v1/responses?"),
            ("GET", "/", at),
            ("POST", "/v1/embeddings", "of OpenAI's API there are /v1/chat/completions, /v1/responses and /v1/models"),
        ):
            answer = http.request(method, path, json={} if method == "POST" else None)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "no_such_route")
            assert error["message"] == f"there is no route {method} {path}; {said}"
        other = http.get("/v1/chat/completions")
        assert (other.status_code, other.headers["allow"]) == (405, "POST")
        assert other.json()["error"]["message"].endswith("did you mean POST /v1/chat/completions?")


def test_a_tenant_is_told_the_same_and_nothing_of_the_operators_routes(tmp_path):
    with whole(tmp_path, scripted("x")) as server, server.client(server.key("acme")) as http:
        said = http.post("/chat/completions", json={}).json()["error"]["message"]
        assert said.endswith(f"(base_url {server.address}/v1); did you mean POST /v1/chat/completions?")
        hidden, none = (http.get(path).json()["error"] for path in ("/metrics", "/metricz"))
        assert hidden["message"].replace("metrics", "metricz") == none["message"]
        assert http.post("/chat/completions", headers={"Authorization": "Bearer x"}).status_code == 401
    assert {*DOORS} - {*TENANTS_DOORS} == {"GET /metrics"}
