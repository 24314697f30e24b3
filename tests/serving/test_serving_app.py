"""A server over a scripted model: sessions, rewards, lineage, retries and what is stored, by the official client."""

import http.client
import json
import sqlite3
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import pytest
from openai import OpenAI
from served import Script, client, on_a_port, parts_of, scripted

from latentmem.errors import BankError, WindowError
from latentmem.memory.memory import Recall
from latentmem.serving.identity import KnownRole
from latentmem.serving.recalling import Remembered
from latentmem.serving.sessions.session import UNJUDGED, Ending
from latentmem.serving.sessions.store import SessionStore
from latentmem.serving.sessions.writer import StoreFailed
from latentmem.trajectory import Recalled, Role


@pytest.fixture
def parts(tmp_path):
    with parts_of(tmp_path, scripted("four", "five", "six")) as made:
        yield made


@pytest.fixture
def address(parts):
    with on_a_port(parts.app()) as found:
        yield found


def told(*messages, system="You solve tasks."):
    """A chat after its system message, in which user and assistant speak in turn."""
    roles = ("user", "assistant")
    return [
        {"role": "system", "content": system},
        *({"role": roles[i % 2], "content": text} for i, text in enumerate(messages)),
    ]


def ask(address, *messages, session=None, system="You solve tasks.", headers=None, **more):
    """Ask for a response, without retries of the client's own; returns what the client returns."""
    base = f"{address}/v1" if session is None else f"{address}/sessions/{session}/v1"
    with OpenAI(base_url=base, api_key="none", max_retries=0, default_headers=headers) as made:
        return made.chat.completions.create(model="scripted", messages=told(*messages, system=system), **more)


def session_of(answer):
    return answer.latentmem["session"]


def complete(address, session, **ending):
    with client(address) as http:
        answer = http.post(f"/sessions/{session}/complete", json=ending)
    assert answer.status_code == 200, answer.text
    return answer.json()


def view(address, session):
    with client(address) as http:
        return http.get(f"/sessions/{session}").json()


def test_an_episode_from_its_opening_to_the_bank(parts, address):
    with client(address) as http:
        opened = http.post("/sessions", json={"task": "2 + 2?", "task_id": "sum-1", "domain": "sums"}).json()
        assert opened["state"] == "queuing"
        with OpenAI(base_url=opened["base_url"], api_key=opened["token"]) as made:
            first = made.chat.completions.create(
                model="scripted",
                messages=told("2 + 2?", system="Add."),
                extra_headers={"X-LatentMem-Role": "adder"},
            )
        assert first.choices[0].message.content == "four"
        assert view(address, opened["id"])["state"] == "running"
        events = f"/sessions/{opened['id']}/events"
        http.post(events, json={"event_type": "reward", "data": {"value": 0.0}})
        http.post(events, json={"event_type": "reward", "data": {"value": 1.0}})
        for_one = {"event_type": "reward", "data": {"value": 0.5, "agent": "adder"}, "id": "once"}
        assert http.post(events, json=for_one).json() == {"number": 3, "warnings": []}
        assert http.post(events, json=for_one).json() == {"number": 3, "warnings": []}
    ended = complete(address, opened["id"], answer="4", feedback="right")
    assert (ended["state"], ended["reward"], ended["rewards"]) == ("succeeded", 1.0, {"adder": 0.5})
    assert ended["warnings"] == []
    assert complete(address, opened["id"], reward=0) == ended
    (stored,) = parts.bank
    assert stored.id == ended["trajectory"]
    assert (stored.task.id, stored.task.domain, stored.task.text) == ("sum-1", "sums", "2 + 2?")
    assert (stored.reward, stored.success, stored.rewards) == (1.0, True, {"adder": 0.5})
    assert (stored.origin.tenant, stored.origin.session, stored.origin.is_judged) == ("", opened["id"], True)
    assert (stored.steps[0].action, stored.steps[0].observation) == ("4", "right")
    (message,) = stored.messages
    assert (message.role, message.system, message.user, message.response) == ("adder", "Add.", "2 + 2?", "four")
    assert message.token_ids == (*b"four", 256)
    assert message.served.call == first.id


