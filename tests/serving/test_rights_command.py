"""`latentmem forget` and `latentmem replay`: on what a server left, while none runs."""

import json

import pytest

from latentmem import cli
from latentmem.bank import ExperienceBank
from latentmem.runs import lock
from latentmem.serving.asks import Answer, Choice
from latentmem.serving.sessions.session import Ending, State
from latentmem.serving.sessions.store import Opening, Sent, SessionStore
from latentmem.trajectory import Conversation, Message, Origin, Recalled, Served, Step, Task, Trajectory

CHAT = Conversation(messages=({"role": "user", "content": "What is 12 + 7?"},))


def message(recalled):
    return Message(
        role="solver", system="", user=CHAT.user, response="then", token_ids=(5,), logps=(0.0,), finish="stop",
        temperature=1.0, num_prompt_tokens=3, recalled=recalled,
        served=Served(call="call-1", conversation=CHAT, prompt_ids=(1,), lineage="0"),
    )  # fmt: skip


def episode(tenant, text):
    step = Step(messages=(message(Recalled(kind="none")),), action="19", observation="")
    return Trajectory(
        task=Task(id=None, domain="sums", text=text), team="program", model="tiny", steps=(step,), reward=1.0,
        success=True, seed=0, origin=Origin(tenant=tenant, session=f"s-{tenant}", is_judged=True),
    )  # fmt: skip


@pytest.fixture
def config(tmp_path, tiny_model_dir, fake_embed, no_embedding_model):
    run = tmp_path / "run"
    (run / "serve").mkdir(parents=True)
    with ExperienceBank(run / "bank.sqlite", fake_embed, embedder="all-minilm-l6-v2") as bank:
        bank.add([episode("acme", "What is 1 + 1?"), episode("zeta", "What is 2 + 2?")])
    store = SessionStore(run / "serve" / "sessions.sqlite")
    session = store.open(Opening(tenant="acme", id="told", domain="sums")).result()
    store.begin(Opening(tenant="acme", id="told"), Sent("call-1"), (), 1, "What is 12 + 7?").result()
    recalled = Recalled(kind="text", text="Remember: 19.", sources=("some-id",))
    answer = Answer("call-1", 0, "tiny", session.id, (Choice("then", (), "stop", message(recalled)),))
    store.answered("call-1", answer, ()).result()
    store.close()
    path = tmp_path / "mine.yaml"
    path.write_text(f"run: {run}\nmodel: {{name: {tiny_model_dir}, device: cpu}}\nserve: {{memory: text}}\n")
    return str(path)


def test_forget_counts_deletes_proves_and_writes_a_receipt(run, config, tmp_path):
    status, out, _ = run("forget", config, "--tenant", "acme", "--everything", "--dry-run")
    assert (status, out) == (0, "1 trajectories and 1 sessions would be forgotten; nothing was deleted\n")
    receipt = tmp_path / "receipt.json"
    status, out, err = run("forget", config, "--tenant", "acme", "--everything", "--receipt", str(receipt))
    assert (status, err) == (0, "")
    first, second = out.splitlines()
    assert first == "1 trajectories and 1 sessions are forgotten; 0 calls of others lost what they were told of them"
    told = json.loads(receipt.read_text())
    assert second == f"nothing of it is recalled: 1 searches for it found none; audit {told['audit']}"
    assert (told["count"], told["wish"]["tenant"], told["proof"]["problems"]) == (1, "acme", [])
    with ExperienceBank(tmp_path / "run/bank.sqlite") as bank:
        assert [t.origin.tenant for t in bank] == ["zeta"]
    store = SessionStore(tmp_path / "run/serve/sessions.sqlite")
    assert store.get("acme", "told") is None
    store.close()


def test_forget_asks_for_a_filter_a_date_and_a_server_that_is_not_running(run, config, tmp_path):
    status, _, err = run("forget", config, "--tenant", "acme")
    said = "no filter is given; name one, or say that everything is meant: "
    said += '"everything": true, or --everything of the command'
    assert (status, err) == (2, f"latentmem: forget: {said}\n")
    with pytest.raises(SystemExit):
        cli.main(["forget", config, "--before", "yesterday"])
    assert run("forget", config, "--before", "2001-01-01", "--dry-run")[1].startswith("0 trajectories and 0 sessions")
    with lock(tmp_path / "run/serve"):
        status, _, err = run("forget", config, "--everything")
    assert status == 2
    assert err.endswith("is working in this run folder; wait until it ends, or ask it: POST /forget\n")
    with lock(tmp_path / "run/serve"):
        assert run("replay", config, "told")[2].endswith("or ask it: POST /sessions/told/replay\n")


def test_forget_names_the_tenants_that_it_reaches(run, config):
    status, out, _ = run("forget", config, "--everything", "--dry-run")
    assert (status, out.splitlines()) == (
        0,
        [
            "2 trajectories and 1 sessions would be forgotten; nothing was deleted",
            "  of tenant acme: 1 trajectories and 1 sessions",
            "  of tenant zeta: 1 trajectories and 0 sessions",
        ],
    )


def test_a_session_whose_memory_was_forgotten_is_not_replayed_and_no_model_loaded(run, config, tmp_path, monkeypatch):
    store = SessionStore(tmp_path / "run/serve/sessions.sqlite")
    assert store.scrub(["some-id"]) == 1
    store.close()
    monkeypatch.setattr("latentmem.recipes.rights.voice_of", None)
    said = "the memory of 1 call was forgotten; nothing to replay\n"
    assert run("replay", config, "told", "--tenant", "acme") == (0, said, "")


def test_replay_prints_both_responses_of_each_call(run, config):
    status, out, _ = run("replay", config, "told", "--tenant", "acme", "--limit", "4")
    assert status == 0
    head, own, other, total = out.splitlines()
    assert head == "call-1  solver  text of 1 trajectories"
    assert own.split()[:2] == ["with", "memory"]
    assert other.split()[:2] == ["without", "memory"]
    assert total.startswith("1 calls had a memory; it changed ")
    status, _, err = run("replay", config, "told")
    assert status == 2
    assert "no session 'told' without a tenant; name its tenant with --tenant" in err


def test_a_session_counts_as_a_success_by_its_reward(run, config, tmp_path):
    store = SessionStore(tmp_path / "run/serve/sessions.sqlite")
    store.end(store.get("acme", "told"), Ending(cause="completed", reward=1.0)).result()
    assert store.get("acme", "told").state is State.RUNNING
    store.close()
    for answer, num in (("yes", 1), ("no", 0)):
        out = run("forget", config, "--tenant", "acme", "--success", answer, "--dry-run")[1]
        assert f"and {num} sessions would be forgotten" in out
