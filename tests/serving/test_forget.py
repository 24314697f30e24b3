"""To be forgotten: nothing of an episode is recalled, stored or left in a file, and who asks reaches only their own."""

import json

import pytest
from served import scripted
from whole import play, whole

from latentmem.errors import DataError
from latentmem.serving.operators.audit import verify
from latentmem.serving.rights.forget import Forgetting, Wish

MARK = "zyzzyva"
"""A word that stands nowhere else."""


@pytest.fixture
def server(tmp_path):
    with whole(tmp_path, scripted("It is 19.", "It is 20.", "It is 21.")) as made:
        yield made


def everything_in(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_session_is_gone_from_the_bank_the_store_the_recalls_and_the_files(server, tmp_path):
    with server.client(server.key("acme")) as client:
        told = play(client, "first", f"What is 12 + 7 {MARK}?")["session"]
        play(client, "second", "What is 40 - 15?")
        before = play(client, "asks", "What is 12 + 8?")["answer"]["latentmem"]["sources"]
        assert told["trajectory"] in before
        assert MARK.encode() in everything_in(tmp_path)

        dry = client.post("/forget", json={"session": "first", "dry_run": True}).json()
        assert (dry["count"], dry["ids"], dry["num_sessions"], dry["is_dry_run"]) == (1, [told["trajectory"]], 1, True)
        assert told["trajectory"] in server.parts.bank

        found = client.post("/forget", json={"session": "first"}).json()
        assert (found["count"], found["ids"], found["num_sessions"]) == (1, [told["trajectory"]], 1)
        assert found["num_scrubbed"] == 2  # "second" and "asks" were told of it
        assert found["is_erased"]
        assert found["proof"] == {"problems": [], "num_searches": 1, "num_cached": 0}
        assert told["trajectory"] not in server.parts.bank
        assert client.get("/sessions/first").status_code == 404
        after = play(client, "asks again", "What is 12 + 8 now?")["answer"]["latentmem"]["sources"]
        assert told["trajectory"] not in after


def test_no_byte_of_a_forgotten_text_is_left_in_any_file(server, tmp_path):
    with server.client(server.key("acme")) as client:
        play(client, "first", f"What is 12 + 7 {MARK}?")
        play(client, "second", "What is 40 - 15?", latentmem={"memory": "none"})
        assert MARK.encode() in everything_in(tmp_path)
        assert client.post("/forget", json={"session": "first"}).json()["is_erased"]
    server.parts.store.erase()
    assert MARK.encode() not in everything_in(tmp_path)


def test_prompts_that_the_model_keeps_are_dropped_once_all_is_deleted(server):
    dropped = []

    def drop():
        dropped.append("first" in {each.id for each in server.parts.store.about(tenant="acme")})

    with server.client(server.key("acme")) as client:
        play(client, "first", f"What is 12 + 7 {MARK}?")
        forgetting = Forgetting(server.parts.bank, server.parts.store, server.operators.audit, drop_prompts=drop)
        wish = Wish(tenant="acme", session="first")
        forgetting.forget(wish, "test", dry_run=True)
        assert dropped == []
        forgetting.forget(wish, "test", dry_run=False)
        assert dropped == [False]


def test_what_others_were_told_of_it_is_named_and_goes_too_if_asked_for(server, tmp_path):
    with server.client(server.key("acme")) as client:
        told = play(client, "first", f"What is 12 + 7 {MARK}?")["session"]["trajectory"]
        learned = play(client, "second", "What is 12 + 8?")["session"]["trajectory"]
        found = client.post("/forget", json={"session": "first", "dry_run": True}).json()
        assert found["derived"] == [learned]
        found = client.post("/forget", json={"session": "first", "derived": True}).json()
        assert set(found["ids"]) == {told, learned}
        traces = client.get("/sessions/second/traces").json()["traces"]
        assert traces[0]["response"] == "It is 20."
    server.parts.store.erase()
    assert MARK.encode() not in everything_in(tmp_path)


def test_an_episode_that_a_tenant_shared_is_forgotten_by_that_tenant(server):
    with server.client(server.key("acme", shares=True)) as client:
        shared = play(client, "mine", "What is 12 + 7?")["session"]["trajectory"]
        (stored,) = server.parts.bank.get([shared])
        assert stored.origin.tenant == ""
    with server.client(server.key("zeta")) as other:
        assert play(other, "theirs", "What is 12 + 8?")["answer"]["latentmem"]["sources"] == [shared]
        assert other.post("/forget", json={"session": "mine"}).json()["count"] == 0
        assert other.post("/forget", json={"everything": True}).json()["count"] == 1  # its own episode
    with server.client(server.key("acme")) as client:
        assert client.post("/forget", json={"session": "mine"}).json()["ids"] == [shared]
    assert shared not in server.parts.bank


def test_filters_hold_together(server):
    with server.client(server.key("")) as client:
        kept = {
            (domain, task, reward): play(
                client, f"{domain}-{task}-{reward}", f"What is {task}?", reward=reward,
                latentmem={"domain": domain, "task": task},
            )["session"]["trajectory"]
            for domain in ("sums", "words") for task in ("a", "b") for reward in (0.0, 1.0)
        }  # fmt: skip

        def ids(**wish):
            return set(client.post("/forget", json={**wish, "dry_run": True}).json()["ids"])

        assert ids(domain="sums") == {id for (domain, _, _), id in kept.items() if domain == "sums"}
        assert ids(domain="sums", task_id="b", success=True) == {kept["sums", "b", 1.0]}
        assert ids(success=False) == {id for (_, _, reward), id in kept.items() if reward == 0}
        assert ids(before="2020-01-01T00:00:00Z") == set()
        assert ids(before="2999-01-01T00:00:00Z") == set(kept.values())
        assert ids(everything=True) == set(kept.values())
        refused = client.post("/forget", json={})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "everything")
        assert '"everything": true' in refused.json()["error"]["message"]