def test_a_sessions_own_token_makes_a_plain_url_its_own(parts, address):
    with client(address) as http:
        opened = http.post("/sessions", json={}).json()
    with OpenAI(base_url=f"{address}/v1", api_key=opened["token"]) as made:
        answer = made.chat.completions.create(model="scripted", messages=told("2 + 2?"))
        assert session_of(answer) == opened["id"]
        made.default_headers  # noqa: B018 - the client is the same, the header names another session
        with pytest.raises(openai.PermissionDeniedError):
            made.chat.completions.create(
                model="scripted", messages=told("x"), extra_headers={"X-LatentMem-Session-ID": "another"}
            )
    forged = opened["token"][:-2] + ("AA" if opened["token"][-2:] != "AA" else "BB")
    with OpenAI(base_url=f"{address}/v1", api_key=forged) as made:
        answer = made.chat.completions.create(model="scripted", messages=told("2 + 2?"))
        assert session_of(answer) != opened["id"]


def test_an_answer_tells_whether_its_role_is_known_and_what_was_probably_meant(tmp_path):
    roles = [KnownRole(Role(name="scout", profile="Finds the place.")), KnownRole(Role(name="guide", profile="Leads."))]
    line = "role 'scuot' is not in the configuration and is taken for a new one; did you mean 'scout'?"
    body = {"model": "m", "messages": told("x"), "latentmem": {"session": "s"}}
    with parts_of(tmp_path, scripted("four"), roles=roles) as parts, on_a_port(parts.app()) as address:
        with client(address) as http:

            def ask(role, **more):
                path = "responses" if "input" in more else "chat/completions"
                chosen = body | more if "input" not in more else {"model": "m", **more}
                return http.post(f"/agents/{role}/v1/{path}", json=chosen, headers={"Idempotency-Key": f"{role}{more}"})

            right, new, wrong, again = ask("scout"), ask("judge"), ask("scuot"), ask("scuot")
            response, stream = ask("scuot", input="x"), ask("scuot", stream=True)
        own = [answer.json()["latentmem"] for answer in (right, new, wrong, again, response)]
        assert [each["role"] for each in own] == ["scout", "judge", "scuot", "scuot", "scuot"]
        assert [each["role_is_known"] for each in own] == [True, False, False, False, False]
        assert [each["warnings"] for each in own] == [[], [], [line], [line], [line]]
        assert again.json() == wrong.json()
        heads = [answer.headers.get("x-latentmem-warning") for answer in (right, new, wrong, again, response, stream)]
        assert heads == [None, None, line, line, line, line]
        assert json.dumps(line)[1:-1] in stream.text
        (trace, *_) = [call.answer.choices[0].message for call in parts.store.calls(parts.store.get("", "s"))][2:]
        assert (trace.role, trace.served is not None) == ("scuot", True)


def test_a_server_without_roles_of_its_own_calls_none_unknown(address):
    own = ask(address, "x", headers={"X-LatentMem-Role": "scuot"}).latentmem
    assert (own["role"], own["role_is_known"], own["warnings"]) == ("scuot", None, [])


def test_a_program_without_sessions_has_one_for_each_conversation(parts, address):
    first = ask(address, "2 + 2?")
    onward = ask(address, "2 + 2?", "four", "and 1 more?")
    other = ask(address, "2 + 2?")
    assert session_of(first) == session_of(onward) != session_of(other)
    complete(address, session_of(first), reward=1)
    assert session_of(ask(address, "2 + 2?", "four", "and 1 more?")) != session_of(first)  # which has ended


def test_conversations_of_one_session_never_mix(parts, address):
    ask(address, "plan it", session="s", system="You plan.")
    ask(address, "do it", session="s", system="You work.")
    ask(address, "plan it", "four", "go on", session="s", system="You plan.")
    ask(address, "a summary: it was planned", session="s", system="You plan.")
    with client(address) as http:
        traces = http.get("/sessions/s/traces").json()["traces"]
    lineages = [trace["lineage"] for trace in traces]
    assert lineages[0] == lineages[2]
    assert len(set(lineages)) == 3
    assert [trace["completion_ids"] for trace in traces[:1]] == [[*b"four", 256]]
    assert [len(trace["messages"]) for trace in traces] == [2, 2, 4, 2]


