"""Worlds to act in, turn by turn, as AgentBoard plays PDDL problems: the reward is its progress rate.

Progress is the share of the goal's facts that hold. An episode earns the best progress it reached, so undoing a step
loses nothing (Ma et al. 2024, arXiv 2401.13178, and the code of its PDDL task). Problems are drawn by our own
generators, or read from a folder in AgentBoard's layout.
"""

from collections.abc import Sequence
from functools import cached_property
from random import Random

from pydantic import JsonValue

from latentmem.environments.environment import Outcome, Split
from latentmem.environments.pddl_folder import read_folder
from latentmem.environments.pddl_language import CHECK, WORLDS, Command, Language, is_check, is_look, language
from latentmem.environments.pddl_problems import Size, generate
from latentmem.environments.pddl_world import Action, World, check_library, open_world
from latentmem.errors import DataError
from latentmem.trajectory import Task

SHARES = {"gripper": 2, "blockworld": 1, "barman": 2, "tyreworld": 1}
"""Shares of the worlds, as in AgentBoard's 60 problems: 20, 10, 20 and 10."""
DIFFICULTY = {"small": "easy", "medium": "hard"}
MAX_REPEATS = 200
"""Number of draws in a row without a new problem after which a world counts as exhausted."""
_QUOTED = 60
_HINT = f"Reply with one of them, such as\nAction: {CHECK}"


class PDDLEnvironment:
    """One episode. Reward: the largest share of the goal's facts that held after one of its actions; 1 ends it.

    An action is answered with a reason and changes nothing if it names no command or no object, if its preconditions
    fail, or if it would have no effect. `check valid actions` and `look around` also change nothing, and are answered
    with what they ask for. Each of these costs a turn. The starting state does not count until an action changes it.

    `info` holds `extracted` (the words taken as the action, shortened), `valid` (whether the action could be done),
    `cause` (why not: no_action, unknown_command, unknown_object, unmet, no_change) and `progress`, the share that holds
    now.
    """

    def __init__(self, world: World, words: Language, instructions: str | None = None) -> None:
        self._world = world
        self._words = words
        self._instructions = instructions
        self._state = world.initial
        self._best = 0.0

    @property
    def instructions(self) -> str:
        """The rules of the world and its commands, unless other instructions were given."""
        return self._words.instructions if self._instructions is None else self._instructions

    def step(self, action: str) -> Outcome:
        """Take the team's action and return the outcome."""
        text = self._words.extract(action)
        if text is None:
            return self._answer(None, f"Your reply names no action. {_HINT}", "no_action")
        if is_check(text):
            return self._answer(text, f"You can: {'; '.join(self._words.valid(self._world, self._state))}.")
        if is_look(text):
            return self._answer(text, self._words.sentences(self._state.facts))
        readings = self._words.read(text)
        if not readings:
            return self._answer(text, f"'{_quoted(text)}' is none of the actions. {_HINT}", "unknown_command")
        instances = [action for reading in readings for action in self._instances(*reading)]
        if not instances:
            return self._answer(text, self._misfit(*readings[-1]), "unknown_object")
        return self._act(text, min(instances, key=lambda a: len(self._world.unmet(self._state, a))))

    def _instances(self, command: Command, fields: dict[str, str]) -> list[Action]:
        return self._world.instances(command.action, [fields[a] if a else None for a in command.arguments])

    def _act(self, text: str, action: Action) -> Outcome:
        after = self._world.apply(self._state, action)
        if after is None:
            needed = " ".join(map(self._words.sentence, self._world.unmet(self._state, action)))
            return self._answer(text, f"That cannot be done now. It would need: {needed}", "unmet")
        if after == self._state:
            return self._answer(text, "That would change nothing.", "no_change")
        told = {fact for fact in after.facts if fact[0] not in self._world.static}
        if not self._words.tells_all:
            told -= self._state.facts
        self._state = after
        self._best = max(self._best, self._progress)
        observation = self._words.sentences(told)
        return self._answer(text, f"{observation} The goal is reached." if self._best == 1 else observation)

    def _misfit(self, command: Command, fields: dict[str, str]) -> str:
        for i, field in enumerate(command.arguments):
            fitting = self._world.parameters[command.action][i]
            if field and fields[field] not in fitting:
                known = "cannot be" if fields[field] in self._world.objects else "is unknown as"
                return f"'{_quoted(fields[field])}' {known} {field.upper()} in: {command.form}."
        raise AssertionError(f"{command.action} has an instance for {fields}")

    @property
    def _progress(self) -> float:
        return sum(fact in self._state.facts for fact in self._world.goal) / len(self._world.goal)

    def _answer(self, text: str | None, observation: str, cause: str | None = None) -> Outcome:
        info: dict[str, JsonValue] = {
            "extracted": None if text is None else text[:200],
            "valid": cause is None,
            "cause": cause,
            "progress": self._progress,
        }
        return Outcome(observation=observation, reward=self._best, done=self._best == 1, info=info)


