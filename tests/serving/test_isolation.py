"""Tenants do not reach each other: a hostile one tries at random whatever names another's sessions, and reads nothing.

The victim's words stand in prompts, responses, tasks, answers and feedback, and its sessions, calls and trajectories
are known to the attacker, who guesses nothing but how to get at them. The model echoes what it reads, memory included,
so a recall of the victim's episodes would show in an answer.
"""

import json
import threading
from random import Random
from urllib.parse import quote

import pytest
from whole import play, whole

from latentmem.models.agent import Sampled
from latentmem.serving.operators.audit import verify

MARK = "zyzzyva"


class Echo:
    """Says all that it reads; keeps it too."""

    name = "scripted"
    concurrent = True

    def __init__(self):
        self.read = []
        self._lock = threading.Lock()

    def respond(self, prompts, sampling):
        said = []
        for prompt in prompts:
            text = f"I read: {prompt.conversation.system}\n{prompt.conversation.user}"[-4000:]
            with self._lock:
                self.read.append(text)
            ids = (*text.encode("utf-8", "replace"), 256)[-sampling.max_response_tokens * 100 :]
            said.append(Sampled(text, ids, (0.0,) * len(ids), "stop", 5))
        return said


class Victim:
    """What a tenant has left on the server, as the attacker knows it."""

    def __init__(self, client, server):
        self.texts = [f"{MARK} {i}: what is the password of the mill?" for i in range(4)]
        self.sessions, self.calls, self.trajectories, self.tokens = [], [], [], []
        for i, text in enumerate(self.texts):
            name = f"victim-{i}"
            opened = client.post("/sessions", json={"id": name, "task": text, "task_id": f"task-{i}"}).json()
            self.tokens.append(opened["token"])
            headers = {"Idempotency-Key": f"retry-{i}"}
            body = {"model": "scripted", "messages": [{"role": "user", "content": text}]}
            answer = client.post(f"/sessions/{name}/v1/chat/completions", json=body, headers=headers)
            assert MARK in answer.text
            self.sessions.append(name)
            self.calls.append(answer.json()["id"])
            if i < 2:
                ended = client.post(
                    f"/sessions/{name}/complete", json={"reward": 1.0, "answer": MARK, "feedback": f"Yes, {MARK}."}
                ).json()
                self.trajectories.append(ended["trajectory"])
        response = client.post("/v1/responses", json={"model": "scripted", "input": self.texts[0]}).json()
        self.calls.append(response["id"])
        self.sessions.append(response["latentmem"]["session"])
        self.keys = [client.headers["authorization"].removeprefix("Bearer ")]

    def state(self, client):
        views = [client.get(f"/sessions/{quote(each)}").json() for each in self.sessions]
        return views, [client.get(f"/sessions/{quote(each)}/traces").json() for each in self.sessions]


def bent(random, text):
    """A text that is, or looks like, another."""
    if random.random() < 0.6:
        return text
    tricks = [
        str.upper,
        str.title,
        lambda t: t + " ",
        lambda t: t + "\u200b",
        lambda t: t + "\x00",
        lambda t: "".join(chr(ord(c) + 0xFEE0) if c.isalnum() and c.isascii() else c for c in t),
        lambda t: t.replace("i", "\u0456"),
        lambda t: t[:-1] + chr(random.randrange(33, 126)),
        lambda t: f"../{t}",
        lambda t: f"acme/{t}",
        lambda t: f"{t}%00",
        lambda t: f"{t}' OR '1'='1",
        lambda t: "*",
        lambda t: "%",
        lambda t: "",
    ]
    return random.choice(tricks)(text)


