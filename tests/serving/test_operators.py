"""Metrics, logs, audit and limits of one server, over a small application whose desk is a stand-in."""

import asyncio
import io
import json
import re
from dataclasses import replace

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from latentmem.errors import AuditError
from latentmem.serving.asks import Answer, Ask, Choice, Counted, Refused, Speaker, Spoken, Timings, Who
from latentmem.serving.face.errors import refuse
from latentmem.serving.operators.audit import AuditLog, verify
from latentmem.serving.operators.keys import SCOPES, Keys
from latentmem.serving.operators.logs import RequestLog
from latentmem.serving.operators.metrics import MAX_TENANTS, Metrics
from latentmem.serving.operators.operators import Operators
from latentmem.serving.operators.visits import Caller, Visit
from latentmem.serving.sessions.tokens import Opened
from latentmem.trajectory import Conversation, Message, Recalled, Role

CHAT = "/v1/chat/completions"
PROMPT, RESPONSE = "the prompt's words", "the response's words"


def message(sources=("a1", "b2")):
    return Message(
        role="planner", system="", user=PROMPT, response=RESPONSE, token_ids=(5, 6, 7), logps=(0.0, 0.0, 0.0),
        finish="stop", temperature=1.0, num_prompt_tokens=20,
        recalled=Recalled(kind="latent", text="what was remembered", sources=sources, num_latents=4),
    )  # fmt: skip


class Turn:
    known = None
    recalled = None
    tool_form = ""
    speaker = Speaker(Role(name="planner", profile=""), is_known=True)

    def __init__(self, session):
        self.session = session
        self.ends = []

    def speak(self, choice, on_tokens):
        return Spoken(message(), Timings(0.1, 0.2, 0.3, 0.4), counted=Counted(kept=12))

    def text_of(self, token_ids):
        return RESPONSE

    def answered(self, answer):
        self.ends.append("answered")

    def lost(self, reason):
        self.ends.append(reason)


class Desk:
    def __init__(self):
        self.asked, self.turns = [], []

    def models(self):
        return ["tiny"]

    async def earlier(self, who, call):
        self.asked.append(who)

    async def admit(self, who, ask):
        self.asked.append(who)
        self.turns.append(Turn(who.session or "made-up"))
        return self.turns[-1]


@pytest.fixture
def desk():
    return Desk()


@pytest.fixture
def log():
    return io.StringIO()


@pytest.fixture
def operators(tmp_path, log):
    made = Operators(Keys(tmp_path / "keys"), AuditLog(tmp_path / "audit"), RequestLog(log))
    yield made
    made.close()


def app_of(operators, desk, opened=()):
    app, watched = FastAPI(), operators.watched(desk)
    app.include_router(operators.routes())

    @app.post(CHAT)
    async def chat(request: Request):
        body = await request.json()
        who = replace(await operators.authenticate(request), **({"session": body["session"]} if body else {}))
        ask = Ask("call-1", "tiny", Conversation(messages=({"role": "user", "content": PROMPT},)))
        try:
            turn = await watched.admit(who, ask)
        except Refused as refused:
            return refuse(refused)
        spoken = await asyncio.to_thread(turn.speak, 0, None)
        if body and body["session"] == "loses":
            turn.lost("client gone")
            return JSONResponse({}, 499)
        answer = Answer(
            "call-1", 0, "tiny", turn.session, (Choice(RESPONSE, (), "stop", spoken.message),), spoken.timings
        )
        try:
            await asyncio.to_thread(turn.answered, answer)
        except Refused as refused:
            return refuse(refused)
        return {"said": RESPONSE}

    return TestClient(operators.gate(app, dict(opened).get), base_url="http://localhost")