def test_no_tenant_forgets_what_is_anothers(server):
    with server.client(server.key("acme")) as client:
        mine = play(client, "same-name", "What is 12 + 7?")["session"]["trajectory"]
    with server.client(server.key("zeta")) as other:
        play(other, "same-name", "What is 12 + 7?")
        assert other.post("/forget", json={"tenant": "acme", "everything": True}).status_code == 404
        assert other.post("/forget", json={"tenant": "", "everything": True}).status_code == 404
        assert mine not in other.post("/forget", json={"session": "same-name", "derived": True}).json()["ids"]
    assert mine in server.parts.bank
    with server.client(server.key("")) as operator:
        assert operator.post("/forget", json={"tenant": "acme", "everything": True}).json()["ids"] == [mine]
    for scopes in (("infer", "read", "write"), ("read",)):
        with server.client(server.key("acme", *scopes)) as client:
            assert client.post("/forget", json={"everything": True}).status_code == 403


def test_the_operators_wish_without_a_tenant_names_those_that_it_reaches(server):
    for tenant, more in (("acme", {"shares": True}), ("zeta", {})):
        with server.client(server.key(tenant, **more)) as client:
            play(client, "monday", "What is 12 + 7?")
            play(client, f"of {tenant}", "What is 12 + 7?")
    touched = [{"tenant": tenant, "count": 1, "num_sessions": 1} for tenant in ("acme", "zeta")]
    with server.client(server.key("")) as operator:
        for dry_run in (True, False):
            assert operator.post("/forget", json={"session": "monday", "dry_run": dry_run}).json()["tenants"] == touched
    line = json.loads(server.operators.audit.path.read_text().splitlines()[-1])
    assert (line["event"], line["tenants"]) == ("forgotten", touched)
    with server.client(server.key("zeta")) as client:
        found = client.post("/forget", json={"everything": True}).json()
        assert found["tenants"] == [{"tenant": "zeta", "count": 1, "num_sessions": 1}]


def test_sessions_are_forgotten_by_the_success_of_their_roles_too(server):
    with server.client(server.key("acme")) as client:
        for session, rewards in (("good", {"agent": 1, "agnt": 0}), ("bad", {"agent": 0.5})):
            body = {"model": "scripted", "messages": [{"role": "user", "content": "What is 12 + 7?"}]}
            client.post(f"/sessions/{session}/agents/agent/v1/chat/completions", json=body)
            client.post(f"/sessions/{session}/complete", json={"rewards": rewards})
        found = client.post("/forget", json={"success": True}).json()
        assert (found["count"], found["num_sessions"]) == (1, 1)
        assert [each["id"] for each in client.get("/sessions").json()["sessions"]] == ["bad"]


