"""Two agents of each framework, as it is released, in a session of a server: what is stored, and how it ends."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from openai import APIStatusError, OpenAI
from served import client, on_a_port, parts_of
from talking import PLACE, WORDS, RoleLatents, Talker
from venvs import python_of

from latentmem.serving.desk import Remembered

pytestmark = pytest.mark.slow
PROGRAMS = Path(__file__).with_name("programs")
FACES = [
    ("autogen", "chat", "system", False),
    ("agent_framework", "chat", "header", True),
    ("agent_framework", "responses", "body", False),
    ("camel", "chat", "header", True),
    ("crewai", "chat", "body", False),
    ("langgraph", "chat", "url", True),
    ("openai_agents", "chat", "system", False),
    ("openai_agents", "responses", "header", True),
    ("smolagents", "chat", "url", False),
]


def recall(memory, task, role, tenants):
    return Remembered(RoleLatents().recall(task, role))


@pytest.mark.parametrize(("framework", "api", "told_by", "stream"), FACES)
def test_a_session_is_stored_with_its_rewards_when_it_is_completed(framework, api, told_by, stream, tmp_path):
    python, model = python_of(framework), Talker()
    with parts_of(tmp_path, model, recall=recall) as parts, on_a_port(parts.app()) as address, client(address) as http:
        shop = parts.desk.shop
        parts.desk.shop = replace(shop, voice=replace(shop.voice, tool_form=model.chat.tool_form))
        opened = http.post("/sessions", json={"task": PLACE, "task_id": "mill", "domain": "places"}).json()
        program = subprocess.run(
            [python, PROGRAMS / f"{framework}_pair.py"],
            env=os.environ
            | {
                "OPENAI_BASE_URL": opened["base_url"],
                "OPENAI_API_KEY": opened["token"],
                "LATENTMEM_TASK": f'{{"id": "mill", "text": "{PLACE}"}}',
                "TOLD_BY": told_by,
                "STREAM": str(int(stream)),
                "API": api,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert program.returncode == 0, program.stderr
        assert program.stdout.splitlines()[-1] == "corn lion"
        names = {role: next(p.role for p in model.prompts if role in p.system) for role in WORDS}

        events = f"/sessions/{opened['id']}/events"
        for told in ({"value": 1.0}, {"value": 0.25, "agent": names["porter"]}):
            http.post(events, json={"event_type": "reward", "data": told}).raise_for_status()
        ended = http.post(f"/sessions/{opened['id']}/complete", json={"answer": "corn lion"}).json()
        assert (ended["state"], ended["reward"]) == ("succeeded", 1.0)
        more = {"model": "served", "messages": [{"role": "user", "content": "More?"}]}
        late = OpenAI(base_url=opened["base_url"], api_key=opened["token"], max_retries=0)
        with late, pytest.raises(APIStatusError, match="session"):
            late.chat.completions.create(**more)

        (stored,) = parts.bank
        assert (stored.id, stored.origin.session, stored.origin.is_judged) == (ended["trajectory"], opened["id"], True)
        assert (stored.task.key, stored.task.text) == ("places:mill", PLACE)
        assert (stored.reward, stored.rewards) == (1.0, {names["porter"]: 0.25})
        if told_by != "system":
            assert names == {role: role for role in WORDS}
        assert [m.role for m in stored.messages] == [names["scout"]] * 2 + [names["porter"]]
        assert len({m.served.lineage for m in stored.messages[:2]}) == 1
        assert stored.messages[2].served.lineage != stored.messages[0].served.lineage
        for message, prompt in zip(stored.messages, model.prompts, strict=True):
            assert torch.equal(prompt.latents, torch.full((2, 3), float(len(message.role))))
            assert message.served.conversation == prompt.conversation
            assert message.token_ids == (*message.response.encode(), 256)
