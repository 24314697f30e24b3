"""A tiny model, and teams that are programs of `sample_programs`."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import latentmem
from latentmem.config import ProgramSection
from latentmem.models.language_model import LanguageModel
from latentmem.serving.programs.team import ProgramTeam

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def model(tiny_model_dir: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(str(tiny_model_dir), device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def findable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs find the sample programs and this package."""
    folders = [HERE, Path(latentmem.__file__).parents[1]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))


@pytest.fixture
def program(model: LanguageModel) -> Iterator[Callable[..., ProgramTeam]]:
    """Make a team: a function of `sample_programs` by its name, or a command."""
    made: list[ProgramTeam] = []

    def make(function: str | None = None, **fields: Any) -> ProgramTeam:
        how = {"call": f"sample_programs:{function}"} if function else {}
        team = ProgramTeam(ProgramSection(kind="program", **how, **fields), lambda: model)
        made.append(team)
        return team

    yield make
    for team in made:
        team.close()