@pytest.fixture
def client(operators, desk):
    with app_of(operators, desk) as client:
        yield client


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def figures(client, **headers):
    text = client.get("/metrics", **headers).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_metrics_count_requests_tokens_parts_and_recalls(client):
    client.post(CHAT, json={})
    client.post(CHAT, json={})
    found = figures(client)
    assert found["latentmem_requests_total", "POST", CHAT, "200"] == 2
    assert found["latentmem_request_seconds_count", CHAT] == 2
    assert [found["latentmem_tokens_total", kind, ""] for kind in ("prompt", "latent", "generated")] == [40, 8, 6]
    assert found["latentmem_cached_prompt_tokens_total", ""] == 24
    parts = {part: found["latentmem_part_seconds_sum", part] for part in ("recall", "composing", "queue", "generation")}
    assert parts == pytest.approx({"recall": 0.2, "composing": 0.4, "queue": 0.6, "generation": 0.8})
    assert found["latentmem_recalls_total", "latent"] == 2
    assert found["latentmem_lost_calls_total",] == 0


def test_metrics_hold_nothing_of_the_process_and_no_labels_of_clients(client):
    for path in ("/sessions/secret-name/traces", "/x/y", "/sessions/%F0%9F%92%A9"):
        client.get(path)
    client.request("PROPFIND", "/")
    text = client.get("/metrics").text
    assert "secret-name" not in text
    assert {name.split("_")[0] for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)} == {"latentmem"}
    assert set(re.findall(r'route="([^"]*)"', text)) <= {"/sessions/{sid}", "/sessions/{sid}/traces", "unknown"}


def test_lost_calls_are_counted_and_refusals_by_their_status(client, operators):
    client.post(CHAT, json={"session": "loses"})
    _, secret = operators.keys.create("", SCOPES, requests_per_minute=1)
    client.post(CHAT, json={})
    client.post(CHAT, json={}, headers=bearer(secret))
    client.post(CHAT, json={}, headers=bearer(secret))
    _, reader = operators.keys.create("", ["admin"])
    found = figures(client, headers=bearer(reader))
    assert found["latentmem_lost_calls_total",] == 1
    assert found["latentmem_refused_total", "401"] == 1
    assert found["latentmem_refused_total", "429"] == 1


def test_what_is_read_when_asked_for_may_fail_alone(client, operators):
    operators.metrics.reads("queue_length", "Requests that wait", lambda: 3)
    operators.metrics.reads("sessions", "Sessions", lambda: {"running": 2, "failed": 1}, "state")
    operators.metrics.reads("bank_trajectories", "Trajectories", lambda: 1 / 0)
    found = figures(client)
    assert found["latentmem_queue_length",] == 3
    assert found["latentmem_sessions", "running"] == 2
    assert ("latentmem_bank_trajectories",) not in found


def test_tenants_beyond_a_bound_are_counted_together():
    metrics = Metrics()
    for i in range(MAX_TENANTS + 50):
        metrics.observe(Visit("r", "POST", CHAT, Caller(f"t{i}"), 200, prompt_tokens=1))
    tenants = re.findall(rb'latentmem_tokens_total\{kind="prompt",tenant="([^"]*)"\} (\S+)', metrics.text())
    assert len(tenants) == MAX_TENANTS + 1
    assert dict(tenants)[b"other"] == b"50.0"


def test_the_log_has_a_line_of_json_for_each_request_without_its_texts(client, log):
    client.post(CHAT, json={})
    client.get("/never%0Aheard%1B[2J")
    said, unknown = map(json.loads, log.getvalue().splitlines())
    assert said["route"] == CHAT
    assert said["tokens"] == {"prompt": 20, "cached": 12, "latent": 4, "generated": 3}
    assert said["parts"] == {"recall": 0.1, "composing": 0.2, "queue": 0.3, "generation": 0.4}
    assert (said["session"], said["role"], said["calls"], said["sources"]) == (
        "made-up",
        "planner",
        ["call-1"],
        ["a1", "b2"],
    )
    assert (unknown["route"], unknown["status"]) == ("unknown", 404)
    assert "words" not in log.getvalue()
    assert "remembered" not in log.getvalue()


