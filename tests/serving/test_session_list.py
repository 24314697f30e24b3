"""The list of sessions: a tenant's own, the newest first, in pages; and bodies that may be left out."""

import threading

import pytest
from served import scripted
from whole import play, whole

from latentmem.serving.sessions.session import State
from latentmem.serving.sessions.store import SessionStore
from latentmem.serving.sessions.tables import Opening


@pytest.fixture
def server(tmp_path):
    with whole(tmp_path, scripted("It is 19.")) as made:
        yield made


def pages(client, **asked):
    """The ids of each page, until there is no next one."""
    found, after = [], {}
    while True:
        told = client.get("/sessions", params={**asked, **after})
        assert told.status_code == 200, told.text
        found.append([session["id"] for session in told.json()["sessions"]])
        if told.json()["next"] is None:
            return found
        after = {"after": told.json()["next"]}


def test_a_list_tells_what_each_session_tells_itself_the_newest_first(server):
    with server.client() as client:
        client.post("/sessions", json={"id": "waits", "task": "x" * 300, "task_id": "t", "domain": "sums"})
        play(client, "done", "What is 8 + 11?", reward=0.5)
        client.post("/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "Hello"}]})
        unnamed, done, waits = client.get("/sessions").json()["sessions"]
        assert (done["id"], done["state"], done["reward"]) == ("done", "succeeded", 0.5)
        assert (unnamed["state"], unnamed["task"], unnamed["calls"]["answered"]) == ("running", "Hello", 1)
        assert (waits["state"], waits["task_id"], waits["domain"]) == ("queuing", "t", "sums")
        assert (waits["reward"], waits["calls"]) == (None, {"answered": 0, "lost": 0, "running": 0})
        assert [client.get(f"/sessions/{each['id']}").json() for each in (unnamed, done)] == [unnamed, done]
        assert waits | {"task": "x" * 300} == client.get("/sessions/waits").json()
        assert waits["task"] == "x" * 200


def test_rewards_of_a_running_session_are_listed(server):
    with server.client() as client:
        client.post("/sessions", json={"id": "s"})
        for data in ({"value": 0.25}, {"value": 0.75, "agent": "solver"}):
            client.post("/sessions/s/events", json={"event_type": "reward", "data": data})
        (listed,) = client.get("/sessions").json()["sessions"]
        assert (listed["reward"], listed["rewards"]) == (0.25, {"solver": 0.75})


def test_pages_hold_each_session_once_also_when_more_are_opened_meanwhile(server):
    with server.client() as client:
        names = [f"s{i}" for i in range(7)]
        for name in names:
            client.post("/sessions", json={"id": name})
        assert pages(client, limit=3) == [["s6", "s5", "s4"], ["s3", "s2", "s1"], ["s0"]]
        assert pages(client, limit=7) == [names[::-1]]
        first = client.get("/sessions?limit=3").json()
        client.post("/sessions", json={"id": "late"})
        second = client.get("/sessions", params={"limit": 3, "after": first["next"]}).json()
        assert [session["id"] for session in second["sessions"]] == ["s3", "s2", "s1"]


def test_a_state_may_be_asked_for(server):
    with server.client() as client:
        for name in ("a", "b", "c", "d"):
            client.post("/sessions", json={"id": name})
        for name in ("a", "c", "d"):
            play(client, name, "Hello")
        assert pages(client, state="succeeded", limit=2) == [["d", "c"], ["a"]]
        assert pages(client, state="queuing") == [["b"]]
        assert pages(client, state="failed") == [[]]
        play(client, "b", "Hello")  # the cursor is in another state than is asked for
        told = client.get("/sessions", params={"state": "succeeded", "after": "b"}).json()
        assert [session["id"] for session in told["sessions"]] == ["a"]


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        ({"state": "ended"}, 400, "state"),
        ({"limit": 0}, 400, "limit"),
        ({"limit": 101}, 400, "limit"),
        ({"after": "nowhere"}, 404, "after"),
    ],
)
def test_what_cannot_be_listed_is_refused_and_named(server, asked, status, param):
    with server.client() as client:
        told = client.get("/sessions", params=asked)
    assert (told.status_code, told.json()["error"]["param"]) == (status, param)


