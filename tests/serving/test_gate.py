"""The gate in front of an application: credentials, scopes, size, places, and what is noted of each request."""

import asyncio
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from latentmem.serving.operators.doors import door_of
from latentmem.serving.operators.gate import MAX_BODY_BYTES, Gate, caller_of, depth_exceeds
from latentmem.serving.operators.keys import SCOPES, Keys
from latentmem.serving.operators.limits import Limits
from latentmem.serving.sessions.tokens import Opened, Tokens

CHAT = "/v1/chat/completions"
HERE = "http://127.0.0.1:8080"
SESSION_TOKEN = "session-token"


async def told(request):
    caller = caller_of(request.scope)
    return JSONResponse({"tenant": caller.tenant, "key": caller.key, "session": caller.session,
                         "body": (await request.body()).decode()})  # fmt: skip


async def fails(request):
    raise RuntimeError("our bug")


@pytest.fixture
def keys(tmp_path):
    made = Keys(tmp_path / "keys.sqlite")
    yield made
    made.close()


@pytest.fixture
def visits():
    return []


@pytest.fixture
def opened():
    """Sessions by their tokens."""
    return {}


@pytest.fixture
def limits():
    return Limits()


@pytest.fixture
def client(keys, visits, opened, limits):
    paths = [CHAT, "/sessions", "/sessions/{sid}", "/sessions/{sid}/traces", "/sessions/{sid}/events", "/forget"]
    paths += ["/metrics", "/healthz", "/hidden", "/sessions/{sid}/v1/chat/completions", "/sessions/{sid}/replay"]
    routes = [Route(path, told, methods=["GET", "POST"]) for path in paths]
    app = Starlette(routes=[*routes, Route("/v1/models", fails)])
    gate = Gate(app, keys, limits, opened.get, visits.append)
    with TestClient(gate, base_url=HERE, raise_server_exceptions=False) as client:
        yield client


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def error_of(answer):
    return answer.json()["error"]


def test_without_keys_everybody_on_this_machine_is_one_tenant(client):
    answer = client.post(CHAT, content=b'{"a": 1}')
    assert answer.json() == {"tenant": "", "key": "", "session": None, "body": '{"a": 1}'}


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1", "[::1]:8080", "[::1]", "127.0.0.2:1"])
def test_without_keys_this_machine_may_be_called_by_its_own_names(client, host):
    assert client.post(CHAT, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Host": "evil.example:8080"}, {"Host": ""}, {"Origin": "https://evil.example"}],
)
def test_without_keys_no_web_page_gets_in(client, headers, keys):
    answer = client.post(CHAT, headers=headers)
    assert answer.status_code == 403
    assert "latentmem keys create" in error_of(answer)["message"]
    _, secret = keys.create("acme", ["infer"])
    assert client.post(CHAT, headers=headers | bearer(secret)).status_code == 200


