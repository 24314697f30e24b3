"""Read a folder in AgentBoard's layout: DOMAIN.pddl, problems DOMAIN/*.pddl, and labels for all of them in test.jsonl.

AgentBoard's files are under the GPL and not part of this project; users bring their own copy. The labels name no files:
the k-th label of a domain belongs to the k-th file by name, compared as strings. To catch a label that goes with
another problem, the objects of its subgoals are compared with those of the problem's goal.
"""

import re
from collections.abc import Collection
from pathlib import Path

from latentmem.environments.pddl_language import WORLDS, language
from latentmem.environments.pddl_world import World, open_world
from latentmem.environments.rows import Row, read_rows
from latentmem.errors import DataError, suggest
from latentmem.trajectory import Task

LABELS = "test.jsonl"


def read_folder(path: str, worlds: Collection[str]) -> list[Task]:
    """Read the problems of these worlds, in the order of their labels, with ids such as `gripper/prob01`.

    Raises:
        DataError: a file or line is missing or cannot be used; the message names it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"data.path: {folder} is no folder; expected DOMAIN.pddl, DOMAIN/*.pddl and {LABELS} in it")
    seen: dict[object, str] = {}
    counts = dict.fromkeys(WORLDS, 0)
    tasks = []
    for row in read_rows(folder / LABELS):
        name = Row(row.field("additional_info", dict), f"{row.where}: additional_info").text("subtask")
        if name not in WORLDS:
            raise DataError(f"{row.where}: subtask {name!r} is not a world known here; {suggest(name, WORLDS)}")
        number, counts[name] = counts[name], counts[name] + 1
        label = row.field("id", int)
        file = _problem_file(folder, name, number, row)
        for key in (label, file):
            if key in seen:
                raise DataError(f"{row.where}: {key} is labelled already at {seen[key]}; each problem has one label")
            seen[key] = row.where
        if name in worlds:
            tasks.append(_task(folder, name, file, label, row))
    if not tasks:
        raise DataError(f"{folder / LABELS}: no problem of {', '.join(worlds)}; expected at least one")
    return tasks


def _problem_file(folder: Path, name: str, number: int, row: Row) -> Path:
    files = sorted((folder / name).glob("*.pddl"), key=lambda file: file.name)
    if "problem_file" in row.values:  # a user's selection of problems has labels that name their files
        named = row.text("problem_file")
        by_name = {f"{name}/{file.name}": file for file in files}
        if named not in by_name:
            hint = suggest(named, by_name) if by_name else f"{folder / name} holds none"
            raise DataError(f"{row.where}: {named!r} is not a problem of {name}; {hint}")
        return by_name[named]
    if number >= len(files):
        raise DataError(
            f"{row.where}: label {number + 1} of {name}, but {folder / name} holds {len(files)} .pddl files; "
            "expected one for each label"
        )
    return files[number]


def _task(folder: Path, name: str, file: Path, label: int, row: Row) -> Task:
    words = language(name)
    domain_file = folder / f"{name}.pddl"
    domain, problem = _text(domain_file), _text(file)
    world = open_world(domain, problem, str(domain_file), str(file))
    words.check(world, str(domain_file))
    expected = sorted(sorted(fact[1:]) for fact in world.goal)
    labelled = sorted(sorted(_objects(subgoal, world)) for subgoal in row.strings("subgoals"))
    if labelled != expected:
        raise DataError(
            f"{row.where}: its subgoals are about {_listed(labelled)}, but the goal in {file} is about "
            f"{_listed(expected)}; expected {name}'s problems in the order of their labels"
        )
    return Task(
        id=f"{name}/{file.stem}",
        domain="pddl",
        text=words.task(world.initial.facts, world.goal),
        data={
            "world": name,
            "difficulty": row.text("difficulty"),
            "label": label,
            "domain": domain,
            "problem": problem,
        },
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); expected a PDDL file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not valid UTF-8 ({error}); expected a PDDL file") from None


def _objects(subgoal: str, world: World) -> list[str]:
    return [word for word in re.findall(r"[\w-]+", subgoal.lower()) if word in world.objects]


def _listed(groups: list[list[str]]) -> str:
    return "; ".join(" and ".join(group) for group in groups) or "nothing"
