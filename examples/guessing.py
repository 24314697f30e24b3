"""An environment of your own, with several turns: guess a number, and hear whether the secret is higher or lower."""

import re
from random import Random

from latentmem import Outcome, Split, Task


class Guessing:
    """One episode: it ends when the number is guessed."""

    instructions = "Answer with one number."

    def __init__(self, secret: int) -> None:
        self.secret = secret

    def step(self, action: str) -> Outcome:
        """Compare the first number of the action with the secret one."""
        found = re.search(r"\d+", action)
        if found is None:
            return Outcome("That is no number.", reward=0.0, done=False, info={"extracted": None})
        guess = int(found[0])
        if guess == self.secret:
            return Outcome("Right.", reward=1.0, done=True)
        return Outcome("Higher." if guess < self.secret else "Lower.", reward=0.0, done=False)


class GuessingDomain:
    """Random numbers from 1 to `highest`."""

    name = "guessing"

    def __init__(self, highest: int = 10, train_size: int = 8, test_size: int = 4) -> None:
        self.highest = highest
        self.sizes = {"train": train_size, "test": test_size}

    def tasks(self, split: Split) -> list[Task]:
        """The tasks of a split, always the same."""
        random = Random(split)
        text = f"I think of a number from 1 to {self.highest}. Which one is it?"
        return [
            Task(
                id=f"{split}-{i}",
                domain=self.name,
                text=f"Game {split} {i}. {text}",
                data={"secret": random.randint(1, self.highest)},
            )
            for i in range(self.sizes.get(split, 0))
        ]

    def skipped(self, split: Split) -> dict[str, int]:
        """Nothing is left out: the tasks are generated, not read from rows."""
        return {}

    def start(self, task: Task) -> Guessing:
        """A fresh episode."""
        return Guessing(task.data["secret"])