def test_traces_come_in_pages(parts, address):
    for number in range(5):
        ask(address, f"task {number}", session="s")
    with client(address) as http:
        first = http.get("/sessions/s/traces", params={"limit": 3}).json()
        rest = http.get("/sessions/s/traces", params={"limit": 3, "after": first["next"]}).json()
    said = [trace["messages"][1]["content"] for trace in first["traces"] + rest["traces"]]
    assert said == [f"task {number}" for number in range(5)]
    assert (first["next"], rest["next"]) == (3, None)


def test_the_same_seed_is_kept_and_told(parts, address):
    ask(address, "x", session="s", seed=7)
    ask(address, "y", session="s")
    with client(address) as http:
        seeds = [trace["seed"] for trace in http.get("/sessions/s/traces").json()["traces"]]
    assert seeds[0] == 7
    assert seeds[1] not in (0, 7)
    one, other = (prompt.seed for prompt in parts.model.prompts)
    assert one != other


# Sent again


def test_a_request_that_is_sent_again_has_the_same_answer_also_after_a_restart(tmp_path):
    again = {"Idempotency-Key": "k1"}
    with parts_of(tmp_path, scripted("four", "five")) as parts, on_a_port(parts.app()) as address:
        first = ask(address, "2 + 2?", session="s", headers=again)
        assert ask(address, "2 + 2?", session="s", headers=again) == first
        assert len(parts.model.prompts) == 1
        unnamed = ask(address, "2 + 3?", headers=again)
        assert session_of(unnamed) != "s"  # a key names a request within its session
        assert ask(address, "2 + 3?", headers=again) == unnamed
    with parts_of(tmp_path, scripted("five")) as parts, on_a_port(parts.app()) as address:
        assert ask(address, "2 + 2?", session="s", headers=again) == first
        assert not parts.model.prompts
        assert ask(address, "2 + 2?", "four", "and then?", session="s").choices[0].message.content == "five"
        assert complete(address, "s", reward=1)["calls"] == {"answered": 2, "lost": 0, "running": 0}
        (stored,) = parts.bank
        assert [message.response for message in stored.messages] == ["four", "five"]


class Slow(Script):
    """A model that answers when it is let; with `until_left`, its first client has to go away before that."""

    until_left = False

    def __init__(self, responses):
        super().__init__({"solver": responses})
        self.asked, self.let = threading.Semaphore(0), threading.Semaphore(0)
        self.has_left = threading.Event()

    def respond(self, prompts, sampling):
        self.asked.release()
        if self.until_left:
            while prompts[0].on_tokens(()):  # asks whether somebody still waits
                time.sleep(0.01)
            self.until_left = False
            self.has_left.set()
        assert self.let.acquire(timeout=30)
        return super().respond(prompts, sampling)


def test_a_request_that_is_sent_twice_at_once_is_one_call(tmp_path):
    model = Slow(["four", "five"])
    with parts_of(tmp_path, model) as parts, on_a_port(parts.app()) as address, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(ask, address, "2 + 2?", session="s", headers={"Idempotency-Key": "k"}) for _ in range(2)]
        assert model.asked.acquire(timeout=30)
        model.let.release()
        first, second = (each.result(30) for each in both)
        assert first == second
        assert len(model.prompts) == 1
        assert view(address, "s")["calls"] == {"answered": 1, "lost": 0, "running": 0}


# Lost calls


class Failing(Script):
    """A model that fails at its first response."""

    has_failed = False

    def respond(self, prompts, sampling):
        if not self.has_failed:
            self.has_failed = True
            raise BankError("it broke")
        return super().respond(prompts, sampling)


def test_a_lost_call_masks_its_session_unless_it_is_sent_again(tmp_path):
    for session, key in (("masked", None), ("healed", "k")):
        folder = tmp_path / session
        folder.mkdir()
        headers = {} if key is None else {"Idempotency-Key": key}
        with parts_of(folder, Failing({"solver": ["four"]})) as parts, on_a_port(parts.app()) as address:
            with pytest.raises(openai.APIStatusError):
                ask(address, "2 + 2?", session=session, headers=headers)
            assert view(address, session)["calls"]["lost"] == 1
            ask(address, "2 + 2?", session=session, headers=headers)
            ended = complete(address, session, reward=1)
            (stored,) = parts.bank
        if session == "masked":
            assert (ended["state"], ended["outcome"]) == (
                "failed",
                "stored as unjudged: 1 of 2 calls were lost or cut",
            )
            assert (stored.reward, stored.error) == (0, "1 of 2 calls were lost or cut")
            assert (stored.origin.is_judged, stored.origin.tenant) == (False, UNJUDGED)
        else:
            assert (ended["state"], ended["calls"]) == ("succeeded", {"answered": 1, "lost": 0, "running": 0})
            assert (stored.reward, stored.error, stored.origin.is_judged) == (1, None, True)