def test_the_audit_has_an_intention_and_a_receipt_and_no_text(server):
    with server.client(server.key("acme")) as client:
        play(client, "first", f"What is 12 + 7 {MARK}?")
        found = client.post("/forget", json={"session": "first"}).json()
    lines = [json.loads(line) for line in server.operators.audit.path.read_text().splitlines()]
    intention, receipt = [line for line in lines if line["event"].startswith("forg")]
    assert (intention["event"], receipt["event"], receipt["hash"]) == ("forgetting", "forgotten", found["audit"])
    assert receipt["ids"] == found["ids"]
    assert receipt["wish"] == {"tenant": "acme", "session": "first", "everything": False, "derived": False}
    assert (receipt["by"] != "", receipt["left"], receipt["digest"]) == (True, [], found["digest_after"])
    assert MARK not in server.operators.audit.path.read_text()
    assert verify(server.operators.audit.path).problem is None


def test_what_was_interrupted_is_finished_by_the_same_wish(server, monkeypatch):
    forgetting = server.rights.forgetting
    with server.client(server.key("acme", shares=True)) as client:
        shared = play(client, "first", "What is 12 + 7?")["session"]["trajectory"]

        def killed(sessions):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(server.parts.store, "forget", killed)
            with pytest.raises(KeyboardInterrupt):
                forgetting.forget(Wish(tenant="acme", session="first"), "command", dry_run=False)
        assert shared not in server.parts.bank
        assert client.get("/sessions/first").status_code == 200
        found = forgetting.forget(Wish(tenant="acme", session="first"), "command", dry_run=False)
        assert (found.count, found.num_sessions) == (0, 1)
        assert found.proof.holds
        assert client.get("/sessions/first").status_code == 404


def test_what_is_left_is_told(server, monkeypatch):
    """The proof can fail: here the bank keeps what it was asked to delete."""
    with server.client(server.key("acme")) as client:
        kept = play(client, "first", "What is 12 + 7?")["session"]["trajectory"]
    bank = server.rights.forgetting._bank
    deleted = bank.delete
    monkeypatch.setattr(bank, "delete", lambda **asked: deleted(**{**asked, "dry_run": True}))
    found = server.rights.forgetting.forget(Wish(tenant="acme", session="first"), "command", dry_run=False)
    assert not found.proof.holds
    assert any(f"a search finds {kept}" in problem for problem in found.proof.problems)


def test_a_wish_for_nothing_is_refused(server):
    with pytest.raises(DataError, match="no filter is given; name one, or say that everything is meant"):
        server.rights.forgetting.forget(Wish(tenant="acme"), "command", dry_run=True)


def test_scores_and_replays_of_a_forgotten_memory_show_nothing_of_it(server):
    with server.client(server.key("acme")) as client:
        play(client, "first", f"What is 12 + 7 {MARK}?")
        call = play(client, "second", "What is 12 + 8?")["answer"]["id"]
        replayed = client.post("/sessions/second/replay").json()
        assert ([each["call"] for each in replayed["calls"]], replayed["warnings"]) == ([call], [])
        (trace,) = client.get("/sessions/second/traces").json()["traces"]
        assert MARK in trace["memory_text"]
        assert trace["memory_text"].startswith("[Records ")
        client.post("/forget", json={"session": "first"})
        told = client.get(f"/sessions/second/calls/{call}/why").json()
        assert told["sources"][0]["task"] is None
        assert MARK not in json.dumps(told)
        (trace,) = client.get("/sessions/second/traces").json()["traces"]
        assert (trace["memory"], trace["memory_text"]) == ("text", "")
        replayed = client.post("/sessions/second/replay").json()
        assert replayed["calls"] == []
        assert replayed["warnings"] == ["the memory of 1 call was forgotten; nothing to replay"]