def test_texts_are_logged_when_asked_for_and_nothing_when_not(tmp_path, desk):
    for detail, expected in (("texts", True), ("none", False)):
        stream = io.StringIO()
        made = Operators(Keys(tmp_path / "k"), AuditLog(tmp_path / f"a-{detail}"), RequestLog(stream, detail))
        with app_of(made, desk) as client:
            client.post(CHAT, json={})
        made.close()
        if expected:
            texts = json.loads(stream.getvalue())["texts"]
            assert texts["asked"]["messages"][0]["content"] == PROMPT
            assert texts["answered"] == [RESPONSE]
        else:
            assert stream.getvalue() == ""


def test_a_log_that_takes_no_more_lines_stops_no_request(operators, desk):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    operators.log = RequestLog(Full())
    with app_of(operators, desk) as client:
        assert client.post(CHAT, json={}).status_code == 200


def lines(operators):
    return [json.loads(line) for line in operators.audit.path.read_text().splitlines()]


def test_the_audit_tells_which_trajectories_were_recalled_for_whom(client, operators):
    key, secret = operators.keys.create("acme", ["infer"])
    client.post(CHAT, json={}, headers=bearer(secret))
    (line,) = lines(operators)
    told = {name: value for name, value in line.items() if name not in ("number", "time", "previous", "hash")}
    assert told == {
        "event": "recalled", "tenant": "acme", "key": key.id, "session": "made-up", "call": "call-1", "role": "planner",
        "memory": "latent", "sources": ["a1", "b2"],
    }  # fmt: skip
    assert "words" not in operators.audit.path.read_text()
    assert verify(operators.audit.path).problem is None


def test_what_cannot_be_put_on_record_is_not_answered(client, operators, desk, monkeypatch):
    def full(event, told, durable=False):
        raise AuditError("the disk is full")

    monkeypatch.setattr(operators.audit, "append", full)
    answer = client.post(CHAT, json={})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert desk.turns[0].ends == []


def test_refusals_are_told_one_by_one_up_to_a_number_and_then_counted(tmp_path, desk, log):
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    made = Operators(Keys(tmp_path / "keys"), AuditLog(tmp_path / "audit"), RequestLog(log), clock)
    made.keys.create("acme", ["infer"])
    with app_of(made, desk) as client:
        for _ in range(75):
            client.post(CHAT, json={})
        clock.now = 61.0
        client.post(CHAT, json={})
    made.close()
    told = lines(made)
    assert len(told) == 62
    assert told[0]["route"] == CHAT
    assert told[0]["status"] == 401
    assert told[60]["left out"] == 15
    assert verify(made.audit.path).problem is None


def test_tokens_that_were_used_count_against_the_next_request(client, operators):
    _, secret = operators.keys.create("acme", ["infer"], tokens_per_minute=30)
    statuses = [client.post(CHAT, json={}, headers=bearer(secret)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]  # 27 tokens each: the second is let in with 3 left


def test_a_sessions_token_reaches_the_desk_as_that_session_alone(operators, desk):
    key, _ = operators.keys.create("acme", ["write"])
    opened = {"token": Opened("acme", "mine", key.id)}
    with app_of(operators, desk, opened) as client:
        assert client.post(CHAT, json={}, headers=bearer("token")).status_code == 200
        assert client.post(CHAT, json={"session": "mine"}, headers=bearer("token")).status_code == 200
        assert client.post(CHAT, json={"session": "other"}, headers=bearer("token")).status_code == 404
        assert client.post(CHAT, json={"session": None}, headers=bearer("token")).status_code == 200
    assert desk.asked == [Who(tenant="acme", key=key.id, session="mine")] * 3


def test_only_a_key_that_shares_gives_a_tenants_episodes_to_the_pool(operators, desk):
    seen = []

    class Asking(Desk):
        async def admit(self, who, ask):
            seen.append(operators.shares(who))
            return await super().admit(who, ask)

    _, keeps = operators.keys.create("acme", ["infer"])
    _, gives = operators.keys.create("acme", ["infer"], shares=True)
    _, mine = operators.keys.create("", ["infer"])
    with app_of(operators, Asking()) as client:
        for secret in (keeps, gives, mine):
            client.post(CHAT, json={}, headers=bearer(secret))
    assert seen == [False, True, True]