class Narrow(Script):
    """A model that reads short chats only."""

    def respond(self, prompts, sampling):
        if len(prompts[0].conversation.messages) > 2:
            raise WindowError("the prompt is too long")
        return super().respond(prompts, sampling)


def test_a_call_that_is_refused_masks_nothing_since_its_program_knows(tmp_path):
    with parts_of(tmp_path, Narrow({"solver": ["four"]})) as parts, on_a_port(parts.app()) as address:
        ask(address, "2 + 2?", session="s")
        with pytest.raises(openai.BadRequestError) as refused:
            ask(address, "2 + 2?", "four", "and 1?", session="s")
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="'latnt' is not served here"):
            ask(address, "3 + 3?", session="s", headers={"X-LatentMem-Memory": "latnt"})
        ask(address, "1 + 1?", session="s")
        ended = complete(address, "s", reward=1)
        assert (ended["state"], ended["calls"]) == ("succeeded", {"answered": 2, "lost": 0, "running": 0})
        (stored,) = parts.bank
        assert [message.served.lineage for message in stored.messages] == ["0", "1"]


def test_a_client_that_goes_away_frees_its_place_and_masks_its_session(tmp_path):
    model = Slow(["four", "five"])
    model.until_left = True
    with parts_of(tmp_path, model, parallel=1) as parts, on_a_port(parts.app()) as address:
        body = {"model": "x", "messages": [{"role": "user", "content": "2 + 2?"}]}
        place = urlsplit(address)
        leaving = http.client.HTTPConnection(place.hostname, place.port)
        leaving.request(
            "POST", "/sessions/s/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        assert model.asked.acquire(timeout=30)
        leaving.close()
        assert model.has_left.wait(30)
        model.let.release(2)
        assert ask(address, "3 + 3?", session="t").choices[0].message.content  # there is one place only
        assert view(address, "s")["calls"]["lost"] == 1
        assert parts.desk.load.taken == 0


def test_calls_that_still_run_when_their_session_ends_are_lost(tmp_path):
    model = Slow(["four", "five"])
    with parts_of(tmp_path, model) as parts, on_a_port(parts.app()) as address, ThreadPoolExecutor(1) as pool:
        model.let.release()
        ask(address, "2 + 2?", session="s")
        late = pool.submit(ask, address, "2 + 3?", session="s")
        assert model.asked.acquire(timeout=30)
        assert model.asked.acquire(timeout=30)
        assert complete(address, "s", reward=1)["state"] == "failed"
        model.let.release()
        with pytest.raises(openai.ConflictError):
            late.result(30)
        (stored,) = parts.bank
        assert [message.response for message in stored.messages] == ["four"]


# What is stored


def test_unjudged_episodes_are_stored_for_nobody_or_dropped(tmp_path):
    for choice in ("store", "drop"):
        folder = tmp_path / choice
        folder.mkdir()
        with parts_of(folder, scripted("four"), unjudged=choice) as parts, on_a_port(parts.app()) as address:
            ask(address, "2 + 2?", session="s")
            ended = complete(address, "s")
            if choice == "drop":
                assert (ended["outcome"], len(parts.bank)) == ("not stored: it has no reward", 0)
            else:
                (stored,) = parts.bank
                assert (stored.origin.is_judged, stored.origin.tenant, stored.success) == (False, UNJUDGED, False)


def test_sessions_for_validation_and_sessions_without_calls_never_reach_the_bank(parts, address):
    with client(address) as http:
        http.post("/sessions", json={"id": "v", "mode": "val"})
        http.post("/sessions", json={"id": "e"})
    ask(address, "2 + 2?", session="v")
    ended = complete(address, "v", reward=1)
    assert (ended["state"], ended["outcome"]) == ("succeeded", "not stored: its mode is val")
    assert complete(address, "e", reward=1)["state"] == "failed"
    assert len(parts.bank) == 0


def test_idle_sessions_end_and_count_what_was_told(parts, address):
    for session in ("judged", "silent"):
        ask(address, "2 + 2?", session=session)
    with client(address) as http:
        http.post("/sessions/judged/events", json={"event_type": "reward", "data": {"value": 1}})
    assert parts.endings.end_idle(time.time() + 3000) == 0
    assert parts.endings.end_idle(time.time() + 4000) == 2
    assert (view(address, "judged")["state"], view(address, "silent")["state"]) == ("succeeded", "failed")
    assert sorted(trajectory.origin.is_judged for trajectory in parts.bank) == [False, True]
    with pytest.raises(openai.ConflictError):
        ask(address, "x", session="silent")


def test_a_session_in_which_something_happens_just_then_is_not_idle(parts, address):
    ask(address, "2 + 2?", session="s")
    (idle,) = parts.store.idle_since(time.time() + 1)
    ask(address, "3 + 3?", session="s")
    assert not parts.endings.complete(idle, Ending(cause="idle")).is_over
    assert parts.endings.complete(parts.store.get("", "s"), Ending(cause="idle")).is_over


def test_it_is_told_who_read_whom(tmp_path):
    with parts_of(tmp_path, scripted("it is four", "agreed")) as parts, on_a_port(parts.app()) as address:
        ask(address, "2 + 2?", session="s")
        ask(address, "They said: it is four. Do you agree?", session="s", system="You check.")
        ask(address, "2 + 2?", session="s", system="You sing.")
        complete(address, "s", reward=1)
        (stored,) = parts.bank
        assert [message.reads for message in stored.messages] == [(), (0,), ()]


def test_memory_is_in_the_prompt_and_never_in_what_is_stored(tmp_path):
    record = Recalled(kind="text", text="REMEMBERED: say four", sources=("abc",))
    seen = []

    def recall(memory, task, role, tenants):
        seen.append((memory, task.text, role.name, set(tenants)))
        return Remembered(Recall(record))

    with parts_of(tmp_path, scripted("four"), recall=recall) as parts, on_a_port(parts.app()) as address:
        answer = ask(
            address, "2 + 2?", session="s", headers={"X-LatentMem-Role": "adder", "X-LatentMem-Memory": "text"}
        )
        assert answer.latentmem["sources"] == ["abc"]
        assert seen == [("text", "2 + 2?", "adder", {""})]
        (prompt,) = parts.model.prompts
        assert prompt.conversation.messages[1]["content"] == "REMEMBERED: say four\n\n2 + 2?"
        complete(address, "s", reward=1)
        (stored,) = parts.bank
        (message,) = stored.messages
        assert "REMEMBERED" not in message.system + message.user + message.served.conversation.model_dump_json()
        assert "REMEMBERED" not in stored.task.text + stored.steps[0].action
        assert message.recalled == record
        with client(address) as http:
            (trace,) = http.get("/sessions/s/traces").json()["traces"]
        assert "REMEMBERED" not in str(trace["messages"])
        assert (trace["sources"], trace["memory"]) == (["abc"], "text")


# Refusals


def test_a_full_queue_is_429_with_a_time_to_come_again(tmp_path):
    model = Slow(["four"] * 3)
    with (
        parts_of(tmp_path, model, parallel=1, queue=1) as parts,
        on_a_port(parts.app()) as address,
        ThreadPoolExecutor(2) as pool,
    ):
        running = pool.submit(ask, address, "1", session="a")
        assert model.asked.acquire(timeout=30)
        waiting = pool.submit(ask, address, "2", session="b")
        while not parts.desk.load.waiting:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(address, "3", session="c")
        assert refused.value.response.headers["retry-after"] == "1"
        model.let.release(2)
        assert running.result(30)
        assert waiting.result(30)


def test_a_reward_for_a_role_that_said_nothing_is_told_of(address):
    ask(address, "x", session="s", headers={"X-LatentMem-Role": "adder"})
    with client(address) as http:
        event = {"event_type": "reward", "data": {"value": 0.5, "agent": "adderr"}}
        assert http.post("/sessions/s/events", json=event).status_code == 200
    ended = complete(address, "s", rewards={"adder": 1, "nobody": 0})
    assert ended["warnings"] == [
        "a reward was told for the role 'adderr', which said nothing in this session; did you mean 'adder'?",
        "a reward was told for the role 'nobody', which said nothing in this session; known: adder",
    ]
    with client(address) as http:
        http.post("/sessions", json={"id": "mute"})
    assert complete(address, "mute", rewards={"adder": 1})["warnings"] == [
        "a reward was told for the role 'adder', and no call of this session was answered"
    ]


def test_a_reward_of_a_role_that_said_nothing_is_no_part_of_the_teams(parts, address):
    ask(address, "x", session="s", headers={"X-LatentMem-Role": "writer"})
    complete(address, "s", rewards={"writer": 0.5, "chekcer": 1})
    (stored,) = parts.bank
    assert (stored.reward, stored.rewards, stored.success) == (0.5, {"writer": 0.5}, False)
    ask(address, "y", session="t", headers={"X-LatentMem-Role": "writer"})
    assert complete(address, "t", rewards={"writr": 1})["outcome"] == (
        "stored as unjudged: only roles that said nothing were rewarded"
    )


def test_a_role_may_be_rewarded_before_it_speaks_and_counts_once_it_has(parts, address):
    with client(address) as http:
        http.post("/sessions", json={"id": "s"})
        for role, value in (("writer", 1), ("critic", 0.5)):
            event = {"event_type": "reward", "data": {"value": value, "agent": role}}
            assert http.post("/sessions/s/events", json=event).json()["warnings"] == []
    for role in ("writer", "critic"):
        ask(address, "x", session="s", headers={"X-LatentMem-Role": role})
    complete(address, "s")
    (stored,) = parts.bank
    assert (stored.reward, stored.rewards) == (0.75, {"writer": 1, "critic": 0.5})


def test_the_reward_of_a_role_that_is_almost_another_is_warned_of_at_once(tmp_path):
    known = [KnownRole(Role(name="planner", profile="You plan."))]
    with parts_of(tmp_path, scripted("x"), roles=known) as parts, on_a_port(parts.app()) as address:
        ask(address, "x", session="s", headers={"X-LatentMem-Role": "writer"})
        with client(address) as http:
            for role, warnings in (
                ("writr", ["the role 'writr' has said nothing yet; did you mean 'writer'?"]),
                ("Planer", ["the role 'Planer' has said nothing yet; did you mean 'planner'?"]),
                ("planner", []),
                ("writer", []),
                ("somebody", []),
                (None, []),
            ):
                event = {"event_type": "reward", "data": {"value": 1, "agent": role}}
                assert http.post("/sessions/s/events", json=event).json()["warnings"] == warnings


def test_bad_bodies_are_one_line_and_name_their_field(address):
    ask(address, "x", session="s")
    with client(address) as http:
        for path, body, field in (
            ("/sessions", {"idd": "x"}, "idd"),
            ("/sessions", {"id": "a/b"}, "id"),
            ("/sessions", {"mode": "test"}, "mode"),
            ("/sessions/s/events", {"event_type": "reward", "data": {"value": 2}}, "data.value"),
            ("/sessions/s/events", {"event_type": "reward", "data": {"value": "1"}}, "data.value"),
            ("/sessions/s/events", {"event_type": "reward"}, "data"),
            ("/sessions/s/events", {"data": {}}, "event_type"),
            ("/sessions/s/complete", {"reward": -1}, "reward"),
            ("/sessions/s/complete", {"rewards": {"x": 1.5}}, "rewards.x"),
            ("/sessions/s/complete", {"rewards": {"a/b": 1}}, "rewards.a/b"),
        ):
            answer = http.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, field)
            assert "\n" not in error["message"]
        for event_type in ("rewards", "Reward", " reward", "rewrad"):
            answer = http.post("/sessions/s/events", json={"event_type": event_type, "data": {"value": 1}})
            assert (answer.status_code, answer.json()["error"]["message"]) == (
                400,
                f"event_type: {event_type!r} would reward nobody; did you mean 'reward'?",
            )
        for event_type in ("forward", "award", "reward_model", "note"):
            assert http.post("/sessions/s/events", json={"event_type": event_type}).status_code == 200
        for path in ("/sessions/none", "/sessions/none/traces"):
            assert http.get(path).status_code == 404
        assert http.post("/sessions/none/complete", json={}).status_code == 404