def test_a_tenant_lists_its_own_sessions_alone(server):
    acme, other, operator = server.key("acme"), server.key("globex"), server.key("", "read", "write")
    with server.client() as client:
        for headers, name in ((acme, "mine"), (acme, "both"), (other, "theirs"), (other, "both"), (operator, "ours")):
            assert client.post("/sessions", json={"id": name}, headers=headers).status_code == 201

        def listed(headers, **asked):
            told = client.get("/sessions", headers=headers, params=asked)
            return [session["id"] for session in told.json()["sessions"]] if told.is_success else told.status_code

        assert listed(acme) == ["both", "mine"]
        assert listed(other) == ["both", "theirs"]
        assert listed(operator) == ["ours"]
        assert listed(acme, after="theirs") == 404
        assert listed(acme, after="both") == ["mine"]
        assert listed(acme, tenant="globex") == ["both", "mine"]
        assert listed({}) == 401
        assert listed(server.key("acme", "infer", "write")) == 403
        token = client.post("/sessions", json={}, headers=acme).json()["token"]
        assert listed({"Authorization": f"Bearer {token}"}) == 403


def test_a_session_that_is_forgotten_while_it_is_listed_is_left_out(server, monkeypatch):
    with server.client() as client:
        for name in ("a", "b", "c"):
            client.post("/sessions", json={"id": name})
        store = server.parts.store
        found, page = threading.Event(), store.page

        def slow(*asked):
            told = page(*asked)
            store.forget([("", "b")])
            found.set()
            return told

        monkeypatch.setattr(store, "page", slow)
        assert pages(client) == [["c", "a"]]
        assert found.is_set()


def test_the_list_of_a_tenant_is_found_by_an_index(tmp_path):
    store = SessionStore(tmp_path / "s.sqlite")
    for i in range(20):
        store.open(Opening(f"t{i % 2}", f"s{i}")).result()
    assert [session.id for session in store.page("t1", State.QUEUING, "s15", 2)] == ["s13", "s11"]
    query = "EXPLAIN QUERY PLAN SELECT id FROM sessions WHERE tenant = 't1' ORDER BY seq DESC LIMIT 2"
    with store._writer.read() as db:
        (plan,) = db.execute(query).fetchall()
    assert plan[-1] == "SEARCH sessions USING INDEX sessions_by_tenant (tenant=?)"
    store.close()


NO_BODY = [
    {},
    {"content": b"", "headers": {"Content-Type": "application/json"}},
    {"content": b"", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},  # curl -d ''
    {"json": {}},
]


@pytest.mark.parametrize("body", NO_BODY)
def test_a_body_of_which_all_is_optional_may_be_left_out(server, body):
    with server.client() as client:
        opened = client.post("/sessions", **body)
        assert (opened.status_code, opened.json()["state"]) == (201, "queuing")
        ended = client.post(f"/sessions/{opened.json()['id']}/complete", **body)
        assert (ended.status_code, ended.json()["outcome"]) == (200, "not stored: no call of it was answered")
        replayed = client.post(f"/sessions/{opened.json()['id']}/replay", **body)
        assert (replayed.status_code, replayed.json()["calls"]) == (200, [])
        assert client.post("/forget", **body).status_code == 400  # what is to go has to be said


def test_a_body_that_is_there_is_read_as_strictly_as_ever(server):
    with server.client() as client:
        for body in ({"rewrd": 1}, {"reward": "good"}, []):
            assert client.post("/sessions/s/complete", json=body).status_code == 400
    paths = server.app.openapi()["paths"]
    needed = {
        words: "required" in paths[words]["post"]["requestBody"]
        for words in ("/sessions", "/sessions/{sid}/complete", "/sessions/{sid}/events", "/forget")
    }
    assert [words for words, is_needed in needed.items() if is_needed] == ["/sessions/{sid}/events", "/forget"]
