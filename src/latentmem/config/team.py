"""Who plays: a team by its name or file, or a program that plays by itself."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from latentmem.config.section import AsTuple, PathText, PositiveFloat, PositiveInt, Section, Text
from latentmem.config.serve import ServedRole

FORMS = ("a team by name", "a program")
"""How pydantic calls the two forms of a team, in the places of errors."""


def _is_function(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value):
        raise ValueError(f"is {value!r}; expected module:function, such as my_module:solve")
    return value


class ProgramSection(Section):
    """A program of your own that plays each episode by itself, its agents pointed at a server of the run; see
    docs/programs.md.
    """

    kind: Literal["program"]
    """Chooses this form of a team."""
    name: Text | None = None
    """The team's name, as written into the trajectories; null: the name of the program's file or module."""
    command: Annotated[tuple[Text, ...], AsTuple] = ()
    """The program and its arguments, started anew for each episode; no shell reads them. The last line that it prints
    is the team's answer."""
    call: Annotated[Text, AfterValidator(_is_function)] | None = None
    """`module:function` in place of a command; worker processes call it with the task, and it returns the answer."""
    python: PathText | None = None
    """The interpreter of the workers, such as that of an environment which has an agent framework; it need not have
    this package. null: the interpreter of this process."""
    parallel: PositiveInt = 8
    """Largest number of episodes that one process of ours plays at the same time."""
    timeout_seconds: PositiveFloat = 300.0
    """Longest time of an episode, in seconds of wall clock; after that the program is killed, and its episode fails."""
    roles: Annotated[tuple[ServedRole, ...], AsTuple] = ()
    """Roles that are known beforehand, as in `serve.roles`. Others may speak, too."""

    @model_validator(mode="after")
    def _one_way_to_run(self) -> Self:
        if bool(self.command) == (self.call is not None):
            both = "command and call" if self.command else "neither command nor call"
            raise ValueError(f"has {both}; give one of them")
        if self.python is not None and self.call is None:
            raise ValueError("has python and a command; name the interpreter in the command itself")
        names = [role.name for role in self.roles]
        if len(set(names)) < len(names):
            raise ValueError("has one role twice; name each role once")
        return self

    @property
    def label(self) -> str:
        """The team's name."""
        if self.name is not None:
            return self.name
        if self.call is not None:
            return self.call.partition(":")[0]
        scripts = [word for word in self.command if word.endswith(".py")]
        return Path(scripts[-1] if scripts else self.command[0]).stem

    @property
    def shown(self) -> str:
        """The program as one would write it."""
        return self.call or " ".join(self.command)


def _form(value: Any) -> str:
    return FORMS[isinstance(value, dict | ProgramSection)]


TeamChoice = Annotated[
    Annotated[PathText, Tag(FORMS[0])] | Annotated[ProgramSection, Tag(FORMS[1])], Discriminator(_form)
]
"""A team's name or file, or a program."""
TeamChoices = Annotated[tuple[TeamChoice, ...], AsTuple]
"""Several of them."""
SomeTeams = Annotated[tuple[TeamChoice, ...], AsTuple, Field(min_length=1)]
"""At least one of them."""

TEAM_FREE = ("parallel", "timeout_seconds")
"""Keys of a program that may change when a phase continues: none decides what is asked."""


def team_label(team: str | ProgramSection) -> str:
    """Return the team's name in tables and folders: that of a program, or the end of a name, file or class."""
    return team.label if isinstance(team, ProgramSection) else Path(team).stem
