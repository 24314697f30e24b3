"""Trajectories in JSON: lines of every version read back as they are, with their ids; and chats of any form as text."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmem.errors import DataError
from latentmem.trajectory import (
    SCHEMA_VERSION,
    Conversation,
    Message,
    Origin,
    Recalled,
    Served,
    Step,
    Task,
    Trajectory,
    told,
)

# As versions 1 and 2 wrote it; only the version's number differs.
OLD_LINE = (
    '{"error":null,"model":"tiny","reward":0.25,"schema_version":%d,"seed":3,"steps":[{"action":"two","info":'
    '{"extracted":"two"},"messages":[{"finish":"stop","logps":[-0.25,-1e-07],"num_prompt_tokens":9,"reads":[],'
    '"recalled":{"kind":"latent","num_latents":2,"sources":["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"],"text":"past"},'
    '"response":"two","role":"solver","system":"be brief","temperature":0.7,"token_ids":[5,2],"user":"one and one?"},'
    '{"finish":"length","logps":[],"num_prompt_tokens":3,"reads":[0],"recalled":{"kind":"none","num_latents":0,'
    '"sources":[],"text":""},"response":"yes","role":"critic","system":"","temperature":0.0,"token_ids":[],'
    '"user":"é \u2028"}],"observation":"No. It is corn."}],"success":false,"task":{"data":{"answer":[2,0.5,null]},'
    '"domain":"sums","id":"7","text":"one and one?"},"team":"pair"}'
)


@pytest.mark.parametrize(
    ("version", "id_"), [(1, "d56fd4796619432ff7a61f43b6b29da9"), (2, "f907bcbca56eac3eee98fcea2e42752d")]
)
def test_a_line_of_an_older_version_reads_back_byte_for_byte_with_its_id(version: int, id_: str) -> None:
    line = OLD_LINE % version
    read = Trajectory.from_json(line.encode())
    assert read.to_json() == line
    assert (read.id, read.schema_version) == (id_, version)
    assert (read.origin, read.rewards, read.messages[0].served) == (None, {}, None)


CHAT: tuple[dict[str, Any], ...] = (
    {"role": "system", "content": "You add."},
    {"role": "user", "content": [{"type": "text", "text": "One and "}, {"type": "text", "text": "one?"}], "name": "u"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f"}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
    {"role": "developer", "content": "Be brief."},
)
TOOLS: tuple[dict[str, Any], ...] = ({"type": "function", "function": {"name": "f", "parameters": {}}},)


def served_message(conversation: Conversation, **values: Any) -> Message:
    fields: dict[str, Any] = {
        "role": "adder",
        "system": conversation.system,
        "user": conversation.user,
        "response": "two",
        "token_ids": (5, 2),
        "logps": (-0.25, -0.5),
        "finish": "cut",
        "temperature": 1.0,
        "num_prompt_tokens": 4,
        "recalled": Recalled(kind="none"),
        "served": Served(call="call-1", conversation=conversation, prompt_ids=(1, 2, 3, 4), lineage="l1"),
    }
    return Message(**fields | values)


def episode(origin: Origin | None = None, observations: tuple[str, ...] = ("",), **values: Any) -> Trajectory:
    message = served_message(Conversation(messages=CHAT, tools=TOOLS))
    fields: dict[str, Any] = {
        "task": Task(id=None, domain="served", text="One and one?"),
        "team": "program",
        "model": "tiny",
        "steps": tuple(Step(messages=(message,), action="two", observation=text) for text in observations),
        "reward": 0.5,
        "success": False,
        "seed": 0,
        "origin": origin,
    }
    return Trajectory(**fields | values)


ACME = Origin(tenant="acme", session="s-1", is_judged=True)


def test_a_served_episode_reads_back_byte_for_byte() -> None:
    trajectory = episode(ACME, rewards={"adder": 1.0, "checker": 0.0})
    line = trajectory.to_json()
    read = Trajectory.from_json(line)
    assert read == trajectory
    assert (read.to_json(), read.id, read.schema_version) == (line, trajectory.id, SCHEMA_VERSION)
    assert read.messages[0].served == trajectory.messages[0].served
    assert (read.reward_of("adder"), read.reward_of("checker"), read.reward_of("nobody")) == (1.0, 0.0, 0.5)


def test_fields_at_their_defaults_are_not_written() -> None:
    message = json.loads(episode().to_json())["steps"][0]["messages"][0]
    assert set(message["served"]) == {
        "call", "conversation", "prompt_ids", "lineage", "weights", "composer", "latents",
    }  # fmt: skip
    plain = episode(steps=(Step(messages=(served_message(Conversation(messages=()), served=None),), action="",
                                observation=""),))  # fmt: skip
    line = json.loads(plain.to_json())
    assert {"rewards", "origin"}.isdisjoint(line)
    assert "served" not in line["steps"][0]["messages"][0]


def test_the_origin_counts_for_the_id_and_what_was_learned_of_it_later_does_not() -> None:
    origins = [
        None,
        ACME,
        Origin(tenant="bolt", session="s-1", is_judged=True),
        Origin(tenant="acme", session="s-2", is_judged=True),
        Origin(tenant="", session="s-1", is_judged=True),
        Origin(tenant="acmes", session="-1", is_judged=True),
    ]
    assert len({episode(origin).id for origin in origins}) == len(origins)
    unjudged = ACME.model_copy(update={"is_judged": False})
    assert episode(unjudged, rewards={"adder": 0.0}).id == episode(ACME).id
    # Whoever chooses names of tenants and sessions cannot make an episode pass for one with such observations.
    assert episode(ACME, ("", "")).id != episode(None, ("acme", "s-1")).id


def test_the_id_is_the_hash_that_is_documented() -> None:
    m = episode().messages[0]
    said = [[[m.role, m.system, m.user, m.response]]]
    whose = {"tenant": "acme", "session": "s-1"}
    content = json.dumps(["text:One and one?", said, ["No."], whose], ensure_ascii=False, separators=(",", ":"))
    assert episode(ACME, ("No.",)).id == hashlib.sha256(content.encode()).hexdigest()[:32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, r"trajectory schema 4 is newer than 3, .*; upgrade latentmem"),
        ({"rewards": {"adder": 1.5}}, r"rewards\.adder: Input should be less than or equal to 1"),
        ({"rewards": None}, "rewards: Input should be an object"),
        ({"origin": {"tenant": "a", "session": "s"}}, r"origin\.is_judged: Field required"),
        ({"origin": {"tenant": "a", "session": "s", "is_judged": 1}}, r"origin\.is_judged: Input should be a valid bo"),
        ({"origin": {"tenant": None, "session": "s", "is_judged": True}}, r"origin\.tenant: Input should be a valid s"),
        ({"session": "s"}, "session: Extra inputs are not permitted"),
    ],
)
def test_a_line_that_is_not_of_the_schema_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    line = json.dumps(json.loads(episode(ACME).to_json()) | change)
    with pytest.raises(DataError, match=f"^here: {message}") as error:
        Trajectory.from_json(line, "here")
    assert "\n" not in str(error.value)


# Chats as text


def test_a_chat_is_told_as_system_and_user() -> None:
    chat = Conversation(messages=CHAT)
    assert chat.system == "You add.\n\nBe brief."
    call = '{"function": {"name": "f"}, "id": "c1", "type": "function"}'
    assert chat.user == f"user: One and one?\n\nassistant: {call}\n\ntool: 2"
    assert told({"role": "assistant", "content": "I look.", "tool_calls": [{"id": "é"}]}) == 'I look.\n{"id": "é"}'


def test_the_only_user_message_is_told_as_it_is() -> None:
    chat = Conversation(messages=({"role": "system", "content": "s"}, {"role": "user", "content": "a\n\nb"}))
    assert (chat.system, chat.user) == ("s", "a\n\nb")
    assert Conversation(messages=()).user == Conversation(messages=()).system == ""
    assert Conversation(messages=({"role": "assistant", "content": "x"},)).user == "assistant: x"


def test_a_memory_stands_before_the_first_user_message_and_nothing_else_changes() -> None:
    chat = Conversation(messages=(*CHAT, {"role": "user", "content": "again"}), tools=TOOLS)
    told_ = chat.before("Once:")
    assert told_.messages[1] == {"role": "user", "content": "Once:\n\nOne and one?", "name": "u"}
    assert [m for i, m in enumerate(told_.messages) if i != 1] == [m for i, m in enumerate(chat.messages) if i != 1]
    assert told_.tools == TOOLS
    assert chat.messages[1]["content"] == CHAT[1]["content"]  # the chat itself stays
    assert chat.before("") is chat
    alone = Conversation(messages=({"role": "system", "content": "s"},)).before("Once:")
    assert alone.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "Once:"})


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
chat_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "", "odd\n"])},
    optional={
        "content": st.none()
        | texts
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}) | values),
        "name": texts,
        "tool_calls": values,
    },
)


@given(st.lists(chat_messages, max_size=4), st.lists(st.dictionaries(texts, values, max_size=2), max_size=2), texts)
def test_any_chat_is_told_and_read_back(messages: list[Any], tools: list[Any], memory: str) -> None:
    chat = Conversation(messages=tuple(messages), tools=tuple(tools))
    with_memory = chat.before(memory)
    assert with_memory.user.count(memory) >= (1 if memory else 0)
    assert with_memory.system == chat.system
    step = Step(messages=(served_message(chat),), action="", observation="")
    trajectory = episode(ACME, steps=(step,))
    line = trajectory.to_json()
    read = Trajectory.from_json(line)
    assert (read.to_json(), read.id) == (line, trajectory.id)
    assert read.messages[0].served is not None
    assert read.messages[0].served.conversation.user == chat.user
