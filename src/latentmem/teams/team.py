"""Teams as files: who speaks, who reads whom, and whose response is the team's action.

A fixed team is a graph, and its YAML file holds all of it. A file of another `kind` is read by the class that plays it.
A team that decides in a way of its own as it goes is such a class, too (`turn.py` has the interface).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from latentmem import own
from latentmem.errors import ConfigError, suggest
from latentmem.parsing import parse_yaml
from latentmem.teams.dylan import DylanFile, DylanTeam
from latentmem.teams.turn import PAST, PAST_FIELDS, Call, Player, Team, Turn, describe_history, render
from latentmem.templates import check_template, fields_in, fill
from latentmem.trajectory import Role, Step

FIELDS = ("task", "instructions", "messages", "history")
SAID = "{role} said:\n{response}"
"""How a message is quoted to its readers, unless the team's file says otherwise."""


@dataclass(frozen=True)
class Agent:
    """A member of a fixed team."""

    role: Role
    system: str
    user: str
    reads: tuple[str, ...]


class FixedTeam:
    """A team whose agents speak once a turn, in the order of a directed acyclic graph."""

    def __init__(self, name: str, agents: Sequence[Agent], answer: str, message: str = SAID, past: str = PAST) -> None:
        """Check the graph.

        Args:
            name: the team's name.
            agents: the team's members; each reads the responses of the roles it names.
            answer: the role whose response is the team's action.
            message: how a message is quoted, with the fields {role} and {response}.
            past: how an earlier turn is told, with the fields {number}, {action} and {observation}.

        Raises:
            ConfigError: two agents have the same role, a role or a template field is unknown, or agents read each other
                in a circle.
        """
        self.name = name
        by_role = {agent.role.name: agent for agent in agents}
        if len(by_role) < len(agents):
            raise ConfigError(f"team {name}: two agents have the same role")
        for agent in agents:
            for other in agent.reads:
                if other not in by_role:
                    raise ConfigError(f"team {name}: {agent.role.name} reads {other!r}; {suggest(other, by_role)}")
                if agent.reads.count(other) > 1:
                    raise ConfigError(f"team {name}: {agent.role.name} reads {other!r} twice; name it once")
            for part, template in (("system", agent.system), ("user", agent.user)):
                check_template(template, FIELDS, f"team {name}: {part} prompt of {agent.role.name}")
        if answer not in by_role:
            raise ConfigError(f"team {name}: answer is {answer!r}; {suggest(answer, by_role)}")
        check_template(message, ("role", "response"), f"team {name}: message")
        check_template(past, PAST_FIELDS, f"team {name}: turn")
        self.answer = answer
        self.message = message
        self.past = past
        self.layers = _layers(name, by_role)
        """Agents by depth; those of one layer do not read each other."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The team's members, in the order they speak."""
        return tuple(agent.role for layer in self.layers for agent in layer)

    @property
    def shown(self) -> frozenset[str]:
        """Names of the fields that some agent is shown."""
        return fields_in(*(template for layer in self.layers for a in layer for template in (a.system, a.user)))

    def turn(self, task: str, instructions: str, history: Sequence[Step]) -> Turn:
        """Ask each layer once; see `Team.turn`."""
        said: dict[str, str] = {}
        past = describe_history(history, self.past)
        for layer in self.layers:
            calls = []
            for agent in layer:
                quoted = [fill(self.message, role=role, response=said[role].strip()) for role in agent.reads]
                fields = {
                    "task": task.strip(),
                    "instructions": instructions.strip(),
                    "messages": "\n\n".join(quoted),
                    "history": past,
                }
                reads = tuple(list(said).index(role) for role in agent.reads)
                calls.append(Call(agent.role, render(agent.system, fields), render(agent.user, fields), reads))
            responses = yield calls
            said |= {agent.role.name: text for agent, text in zip(layer, responses, strict=True)}
        return said[self.answer]


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
    kind: Literal["fixed"] = "fixed"
    name: str
    description: str = ""
    agents: list[_AgentFile]
    answer: str
    message: str = SAID
    turn: str = PAST


def _fixed(file: _TeamFile) -> FixedTeam:
    agents = [Agent(Role(name=a.role, profile=a.profile), a.system, a.user, tuple(a.reads)) for a in file.agents]
    return FixedTeam(file.name, agents, file.answer, file.message.rstrip("\n"), file.turn.rstrip("\n"))


_KINDS: dict[str, tuple[type[BaseModel], Callable[[Any], Team]]] = {
    "fixed": (_TeamFile, _fixed),
    "dylan": (DylanFile, DylanTeam),
}
"""For each kind of team: the schema of its file, and the function that makes the team."""


def shown_by(team: Player) -> frozenset[str]:
    """Return the fields that some agent of the team is shown; for a user's own class or program, assume all of them."""
    return team.shown if isinstance(team, FixedTeam | DylanTeam) else frozenset(FIELDS)


def packaged_teams() -> dict[str, Path]:
    """Return the names and files of the teams that ship with the package."""
    return {path.stem: path for path in sorted((Path(str(files("latentmem"))) / "teams").glob("*.yaml"))}


def team_file(name: str) -> Path:
    """Return the file of a team: that of the packaged name, or `name` itself."""
    return packaged_teams().get(name) or Path(name)


def load_team(name: str, **parameters: Any) -> Team:
    """Load a team by its packaged name, from a YAML file, or from a user's own class.

    Args:
        name: the team's name, a path, or `module:Name`.
        parameters: arguments of the class; other teams take none.

    Raises:
        ConfigError: there is no such team, file or class, or it is not a team.
    """
    if own.is_own(name) and not Path(name).exists():
        team: Team = own.make(name, parameters, f"own.{name}" if parameters else "team", ("name", "roles", "turn"))
        return team
    try:
        values = parse_yaml(team_file(name).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"team {name!r}: no such team, and no such file; {suggest(name, packaged_teams())}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"team file {name}: cannot be read: {error}") from None
    kind = values.get("kind", "fixed") if isinstance(values, dict) else "fixed"
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"team file {name}: kind is {kind!r}; {suggest(str(kind), _KINDS)}")
    schema, make = _KINDS[kind]
    try:
        file: Any = schema.model_validate(values)
    except ValidationError as error:
        # A misspelt required field is reported as missing and as unknown; only the second report names the mistake.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"]) or "file"
        if first["type"] == "extra_forbidden":
            problem = f"unknown field; {suggest(str(first['loc'][-1]), _fields_at(schema, first['loc'][:-1]))}"
        elif first["type"] == "missing":
            problem = "missing; it has no default"
        elif first["type"] == "value_error":
            problem = str(first["ctx"]["error"])
        else:
            problem = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise ConfigError(f"team file {name}: {key}: {problem}") from None
    if not file.agents:
        raise ConfigError(f"team file {name}: agents is empty; a team has at least one")
    return make(file)


def _fields_at(schema: type[BaseModel], location: Sequence[str | int]) -> Sequence[str]:
    """Return the fields of the part of a file at a location."""
    for part in location:
        if isinstance(part, str):
            annotation = schema.model_fields[part].annotation
            parts = [annotation, *getattr(annotation, "__args__", ())]
            schema = next(a for a in parts if isinstance(a, type) and issubclass(a, BaseModel))
    return list(schema.model_fields)