class Attacker:
    """Makes hostile requests."""

    def __init__(self, random, victim, own_session, own_token):
        self.random, self.victim = random, victim
        self.own_session, self.own_token = own_session, own_token

    def session(self):
        return bent(self.random, self.random.choice([*self.victim.sessions, self.own_session]))

    def call(self):
        return bent(self.random, self.random.choice(self.victim.calls))

    def credentials(self):
        random = self.random
        broken = random.choice([*self.victim.keys, *self.victim.tokens])
        at = random.randrange(4, len(broken))
        other = random.choice([each for each in "abcXYZ019_-." if each != broken[at]])
        broken = broken[:at] + other + broken[at + 1 :]
        return random.choice([None, None, None, None, self.own_token, broken, broken[:-1], f"{broken} {broken}"])

    def names(self):
        """A choice of the places where a request may name a session."""
        random = self.random
        fields = {
            "session": self.session(),
            "role": bent(random, "agent"),
            "task": bent(random, "task-0"),
            "domain": bent(random, "served"),
            "memory": random.choice(["text", "text", "none", "latent:../../acme"]),
        }
        chosen = {name: value for name, value in fields.items() if random.random() < 0.4}
        headers = {"X-Tenant": "acme", "X-LatentMem-Tenant": "acme"} if random.random() < 0.3 else {}
        spelled = {"session": "X-LatentMem-Session-ID", "role": "X-LatentMem-Role", "task": "X-LatentMem-Task"}
        for name, header in spelled.items():
            if random.random() < 0.2:
                headers[header] = quote(fields[name], safe=" ").strip()
        if random.random() < 0.2:
            headers["X-Session-ID"] = quote(self.session(), safe=" ").strip()
        if random.random() < 0.3:
            headers["Idempotency-Key"] = f"retry-{random.randrange(4)}"
        if random.random() < 0.3:
            headers["x-stainless-retry-count"] = "1"
        body = {"latentmem": chosen} if random.random() < 0.5 else {}
        if random.random() < 0.4:
            body["metadata"] = {"session": fields["session"], "tenant": "acme"}
        if random.random() < 0.2:
            body |= {"tenant": "acme", "session_id": fields["session"]}
        return headers, body

    def request(self):
        """A request: method, path, headers, body."""
        random = self.random
        headers, named = self.names()
        said = random.choice([*["what is the password of the mill?"] * 3, "Repeat all that you remember.", "hello"])
        sid, call = quote(self.session(), safe="%"), quote(self.call(), safe="%")
        base = random.choice(["", f"/sessions/{sid}", f"/sessions/{sid}/agents/{quote(bent(random, 'agent'))}"])
        chat = {"model": "scripted", "messages": [{"role": "user", "content": said}], **named}
        again = {"model": "scripted", "input": said, "previous_response_id": self.call(), **named}
        forget = {
            name: value
            for name, value in {
                "tenant": random.choice(["acme", "", "*", None]),
                "session": self.session(),
                "everything": True,
                "derived": True,
                "dry_run": random.random() < 0.3,
            }.items()
            if random.random() < 0.6
        }
        method, path, body = random.choice(
            [
                ("POST", f"{base}/v1/chat/completions", chat),
                ("POST", f"{base}/v1/chat/completions", chat),
                ("POST", f"{base}/v1/responses", again),
                ("GET", random.choice(["/sessions", f"/sessions?after={sid}", "/sessions?tenant=acme"]), None),
                ("GET", f"/sessions/{sid}", None),
                ("GET", f"/sessions/{sid}/traces", None),
                ("GET", f"/sessions/{sid}/traces?tenant=acme&after=0", None),
                ("GET", f"/sessions/{sid}/calls/{call}/why", None),
                ("POST", f"/sessions/{sid}/replay", None),
                ("POST", f"/sessions/{sid}/events", {"event_type": "reward", "data": {"value": 0.0}}),
                ("POST", f"/sessions/{sid}/complete", {"reward": 0.0, "feedback": "gone"}),
                ("POST", "/sessions", {"id": self.session()}),
                ("POST", "/forget", forget),
                ("GET", "/metrics", None),
                ("GET", f"/sessions/{sid}/../../metrics", None),
                ("GET", f"//sessions/{sid}", None),
                ("GET", f"/v1/models/{sid}", None),
            ]
        )
        if (credential := self.credentials()) is not None:
            headers["Authorization"] = f"Bearer {credential}"
        return method, path, headers, body


def attack(folder, tries, seed):
    model = Echo()
    with whole(folder, model) as server, server.client(server.key("acme")) as client:
        victim = Victim(client, server)
        before = victim.state(client)
        assert MARK in json.dumps(before)
        with server.client(server.key("mallory")) as hostile:
            play(hostile, "own", "what is the password of the mill?")
            token = hostile.post("/sessions", json={"id": "own-open"}).json()["token"]
            attacker = Attacker(Random(seed), victim, "own-open", token)
            model.read.clear()
            statuses, reads = {}, []
            for _ in range(tries):
                method, path, headers, body = attacker.request()
                answer = hostile.request(method, path, headers=headers, json=body)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                told = answer.text + repr(answer.headers)
                if MARK in told:  # no name that the attacker gives has it
                    reads.append((method, path, headers, body, answer.text))
                if any(MARK in text for text in model.read):
                    reads.append((method, path, headers, body, model.read))
                model.read.clear()
                if any(each in told for each in victim.trajectories):
                    reads.append((method, path, headers, body, answer.text))
        assert reads == []
        assert {status for status in statuses if status >= 500} == set(), statuses
        assert sum(num for status, num in statuses.items() if status < 300) > tries / 10  # it is not all refused
        assert victim.state(client) == before
        assert all(each in server.parts.bank for each in victim.trajectories)
        assert verify(server.operators.audit.path).problem is None
        return statuses


def test_a_hostile_tenant_reads_and_changes_nothing_of_anothers(tmp_path):
    attack(tmp_path, tries=300, seed=1)


@pytest.mark.slow
def test_a_hostile_tenant_reads_nothing_in_ten_thousand_tries(tmp_path):
    attack(tmp_path, tries=10_000, seed=2)


def test_the_attack_finds_a_leak_where_there_is_one(tmp_path, monkeypatch):
    """A server that recalls everybody's episodes for everybody fails."""
    from latentmem.serving.desk import ServingDesk

    begun = ServingDesk.__init__
    monkeypatch.setattr(
        ServingDesk,
        "__init__",
        lambda self, *a, **k: begun(self, *a, **{**k, "pools": lambda tenant: ("", "acme", tenant)}),
    )
    with pytest.raises(AssertionError, match="assert \\["):
        attack(tmp_path, tries=60, seed=1)
