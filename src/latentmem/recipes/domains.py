"""What is played: the domain for each kind of data, its splits, and the tasks that are set aside."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentmem import own
from latentmem.config import (
    CodeSection,
    HiddenFactsSection,
    MixPart,
    MixSection,
    OwnDataSection,
    PDDLSection,
    QASection,
    ReasoningSection,
)
from latentmem.environments.code.domain import CodeDomain
from latentmem.environments.environment import Domain, Split
from latentmem.environments.hidden_facts.domain import HiddenFactsDomain
from latentmem.environments.mix import MixDomain, Part
from latentmem.environments.pddl import PDDLDomain
from latentmem.environments.qa import QADomain
from latentmem.environments.reasoning import ReasoningDomain
from latentmem.environments.search import SearchDomain
from latentmem.errors import ConfigError, suggest
from latentmem.teams.team import shown_by
from latentmem.teams.turn import Player, Program
from latentmem.trajectory import Task


def _questions(section: QASection) -> Domain:
    questions = QADomain(
        schema=section.schema_, train=section.train, test=section.test, instructions=section.instructions
    )
    return questions if section.search is None else SearchDomain(questions, section.search)


def _parts_of_mix(parts: Sequence[MixPart]) -> list[Part]:
    return [Part(DOMAINS[type(part.data)](part.data), part.max_turns) for part in parts]


DOMAINS: dict[type, Callable[[Any], Domain]] = {
    ReasoningSection: lambda s: ReasoningDomain(
        families=s.families,
        train_size=s.train_size,
        test_size=s.test_size,
        seed=s.seed,
        instructions=s.instructions,
    ),
    QASection: _questions,
    CodeSection: lambda s: CodeDomain(
        schema=s.schema_,
        train=s.train,
        test=s.test,
        sandbox=s.sandbox,
        prompt=s.prompt,
        instructions=s.instructions,
    ),
    PDDLSection: lambda s: PDDLDomain(
        worlds=s.worlds,
        size=s.size,
        train_size=s.train_size,
        test_size=s.test_size,
        seed=s.seed,
        path=s.path,
        instructions=s.instructions,
    ),
    HiddenFactsSection: lambda s: HiddenFactsDomain(**{key: value for key, value in s if key != "kind"}),
    OwnDataSection: lambda s: own.make(s.kind, s.parameters, "data", ("name", "tasks", "skipped", "start")),
    MixSection: lambda s: MixDomain(_parts_of_mix(s.train), _parts_of_mix(s.test)),
}


def check_roles(data: Any, teams: Sequence[Player]) -> None:
    """Refuse data that judge a role which some team lacks."""
    sections = [part.data for part in (*data.train, *data.test)] if isinstance(data, MixSection) else [data]
    for section in sections:
        for role in section.needs if isinstance(section, HiddenFactsSection) else ():
            for team in teams:
                known = [member.name for member in team.roles]
                if role not in known and isinstance(team, Program):
                    raise ConfigError(
                        f"data.needs: role {role!r} is judged, and program {team.name} does not list it; add it to the "
                        f'program\'s roles, as in {{name: {role}, profile: "what it does"}}'
                    )
                if role not in known:
                    raise ConfigError(f"data.needs: team {team.name} has no role {role!r}; {suggest(role, known)}")


def unshown(data: Any, team: Player, max_turns: int) -> dict[str, str]:
    """Return needed fields that the team shows to none of its agents, each with what follows from that."""
    sections = [part.data for part in (*data.train, *data.test)] if isinstance(data, MixSection) else [data]
    missing = {}
    # The teams made for hidden_facts state in their own prompts how to answer.
    if not all(isinstance(section, HiddenFactsSection) for section in sections):
        missing["instructions"] = "nobody is told how an answer has to look"
    if max_turns > 1:
        missing["history"] = f"with max_turns {max_turns}, nobody is told what was replied in the turns before"
    return {field: what for field, what in missing.items() if field not in shown_by(team)}


def with_experience(found: Mapping[Split, list[Task]], count: int) -> dict[Split, list[Task]]:
    """Return the splits; if there is no experience split, the first `count` train tasks become it."""
    experience, train = found["experience"], found["train"]
    if count and experience:
        raise ConfigError(
            f"bank.experience_tasks is {count}, but these data have an experience split of their own, of "
            f"{len(experience)} tasks; set it to 0"
        )
    if count >= len(train):
        raise ConfigError(
            f"bank.experience_tasks is {count}, but the train split has {len(train)} tasks; "
            "set it lower, so that some are left to train on"
        )
    return {**found, "experience": experience or train[:count], "train": train[count:]}


def task_to_show(splits: Mapping[Split, list[Task]], split: Split, number: int) -> tuple[Task, str]:
    """Return a task by its number in a split, from 1, and a title for it.

    Raises:
        ConfigError: the split has fewer tasks, or none.
    """
    tasks = splits[split]
    if not tasks:
        having = ", ".join(name for name, found in splits.items() if found)
        raise ConfigError(f"a task of the {split} split is asked for, but these data have none; they have {having}")
    if number > len(tasks):
        raise ConfigError(
            f"task {number} of the {split} split is asked for, but it has {len(tasks)} tasks; give a number from 1 to "
            f"{len(tasks)}"
        )
    task = tasks[number - 1]
    return task, f"task {number} of {len(tasks)} in the {split} split: {task.key}"
