"""Who speaks, who reads whom, and whose word is the team's action.

A team plays one turn as a generator: it yields calls that do not depend on each other and is sent their responses,
until it returns its action. The rollout advances many such turns in step, so that all agents at one depth, over all
episodes, are one batch of the model. A fixed team is a YAML file; one that decides as it goes is a class with `turn`.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from latentmem.errors import ConfigError, suggest
from latentmem.templates import check_template, fill
from latentmem.trajectory import Role, Step

FIELDS = ("task", "instructions", "messages", "history")


@dataclass(frozen=True)
class Call:
    """One agent's prompt, to be answered."""

    role: Role
    system: str
    user: str
    reads: tuple[int, ...] = ()
    """Which earlier responses of this turn the prompt quotes, counted in the order they were asked for."""


Turn = Generator[list[Call], list[str], str]
"""Yields calls, is sent one response for each, returns the team's action."""


class Team(Protocol):
    """A team of agents; it keeps no state between turns."""

    @property
    def name(self) -> str:
        """Written into the trajectories."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Its members."""

    def turn(self, task: str, instructions: str, history: Sequence[Step]) -> Turn:
        """Play one turn.

        Args:
            task: the task's text.
            instructions: how an answer has to look, from the environment.
            history: the steps of this episode so far.
        """


@dataclass(frozen=True)
class Agent:
    """A member of a fixed team."""

    role: Role
    system: str
    user: str
    reads: tuple[str, ...]


class FixedTeam:
    """A team whose agents speak once a turn, in the order of a directed acyclic graph."""

    def __init__(self, name: str, agents: Sequence[Agent], answer: str) -> None:
        """Check the graph.

        Args:
            name: the team's name.
            agents: its members; each reads the responses of the roles it names.
            answer: role whose response is the team's action.

        Raises:
            ConfigError: two agents of one role, an unknown role, a circle, or an unknown template field.
        """
        self.name = name
        by_role = {agent.role.name: agent for agent in agents}
        if len(by_role) < len(agents):
            raise ConfigError(f"team {name}: two agents have the same role")
        for agent in agents:
            for other in agent.reads:
                if other not in by_role:
                    raise ConfigError(f"team {name}: {agent.role.name} reads {other!r}; {suggest(other, by_role)}")
            for part, template in (("system", agent.system), ("user", agent.user)):
                check_template(template, FIELDS, f"team {name}: {part} prompt of {agent.role.name}")
        if answer not in by_role:
            raise ConfigError(f"team {name}: answer is {answer!r}; {suggest(answer, by_role)}")
        self.answer = answer
        self.layers = _layers(name, by_role)
        """Agents by depth; those of one layer do not read each other."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Its members, in the order they speak."""
        return tuple(agent.role for layer in self.layers for agent in layer)

    def turn(self, task: str, instructions: str, history: Sequence[Step]) -> Turn:
        """Each layer once; see `Team.turn`."""
        said: dict[str, str] = {}
        past = describe_history(history)
        for layer in self.layers:
            calls = []
            for agent in layer:
                fields = {
                    "task": task.strip(),
                    "instructions": instructions.strip(),
                    "messages": "\n\n".join(f"{role} said:\n{said[role].strip()}" for role in agent.reads),
                    "history": past,
                }
                reads = tuple(list(said).index(role) for role in agent.reads)
                calls.append(Call(agent.role, _render(agent.system, fields), _render(agent.user, fields), reads))
            responses = yield calls
            said |= {agent.role.name: text for agent, text in zip(layer, responses, strict=True)}
        return said[self.answer]


def _render(template: str, fields: Mapping[str, str]) -> str:
    """The prompt; where a field is empty no run of blank lines is left, and blank lines inside a field stay."""
    kept = fill(template, **{name: "" for name, text in fields.items() if not text})
    return fill(re.sub(r"\n\s*\n", "\n\n", kept), **fields).strip()


def describe_history(history: Sequence[Step]) -> str:
    """Earlier turns of this episode as text; empty in the first turn."""
    turns = [
        f"Turn {i}\nWe answered: {s.action.strip()}\nReply: {s.observation.strip()}" for i, s in enumerate(history, 1)
    ]
    return "\n\n".join(turns)


def _layers(name: str, by_role: dict[str, Agent]) -> tuple[tuple[Agent, ...], ...]:
    depth: dict[str, int] = {}
    waiting = dict(by_role)
    while waiting:
        ready = [role for role, agent in waiting.items() if all(other in depth for other in agent.reads)]
        if not ready:
            raise ConfigError(f"team {name}: {', '.join(sorted(waiting))} read each other in a circle")
        for role in ready:
            depth[role] = 1 + max((depth[other] for other in waiting[role].reads), default=-1)
        for role in ready:
            del waiting[role]
    return tuple(
        tuple(agent for role, agent in by_role.items() if depth[role] == d) for d in range(max(depth.values()) + 1)
    )


class _AgentFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: str
    profile: str
    system: str
    user: str
    reads: list[str] = []


class _TeamFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    description: str = ""
    agents: list[_AgentFile]
    answer: str


def packaged_teams() -> dict[str, Path]:
    """Names and files of the teams that ship with the package."""
    return {path.stem: path for path in sorted((Path(str(files("latentmem"))) / "teams").glob("*.yaml"))}


def load_team(name: str) -> FixedTeam:
    """A team by its packaged name, or from a YAML file.

    Raises:
        ConfigError: no such team or file, or the file is not a team.
    """
    packaged = packaged_teams()
    path = packaged.get(name) or Path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"team {name!r}: no such team, and no such file; {suggest(name, packaged)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"team file {name}: cannot be read: {' '.join(str(error).split())}") from None
    try:
        team = _TeamFile.model_validate(values)
    except ValidationError as error:
        # A misspelt field that is required is both missing and unknown; the second tells what to do.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"]) or "file"
        if first["type"] == "extra_forbidden":
            known = _AgentFile.model_fields if "agents" in first["loc"] else _TeamFile.model_fields
            problem = f"unknown field; {suggest(str(first['loc'][-1]), known)}"
        elif first["type"] == "missing":
            problem = "missing; it has no default"
        else:
            problem = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise ConfigError(f"team file {name}: {key}: {problem}") from None
    agents = [Agent(Role(name=a.role, profile=a.profile), a.system, a.user, tuple(a.reads)) for a in team.agents]
    if not agents:
        raise ConfigError(f"team file {name}: agents is empty; a team has at least one")
    return FixedTeam(team.name, agents, team.answer)
