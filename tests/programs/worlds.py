"""A domain of a few lines for runs from configurations: an answer of an odd number of characters is right."""

from latentmem.environments.environment import Outcome
from latentmem.trajectory import Task

SIZES = {"train": 8, "test": 4}


class OddWorld:
    """Tasks that a random model solves now and then."""

    name = "odd"

    def tasks(self, split):
        """Return the tasks of a split."""
        return [Task(id=f"{split}{i}", domain="odd", text=f"Task {i} of {split}?") for i in range(SIZES.get(split, 0))]

    def skipped(self, split):
        """Return that no row was skipped."""
        return {}

    def start(self, task):
        """Make an episode's environment."""
        return Odd()


class Odd:
    """Pays for an odd number of characters."""

    instructions = "Give the final answer only."

    def step(self, action):
        """Judge an answer."""
        return Outcome("", float(len(action) % 2), True, {"extracted": action})