def test_once_there_are_keys_every_route_but_healthz_needs_one(client, keys):
    key, secret = keys.create("acme", SCOPES)
    for method, path in [
        ("POST", CHAT),
        ("GET", "/sessions/s"),
        ("GET", "/metrics"),
        ("GET", "/hidden"),
        ("GET", "/none"),
    ]:
        answer = client.request(method, path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert error_of(answer)["type"] == "authentication_error"
    assert client.get("/healthz").status_code == 200
    assert client.post(CHAT, headers=bearer(secret)).json()["tenant"] == "acme"
    keys.revoke(key.id)
    assert client.post(CHAT, headers=bearer(secret)).status_code == 401


@pytest.mark.parametrize(
    "credentials",
    ["", "Bearer", "Bearer ", "Basic {}", "bearer{}", "Bearer {}x", "Bearer  {} {}", "{}", "Bearer " + "x" * 5000],
)
def test_other_credentials_are_none(client, keys, credentials):
    _, secret = keys.create("acme", SCOPES)
    headers = {"Authorization": credentials.replace("{}", secret)}
    assert client.post(CHAT, headers=headers).status_code == 401


def test_two_credentials_are_none(client, keys):
    _, secret = keys.create("acme", SCOPES)
    headers = [("Authorization", f"Bearer {secret}"), ("Authorization", f"Bearer {secret}")]
    assert client.post(CHAT, headers=headers).status_code == 401


ASKED = {
    "infer": [("POST", CHAT), ("POST", "/sessions/s/v1/chat/completions")],
    "read": [("GET", "/sessions/s"), ("GET", "/sessions/s/traces")],
    "write": [("POST", "/sessions"), ("POST", "/sessions/s/events")],
    "admin": [("POST", "/forget")],
}


@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_opens_its_routes_alone(client, keys, scope):
    _, secret = keys.create("acme", [scope])
    for needed, requests in ASKED.items():
        for method, path in requests:
            answer = client.request(method, path, headers=bearer(secret))
            assert answer.status_code == (200 if needed == scope else 403), (method, path)
            if needed != scope:
                assert error_of(answer)["message"] == f"this key lacks the scope {needed}"


def test_metrics_and_routes_that_the_table_lacks_are_for_the_operator_alone(client, keys):
    _, tenants = keys.create("acme", SCOPES)
    _, mine = keys.create("", ["admin"])
    _, weak = keys.create("", ["infer", "read", "write"])
    for path in ("/metrics", "/hidden"):
        assert client.get(path, headers=bearer(mine)).status_code == 200
        assert client.get(path, headers=bearer(tenants)).status_code == 404
        assert client.get(path, headers=bearer(weak)).status_code == 404
    assert client.post("/healthz", headers=bearer(weak)).status_code == 404  # another method is another route


def test_a_sessions_token_opens_that_session_as_long_as_its_key_is_valid(client, keys, opened):
    key, _ = keys.create("acme", ["write"])
    opened[SESSION_TOKEN] = Opened("acme", "mine", key.id)
    answer = client.post(CHAT, headers=bearer(SESSION_TOKEN))
    assert answer.json() == {"tenant": "acme", "key": key.id, "session": "mine", "body": ""}
    for method, path, status in [
        ("POST", "/sessions/mine/v1/chat/completions", 200),
        ("POST", "/sessions/mine/events", 200),
        ("GET", "/sessions/mine", 200),
        ("POST", "/sessions/other/v1/chat/completions", 404),
        ("POST", "/sessions/other/events", 404),
        ("GET", "/sessions/Mine", 404),
        ("POST", "/sessions", 403),
        ("POST", "/forget", 403),
        ("POST", "/sessions/mine/replay", 403),
        ("GET", "/metrics", 404),
        ("GET", "/hidden", 404),
    ]:
        assert client.request(method, path, headers=bearer(SESSION_TOKEN)).status_code == status, (method, path)
    keys.revoke(key.id)
    assert client.post(CHAT, headers=bearer(SESSION_TOKEN)).status_code == 401


def test_a_body_that_is_too_long_is_refused_unread_or_read_no_further(client, visits):
    answer = client.post(CHAT, content=b"x", headers={"Content-Length": str(MAX_BODY_BYTES + 1)})
    assert answer.status_code == 413

    def parts():
        for _ in range(5):
            yield b"x" * (MAX_BODY_BYTES // 4)

    assert client.post(CHAT, content=parts()).status_code == 413
    assert client.post(CHAT, content=b"x" * MAX_BODY_BYTES).status_code == 200
    assert [visit.status for visit in visits] == [413, 413, 200]


def test_a_deep_body_is_refused_unparsed(client):
    assert client.post(CHAT, content=b"[" * 101 + b"]" * 101).status_code == 400
    assert client.post(CHAT, content=b"[" * 100 + b"]" * 100).status_code == 200
    assert client.post(CHAT, content=json.dumps({"a": "[" * 500}).encode()).status_code == 200


VALUES = st.recursive(
    st.text('[]{}"\\ab', max_size=6),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text('["\\', max_size=2), v, max_size=2),
)


def depth_of(value):
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@given(VALUES, st.integers(0, 6))
def test_depth_is_that_of_the_parsed_value(value, most):
    assert depth_exceeds(json.dumps(value).encode(), most) == (depth_of(value) > most)


def test_a_key_at_its_limit_gets_429_and_when_to_come_back(client, keys, visits):
    _, secret = keys.create("acme", ["infer"], requests_per_minute=2)
    statuses = [client.post(CHAT, headers=bearer(secret)).status_code for _ in range(2)]
    answer = client.post(CHAT, headers=bearer(secret))
    assert [*statuses, answer.status_code] == [200, 200, 429]
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert error_of(answer) == {
        "message": "this key may send 2 requests a minute", "type": "rate_limit_error", "param": None, "code": None
    }  # fmt: skip
    assert visits[-1].reason == "this key may send 2 requests a minute"


async def called(gate, receive, send, headers=(), path=CHAT):
    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"host", b"localhost"), *headers],
             "query_string": b"", "root_path": ""}  # fmt: skip
    await gate(scope, receive, send)


