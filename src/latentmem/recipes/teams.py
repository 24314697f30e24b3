"""Who plays, from the configuration: teams by their names or files, classes of your own, and programs."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from latentmem.config import Config, ProgramSection
from latentmem.errors import ConfigError
from latentmem.models.language_model import LanguageModel
from latentmem.teams.team import load_team
from latentmem.teams.turn import Player


@runtime_checkable
class Open(Protocol):
    """A team that holds something open between episodes."""

    def close(self) -> None:
        """Let it go."""


def team_of(config: Config, team: str | ProgramSection, model: Callable[[], LanguageModel]) -> Player:
    """Make a team of a configuration.

    Args:
        config: the run.
        team: what the configuration says of the team.
        model: makes the agents' model; called when a program's first agent speaks.

    Raises:
        ConfigError: there is no such team, file, class or program.
    """
    if isinstance(team, str):
        return load_team(team, **config.own.get(team, {}))
    try:
        from latentmem.serving.programs.team import ProgramTeam
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"team {team.label}: a program speaks to a server, which needs the package {error.name}; "
            "pip install 'latentmem[serve]'"
        ) from None
    return ProgramTeam(team, model)
