"""Who speaks, about what: the places in their order, and roles by their system messages."""

import re
from typing import Any

import pytest

from latentmem.serving.asks import Refused, Who
from latentmem.serving.identity import KnownRole, Roles, role_of, who_speaks
from latentmem.trajectory import Conversation, Role

PLACES: list[tuple[str, Any]] = [
    ("headers", {"x-latentmem-session-id": "h"}),
    ("body", {"latentmem": {"session": "b"}}),
    ("metadata", {"metadata": {"session": "m"}}),
    ("url", {"sid": "u"}),
]


@pytest.mark.parametrize("first", range(len(PLACES)))
def test_the_first_place_that_tells_counts(first: int) -> None:
    told = dict(PLACES[first:])
    body = told.get("body", {}) | told.get("metadata", {})
    who, _ = who_speaks(Who(tenant="t"), told.get("headers", {}), body, told.get("url", {}))
    assert who == Who(tenant="t", session="hbmu"[first])


def test_each_fact_is_looked_for_by_itself() -> None:
    headers = {"x-latentmem-agent": "solver", "x-session-id": "s", "x-latentmem-memory": "none"}
    body = {"latentmem": {"task": "t1", "role": None}, "metadata": {"role": "x", "domain": "math", "memory": "text"}}
    who, memory = who_speaks(Who(key="k"), headers, body, {"agent": "y"})
    assert (who, memory) == (Who(key="k", session="s", role="solver", task="t1", domain="math"), "none")


def test_the_tenant_comes_from_the_key_alone() -> None:
    body = {"latentmem": {"tenant": "evil"}, "metadata": {"tenant": "evil"}}
    who, _ = who_speaks(Who(tenant="mine"), {"x-latentmem-tenant": "evil"}, body, {"tenant": "evil"})
    assert who.tenant == "mine"


def test_a_token_of_a_session_admits_that_session_alone() -> None:
    caller = Who(session="mine")
    assert who_speaks(caller, {}, {}, {})[0].session == "mine"
    assert who_speaks(caller, {}, {}, {"sid": "mine"})[0].session == "mine"
    for headers, body, url in (
        ({"x-session-id": "b"}, {}, {}),
        ({}, {"latentmem": {"session": "b"}}, {}),
        ({}, {}, {"sid": "b"}),
    ):
        with pytest.raises(Refused) as refused:
            who_speaks(caller, headers, body, url)
        assert refused.value.status == 403


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\u202eevil", "x" * 201, "\x00", 5, ["x"], {}])
def test_what_is_no_name_is_refused_where_it_stands(name: Any) -> None:
    with pytest.raises(Refused, match=r"^latentmem\.role: .* is no name") as refused:
        who_speaks(Who(), {}, {"latentmem": {"role": name}}, {})
    assert (refused.value.status, refused.value.field) == (400, "latentmem.role")


def test_headers_are_read_as_utf8() -> None:
    raw = "prüfer".encode().decode("latin-1")
    assert who_speaks(Who(), {"x-latentmem-role": raw}, {}, {})[0].role == "prüfer"
    assert who_speaks(Who(), {"x-latentmem-role": "caf\xe9"}, {}, {})[0].role == "café"


def chat(*systems: str, name: str | None = None) -> Conversation:
    messages: list[Any] = [{"role": "system", "content": s} | ({"name": name} if name else {}) for s in systems]
    return Conversation(messages=(*messages, {"role": "user", "content": "x"}))


SOLVER = KnownRole(Role(name="solver", profile="You solve."))
CRITIC = KnownRole(Role(name="critic", profile="Checks."), re.compile("You (check|criticise)"))


def test_a_role_is_recognised_by_its_system_message() -> None:
    known = (SOLVER, CRITIC)
    assert role_of(None, chat("You solve."), known) == SOLVER.role
    assert role_of(None, chat("Hello.", "You check all."), known) == CRITIC.role
    assert role_of("critic", chat("anything"), known) == CRITIC.role
    assert role_of("third", chat("You solve."), known) == Role(name="third", profile="You solve.")


def test_an_unknown_role_has_a_short_name_that_stays() -> None:
    role = role_of(None, chat("You sing."), ())
    assert role.profile == "You sing."
    assert re.fullmatch(r"agent-[0-9a-f]{10}", role.name)
    assert role_of(None, chat("You  sing.\n"), ()).name == role.name
    assert role_of(None, chat("You dance."), ()).name != role.name
    assert role_of(None, chat("You sing.", name="singer"), ()).name == "singer"
    assert role_of(None, chat("You sing.", name="a\nb"), ()).name == role.name


def test_a_speaker_tells_whether_its_role_is_known() -> None:
    roles = Roles((SOLVER, CRITIC))
    told = [
        roles.speaker(name, chat(system))
        for name, system in (("critic", "x"), (None, "You check."), ("judge", "x"), (None, "You sing."))
    ]
    assert [(each.is_known, each.warning) for each in told] == [
        (True, None),
        (True, None),
        (False, None),
        (False, None),
    ]
    assert told[2].role == Role(name="judge", profile="x")
    assert Roles().speaker("critic", chat("x")).is_known is None
    assert not roles.speaker(None, chat("You sing.", name="solver")).is_known  # another's profile, whatever its name


@pytest.mark.parametrize("name", ["critc", "Critic", "CRITIC", "critics", "cirtic"])
def test_a_name_that_is_almost_a_role_s_is_served_and_warned_about_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    roles = Roles((SOLVER, CRITIC))
    said = f"role '{name}' is not in the configuration and is taken for a new one; did you mean 'critic'?"
    for _ in range(3):
        speaker = roles.speaker(name, chat("x"))
        assert (speaker.role, speaker.is_known, speaker.warning) == (Role(name=name, profile="x"), False, said)
    assert caplog.messages == [said]


def test_clients_cannot_fill_the_log_with_names(caplog: pytest.LogCaptureFixture) -> None:
    roles = Roles((SOLVER,))
    speakers = [roles.speaker(f"solver-{i}", chat("x")) for i in range(300)]
    assert all(speaker.warning for speaker in speakers)
    assert len(caplog.messages) == 100