def test_what_is_wrong_with_a_body_is_told_in_the_words_of_the_rest(address):
    form, json_type = ({"Content-Type": f"application/{kind}"} for kind in ("x-www-form-urlencoded", "json"))
    event = "/sessions/s/events"
    with client(address) as http:
        http.post("/sessions", json={"id": "s"})
        for path, sent, status, said in (
            ("/sessions", {"json": {"tsk": "x"}}, 400, "tsk: there is no such field; did you mean 'task'?"),
            (
                "/sessions",
                {"json": {"sesion": "x"}},
                400,
                "sesion: there is no such field; known: domain, id, mode, task, task_id",
            ),
            (event, {"json": {"event_type": "reward", "data": {"valu": 1}}}, 400,
             "data.valu: there is no such field; did you mean 'value'?"),
            (event, {"json": {"event_type": "reward", "data": {}}}, 400, "data.value: field required"),
            (event, {"json": {"event_type": "reward", "data": {"value": 2}}}, 400,
             "data.value: input should be less than or equal to 1; found 2"),
            (event, {"json": [1]}, 400, "the body is a list; expected a JSON object"),
            (event, {}, 400, "the body is missing; expected a JSON object"),
            (event, {"content": b'{"a', "headers": json_type}, 400,
             "the body is not valid JSON (Unterminated string starting at)"),
            (event, {"content": b"{}", "headers": form}, 415,
             "the content type is 'application/x-www-form-urlencoded'; send the body as application/json"),
        ):  # fmt: skip
            answer = http.post(path, **sent)
            assert (answer.status_code, answer.json()["error"]["message"]) == (status, said)
        error = http.get("/sessions?limit=0").json()["error"]
        assert error["message"] == "limit: input should be greater than or equal to 1; found '0'"
        own = {"model": "x", "messages": told("x"), "latentmem": {"sesion": "x"}}
        error = http.post("/v1/chat/completions", json=own).json()["error"]
        assert error["message"] == "latentmem.sesion: there is no such field; did you mean 'session'?"
        assert error["param"] == "latentmem.sesion"