def test_who_goes_away_frees_the_place_in_whatever_state(keys, limits, visits):
    """A client that stops sending holds none; one that stops reading gives it back when its connection ends."""
    key, secret = keys.create("acme", ["infer"], parallel=1)
    headers = [(b"authorization", f"Bearer {secret}".encode())]
    seen = []

    async def slow(scope, receive, send):
        seen.append(limits.at_once(key.id))

        async def parts():
            while True:
                yield b"x"

        await StreamingResponse(parts())(scope, receive, send)

    gate = Gate(slow, keys, limits, ended=visits.append)

    async def half_a_body():
        seen.append(limits.at_once(key.id))
        return messages.pop(0)

    async def run():
        await called(gate, half_a_body, None, headers)
        sent = []

        async def send(message):
            sent.append(message)
            if len(sent) == 3:
                raise OSError("the connection was ended")

        with pytest.raises((OSError, ExceptionGroup)):
            await called(gate, whole, send, headers)

    async def whole():
        if not first:
            await asyncio.Event().wait()
        return first.pop()

    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    first = [{"type": "http.request", "body": b"{}", "more_body": False}]
    asyncio.run(run())
    assert seen == [0, 0, 1]
    assert limits.at_once(key.id) == 0
    assert (visits[0].status, visits[0].reason) == (499, "client gone")


def test_a_request_in_progress_counts_against_the_next(keys, limits):
    _, secret = keys.create("acme", ["infer"], parallel=1)
    began, go_on = threading.Event(), threading.Event()

    def waits(request):
        began.set()
        go_on.wait()
        return PlainTextResponse("done")

    app = Starlette(routes=[Route(CHAT, waits, methods=["POST"])])
    with TestClient(Gate(app, keys, limits), base_url=HERE) as client:
        first = []
        thread = threading.Thread(target=lambda: first.append(client.post(CHAT, headers=bearer(secret))))
        thread.start()
        began.wait()
        assert client.post(CHAT, headers=bearer(secret)).status_code == 429
        go_on.set()
        thread.join()
        assert first[0].text == "done"
        assert client.post(CHAT, headers=bearer(secret)).status_code == 200


def test_keys_that_cannot_be_read_open_nothing(client, keys, caplog):
    keys.path.write_bytes(b"no database at all" * 100)
    answer = client.post(CHAT, headers=bearer("lm_" + "0" * 12 + "_" + "x" * 43))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert str(keys.path) not in answer.text
    assert str(keys.path) in caplog.text


def test_no_secret_is_told_to_logs_or_in_answers(client, keys, visits, caplog, opened):
    _, secret = keys.create("acme", ["infer"])
    opened[SESSION_TOKEN] = Opened("acme", "s", "0" * 12)
    caplog.set_level("DEBUG")
    answers = [
        client.request(method, path, headers=bearer(token))
        for token in (secret, secret[:-1] + "!", SESSION_TOKEN)
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/forget"))
    ]
    assert 500 in [answer.status_code for answer in answers]
    told = caplog.text + repr(visits) + "".join(answer.text + repr(answer.headers) for answer in answers)
    drawn = secret.split("_", 2)[2]
    assert drawn not in told
    assert drawn[:-1] not in told
    assert SESSION_TOKEN not in told


def test_a_visit_tells_route_status_and_time_and_answers_bear_its_id(client, visits):
    answer = client.get("/sessions/some-name/traces?x=1")
    client.get("/v1/models")
    client.request("BREW", "/never/heard/of")
    traces, models, brew = visits
    assert (traces.method, traces.route, traces.status) == ("GET", "/sessions/{sid}/traces", 200)
    assert answer.headers["x-request-id"] == traces.id
    assert traces.seconds > 0
    assert (models.status, models.reason) == (500, "RuntimeError")
    assert (brew.method, brew.route, brew.status) == ("other", "unknown", 404)


@given(st.text(max_size=30), st.text(max_size=60))
def test_what_becomes_a_label_is_bounded(method, path):
    door = door_of(method, f"/{path}")
    assert door.method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "other")
    assert door.name == "unknown" or door.name.startswith("/")


def test_a_websocket_is_closed(client):
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
        pass


def test_no_other_spelling_of_a_sessions_token_is_one():
    tokens = Tokens(b"x" * 32)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.="
    for opened in (Opened("acme", "s" * length, "0123456789ab") for length in range(1, 5)):
        token = tokens.make(opened)
        assert tokens.read(token) == opened
        changed = [token[:i] + c + token[i + 1 :] for i in range(len(token)) for c in letters if c != token[i]]
        assert not any(map(tokens.read, [*changed, f"{token}=", f"{token} "]))
