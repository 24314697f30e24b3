"""Demonstrations: trajectories in which the team said what it should have said.

If nobody succeeds without memory, there are no successes to learn from, but somebody may know the right responses. They
are put into the team's own prompts as if the model had sampled them. So whoever learns from successes also learns from
demonstrations, and later code needs no special case.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pydantic import JsonValue

from latentmem.environments.rows import Row, read_rows
from latentmem.errors import BadRowError, DataError, ModelError, suggest
from latentmem.models.language_model import LanguageModel
from latentmem.teams.turn import Action, Call, Player, Program, ProgramFailed, Team
from latentmem.trajectory import Message, Recalled, Served, Step, Task, Trajectory


@dataclass(frozen=True)
class Demonstration:
    """What the members of a team should say for a task."""

    task: Task
    said: Mapping[str, str]
    """Each role's response, by the role's name; the empty name stands for every role that is not named."""
    where: str
    """Where the demonstration was given, for errors: `file:line`, or the task."""


def demonstrate(
    team: Player, task: Task, instructions: str, said: Mapping[str, str], model: LanguageModel, where: str = ""
) -> Trajectory:
    """Return the success of a team that said what it should have said, in the form of a rollout's result.

    Only the first turn is demonstrated. A role that speaks several times in it says the same each time. The tokens of a
    response are the model's own encoding of the text, and an EOS. Nobody sampled them, so their `logps` and their
    `temperature` are 0 and mean nothing. The prompts hold no memory. A program is run, and is answered so.

    Args:
        team: plays the turn; it receives the demonstrated responses as if its agents had given them.
        task: the task that the team is given.
        instructions: the form an answer must have, from the environment.
        said: responses by role; see `Demonstration.said`.
        model: the agents' model, for the tokens.
        where: where the demonstration was given, for errors; the task's key if it is empty.

    Raises:
        DataError: a role that speaks has no response, or a blank one; or a program failed.
        ModelError: the model's tokenizer has no EOS.
    """
    where = where or task.key
    if isinstance(team, Program):
        messages, action = _run(team, task, instructions, said, model, where)
    else:
        messages, action = _play(team, task, instructions, said, model, where)
    info: dict[str, JsonValue] = {"team": dict(action.record)} if action.record else {}
    step = Step(messages=tuple(messages), action=action.text, observation="", info=info)
    return Trajectory(task=task, team=team.name, model=model.name, steps=(step,), reward=1.0, success=True, seed=0)


def _play(
    team: Team, task: Task, instructions: str, said: Mapping[str, str], model: LanguageModel, where: str
) -> tuple[list[Message], Action]:
    messages: list[Message] = []
    turn = team.turn(task.text, instructions, [])
    try:
        calls = next(turn)
        while True:
            spoken = [_message(call, _response(call, said, team, where), model) for call in calls]
            messages += spoken
            calls = turn.send([message.response for message in spoken])
    except StopIteration as stop:
        return messages, stop.value if isinstance(stop.value, Action) else Action(stop.value)


def _run(
    program: Program, task: Task, instructions: str, said: Mapping[str, str], model: LanguageModel, where: str
) -> tuple[list[Message], Action]:
    messages: list[Message] = []
    mistakes: list[DataError] = []

    def speak(calls: Sequence[Call]) -> list[Message]:
        try:
            spoken = [_message(call, _response(call, said, program, where), model) for call in calls]
        except DataError as error:
            mistakes.append(error)
            raise
        messages.extend(spoken)
        return spoken

    try:
        return messages, program.play(task, instructions, 0, speak)
    except ProgramFailed as error:
        raise (mistakes or [DataError(f"{where}: program {program.name} failed: {error}")])[0] from None


def _response(call: Call, said: Mapping[str, str], team: Player, where: str) -> str:
    name = call.role.name
    response = said.get(name, said.get(""))
    if response is None:
        raise DataError(
            f"{where}: role {name!r} of team {team.name} has no demonstrated response; add one under its name, or one "
            "under the empty name, which stands for every role without its own"
        )
    if not response.strip():
        raise DataError(f"{where}: the demonstrated response of {name!r} is blank; expected text")
    return response.strip()


def _message(call: Call, response: str, model: LanguageModel) -> Message:
    eos = model.tokenizer.eos_token_id
    if eos is None:
        raise ModelError(f"model {model.name!r}: its tokenizer has no EOS, which ends a demonstrated response; set one")
    ids = (*model.encode(response), int(eos))
    served = call.served
    prompt_ids = (
        model.encode_prompt(call.system, call.user)
        if served is None
        else model.chat.encode_conversation(served.conversation)
    )
    return Message(
        role=call.role.name,
        system=call.system,
        user=call.user,
        response=model.decode(ids).strip(),
        token_ids=ids,
        logps=(0.0,) * len(ids),
        finish="stop",
        temperature=0.0,
        num_prompt_tokens=len(prompt_ids),
        reads=call.reads,
        recalled=Recalled(kind="none"),
        served=None
        if served is None
        else Served(
            call=served.call, conversation=served.conversation, prompt_ids=tuple(prompt_ids), lineage=served.lineage
        ),
    )


def read_demonstrations(path: Path, tasks: Sequence[Task], roles: Collection[str]) -> list[Demonstration]:
    """Read demonstrations from JSON Lines: rows of `task` and `responses` (an object of texts by role).

    `task` is an id, or `DOMAIN:ID` if several domains of a mix have the same id. A task may have several rows.

    Args:
        path: the file.
        tasks: the tasks that rows may be about.
        roles: names that rows may use, besides the empty one.

    Raises:
        BadRowError: a row is not an object; it lacks a field, or has one of another type; its task or a role is
            unknown; several tasks have its id; a response is blank, or there is none.
        DataError: there is no such file, or no row in it.
    """
    by_name = _by_name(tasks)
    found = [_demonstration(row, by_name, roles) for row in read_rows(path)]
    if not found:
        raise DataError(f"{path}: expected at least one demonstration, found none")
    return found


def _by_name(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Return the tasks that each name in a row may mean: an id, or the key that tells tasks of one id apart."""
    once = {task.key: task for task in tasks if task.id is not None}
    by_name: dict[str, list[Task]] = {}
    for task in once.values():
        by_name.setdefault(str(task.id), []).append(task)
    return by_name | {key: [task] for key, task in once.items()}


def _demonstration(row: Row, by_name: Mapping[str, Sequence[Task]], roles: Collection[str]) -> Demonstration:
    name = row.text("task")
    meant = by_name.get(name, [])
    if not meant:
        raise BadRowError("unknown task", f"{row.where}: task {name[:80]!r} is not in the data; {_hint(name, by_name)}")
    if len(meant) > 1:
        keys = " or ".join(repr(task.key[:80]) for task in meant)
        raise BadRowError("ambiguous task", f"{row.where}: {len(meant)} tasks have the id {name[:80]!r}; write {keys}")
    responses = Row(row.field("responses", dict), f"{row.where}: responses")
    if not responses.values:
        raise BadRowError("blank", f"{responses.where}: is empty; expected a text for each role")
    for role in responses.values:
        if role and role not in roles:
            raise BadRowError(
                "unknown role", f"{responses.where}: no team has a role {role[:80]!r}; {suggest(role[:80], roles)}"
            )
    return Demonstration(meant[0], {role: responses.text(role) for role in responses.values}, row.where)


def _hint(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name[:80], known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"expected an id such as {next(iter(known), None)!r}"