def test_text_that_cannot_be_written_down_is_refused_at_the_door(parts, address):
    ask(address, "x", session="s")
    json_type = {"Content-Type": "application/json"}
    with client(address) as http:
        for path, body in (
            ("/sessions", rb'{"task": "\ud800"}'),
            ("/sessions", rb'{"id": "a\u0000"}'),
            ("/sessions", b"[]"),
            ("/sessions/s/events", b""),
            ("/sessions/s/events", rb'{"event_type": "note", "data": {"x": "\ud800"}}'),
            ("/sessions/s/events", b'{"event_type": "note", "data": {"x": 1e999}}'),
            ("/sessions/s/events", b'{"event_type": "note", "data": {"x": ' + b"[" * 5000 + b"]" * 5000 + b"}}"),
            ("/sessions/s/complete", rb'{"answer": "\ud800"}'),
            ("/sessions/s/complete", rb'{"rewards": {"\ud800": 1}}'),
            ("/sessions/s/complete", b'{"reward": NaN}'),
        ):
            assert http.post(path, content=body, headers=json_type).status_code == 400, body[:60]
        odd = {"model": "x", "messages": [{"role": "user", "content": "half: \ud800"}]}
        raw = json.dumps(odd).encode()
        assert http.post("/sessions/s/v1/chat/completions", content=raw, headers=json_type).status_code in (200, 400)
        assert http.get("/sessions/s/traces", params={"after": "9" * 30}).status_code == 400
    assert complete(address, "s", reward=1, answer="NUL \0 stays")["state"] == "succeeded"
    (stored,) = parts.bank
    assert stored.steps[0].action == "NUL \0 stays"