class PDDLDomain:
    """Problems of four worlds; equal arguments give equal problems.

    Args:
        worlds: which of `WORLDS`; they are dealt over and over in AgentBoard's shares: two gripper, one blockworld, two
            barman, one tyreworld.
        size: size of generated problems.
        train_size: number of train tasks, which are always generated.
        test_size: number of test tasks, if they are generated.
        seed: seed of the generated problems.
        path: a folder in AgentBoard's layout; its problems are the test split. None generates them.
        instructions: replaces each world's rules and commands; None keeps them.

    Raises:
        ConfigError: unified-planning is not installed.
    """

    name = "pddl"

    def __init__(
        self,
        *,
        worlds: Sequence[str],
        size: Size,
        train_size: int,
        test_size: int,
        seed: int,
        path: str | None,
        instructions: str | None = None,
    ) -> None:
        check_library()
        self._worlds = tuple(world for world in WORLDS if world in worlds)
        self._size = size
        self._sizes: dict[Split, int] = {"train": train_size, "test": test_size}
        self._seed = seed
        self._path = path
        self._instructions = instructions

    def skipped(self, split: Split) -> dict[str, int]:
        """Return no counts: a problem that cannot be used is an error."""
        return {}

    def tasks(self, split: Split) -> list[Task]:
        """Return the tasks of a split; all train tasks differ from all test tasks.

        Raises:
            DataError: a world has too few different problems, or the folder cannot be used.
        """
        return list(self._tasks.get(split, ()))

    @cached_property
    def _tasks(self) -> dict[Split, list[Task]]:
        test = read_folder(self._path, self._worlds) if self._path is not None else self._draw("test", set())
        return {"test": test, "train": self._draw("train", {task.text for task in test})}

    def start(self, task: Task) -> PDDLEnvironment:
        """Make a fresh environment for one episode.

        Raises:
            DataError: the task is not of this domain.
        """
        name, problem = task.data.get("world"), task.data.get("problem")
        if name not in WORLDS or not isinstance(problem, str):
            raise DataError(f"task {task.key}: its data hold no world and problem; expected a task of kind pddl")
        words = language(str(name))
        domain = task.data.get("domain")
        where = f"task {task.key}"
        world = open_world(domain if isinstance(domain, str) else words.domain, problem, f"{where}: domain", where)
        return PDDLEnvironment(world, words, self._instructions)

    def _draw(self, split: Split, seen: set[str]) -> list[Task]:
        deal = [world for world in self._worlds for _ in range(SHARES[world])]
        numbers = dict.fromkeys(self._worlds, 0)
        tasks: list[Task] = []
        for i in range(self._sizes[split]):
            world = deal[i % len(deal)]
            for _ in range(MAX_REPEATS):
                task = self._generate(world, split, numbers[world])
                numbers[world] += 1
                if task.text not in seen:
                    break
            else:
                raise DataError(
                    f"data: {world} has too few different problems: after {i} {split} tasks, {MAX_REPEATS} draws in a "
                    f"row brought nothing new, but {self._sizes[split]} are asked for; "
                    "lower train_size or test_size, or take size medium"
                )
            seen.add(task.text)
            tasks.append(task)
        return tasks

    def _generate(self, world: str, split: Split, number: int) -> Task:
        words = language(world)
        name = f"{world}-{self._size}-{self._seed}-{split}-{number}"
        problem = generate(world, self._size, Random(name))  # noqa: S311 - a problem, not a secret
        return Task(
            id=name,
            domain=self.name,
            text=words.task(problem.initial, problem.goal),
            data={
                "world": world,
                "difficulty": DIFFICULTY[self._size],
                "seed": self._seed,
                "problem": problem.pddl(name, world),
                "plan": [words.commands[action.name].of(action) for action in problem.plan],
            },
        )


def _quoted(text: str) -> str:
    """Return foreign text as one short line."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= _QUOTED else f"{line[:_QUOTED]}..."
