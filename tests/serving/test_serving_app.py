"""A server over a scripted model: sessions, rewards, lineage, retries and what is stored, by the official client."""

import pytest
from openai import OpenAI
from served import client, on_a_port, parts_of, scripted


@pytest.fixture
def parts(tmp_path):
    with parts_of(tmp_path, scripted("four", "five", "six")) as made:
        yield made


@pytest.fixture
def address(parts):
    with on_a_port(parts.app()) as found:
        yield found


def ask(address, *messages, session=None, system="You solve tasks.", **more):
    base = f"{address}/v1" if session is None else f"{address}/sessions/{session}/v1"
    told = [{"role": "system", "content": system}]
    told += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    with OpenAI(base_url=base, api_key="none", max_retries=0) as openai:
        return openai.chat.completions.create(model="scripted", messages=told, **more)


def test_an_episode_from_its_opening_to_the_bank(parts, address):
    with client(address) as http:
        opened = http.post("/sessions", json={"task": "2 + 2?", "task_id": "sum-1", "domain": "sums"}).json()
        assert opened["state"] == "queuing"
        with OpenAI(base_url=opened["base_url"], api_key=opened["token"]) as openai:
            first = openai.chat.completions.create(
                model="scripted",
                messages=[{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"}],
                extra_headers={"X-LatentMem-Role": "adder"},
            )
        assert first.choices[0].message.content == "four"
        assert http.get(f"/sessions/{opened['id']}").json()["state"] == "running"
        http.post(f"/sessions/{opened['id']}/events", json={"event_type": "reward", "data": {"value": 1.0}})
        told = {"event_type": "reward", "data": {"value": 0.5, "agent": "adder"}}
        assert http.post(f"/sessions/{opened['id']}/events", json=told).json() == {"number": 2}
        ended = http.post(f"/sessions/{opened['id']}/complete", json={"answer": "4", "feedback": "right"}).json()
        assert (ended["state"], ended["reward"], ended["rewards"]) == ("succeeded", 1.0, {"adder": 0.5})
        assert http.post(f"/sessions/{opened['id']}/complete", json={"reward": 0}).json() == ended
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