def test_what_cannot_be_stored_is_refused_and_nothing_is_half_done(parts, address):
    with client(address) as http:
        http.post("/sessions", json={"id": "s"})
        ask(address, "2 + 2?", session="s")
        fill(parts.store)
        with pytest.raises(openai.APIStatusError) as refused:
            ask(address, "x" * 200_000, session="s", headers={"Idempotency-Key": "k"})
        assert refused.value.status_code == 507
        answer = http.post("/sessions", json={"task": "y" * 100_000})
        assert (answer.status_code, "the disk is full" in answer.text) == (507, True)
        fill(parts.store, pages=2**30)
        assert view(address, "s")["calls"] == {"answered": 1, "lost": 1, "running": 0}
        ask(address, "x" * 200_000, session="s", headers={"Idempotency-Key": "k"})
        assert view(address, "s")["calls"] == {"answered": 2, "lost": 0, "running": 0}
        assert sum(parts.store.num_by_state().values()) == 1
        assert complete(address, "s", reward=1)["state"] == "succeeded"


def test_a_request_whose_loss_could_not_be_kept_may_be_sent_again(parts, address, monkeypatch):
    with client(address) as http_client:
        http_client.post("/sessions", json={"id": "s"})
    full = [True]

    def submit(change):
        """Store how calls begin, and nothing of how they end, while the disk is full."""
        if full[0] and change.__qualname__.startswith(("SessionStore.answered", "SessionStore.lost")):
            refused = Future()
            refused.set_exception(StoreFailed(parts.store.path, sqlite3.OperationalError("disk I/O error")))
            return refused
        return submit_well(change)

    submit_well = parts.store._writer.submit
    monkeypatch.setattr(parts.store._writer, "submit", submit)
    with pytest.raises(openai.APIStatusError):
        ask(address, "2 + 2?", session="s", headers={"Idempotency-Key": "k"})
    assert view(address, "s")["calls"] == {"answered": 0, "lost": 0, "running": 1}
    with pytest.raises(openai.APIStatusError):
        ask(address, "2 + 2?", session="s", headers={"Idempotency-Key": "k"})
    full[0] = False
    ask(address, "2 + 2?", session="s", headers={"Idempotency-Key": "k"})
    assert view(address, "s")["calls"] == {"answered": 1, "lost": 0, "running": 0}


def fill(store, pages=1):
    """Let the store's file grow no further, as on a full disk; SQLite says the same."""
    store._writer.write(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())


def test_an_episode_that_the_bank_refuses_is_stored_when_it_takes_it_again(tmp_path):
    broken = [True]
    kept = []

    def keep(trajectories):
        if broken[0]:
            raise BankError("bank.sqlite: disk is full, this batch is not stored")
        kept.extend(trajectories)

    with parts_of(tmp_path, scripted("four"), keep=keep) as parts, on_a_port(parts.app()) as address:
        ask(address, "2 + 2?", session="s")
        with client(address) as http:
            assert http.post("/sessions/s/complete", json={"reward": 1}).status_code == 507
            assert view(address, "s")["state"] == "running"
            broken[0] = False
            assert http.post("/sessions/s/complete", json={"reward": 0}).json()["reward"] == 1
    assert [trajectory.reward for trajectory in kept] == [1]


def test_what_was_ended_but_not_stored_is_stored_at_the_next_start(tmp_path):
    def broken(trajectories):
        raise BankError("away")

    with parts_of(tmp_path, scripted("four"), keep=broken) as parts, on_a_port(parts.app()) as address:
        ask(address, "2 + 2?", session="s")
        with client(address) as http:
            assert http.post("/sessions/s/complete", json={"reward": 1}).status_code == 503
    with parts_of(tmp_path, scripted("four")) as parts, on_a_port(parts.app()) as address:
        assert view(address, "s")["state"] == "succeeded"
        assert [trajectory.reward for trajectory in parts.bank] == [1]


def test_calls_that_a_crash_cut_short_are_lost(tmp_path):
    model = Slow(["four"])
    with parts_of(tmp_path, model) as parts, on_a_port(parts.app()) as address, ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, address, "2 + 2?", session="s")
        assert model.asked.acquire(timeout=30)
        after = SessionStore(tmp_path / "sessions.sqlite")  # as another process after a kill would open it
        assert after.counts(after.get("", "s")).lost == 1
        after.close()
        model.let.release()
        with pytest.raises(openai.ConflictError):
            running.result(30)
