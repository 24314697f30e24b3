"""What a memory is to a team: something asked, before an episode, what one role should remember for one task.

Whatever is recalled is kept as text too (`Recall.record`), and that text is written here, once, for text memories and
for the composer alike: what rollouts were given and what training composes again cannot drift apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from latentmem.config import MemorySection
from latentmem.templates import fill
from latentmem.trajectory import Recalled, Role, Task, Trajectory


@dataclass(frozen=True)
class Recall:
    """Memory for one task and role."""

    record: Recalled
    """As it is stored with each message that was given it."""
    latents: Tensor | None = None
    """[K, d_agent] float32, placed after the agent's prompt; None for memories made of text."""


class Memory(Protocol):
    """The seam behind which all memories stand."""

    @property
    def kind(self) -> str:
        """Its name in stored messages: none, text, latent."""

    @property
    def composing_seconds(self) -> float:
        """Time spent so far in networks of its own, as opposed to searching; in seconds."""

    def recall(self, task: Task, role: Role) -> Recall:
        """What this role should remember for this task. Trajectories of the very task are never used."""

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> list[Recall]:
        """`recall` for several at once, in their order."""

    def add(self, trajectory: Trajectory) -> None:
        """Let the memory learn from an episode."""


class NoMemory:
    """Remembers nothing."""

    kind = "none"
    composing_seconds = 0.0

    def recall(self, task: Task, role: Role) -> Recall:
        """An empty recall."""
        return Recall(Recalled(kind=self.kind))

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> list[Recall]:
        """Empty recalls."""
        return [self.recall(task, role) for task, role in queries]

    def add(self, trajectory: Trajectory) -> None:
        """Nothing is kept."""


def describe(trajectory: Trajectory, words: MemorySection = MemorySection()) -> str:  # noqa: B008 - it is frozen
    """A trajectory as text: the task, each action with what came back, and how it ended."""
    lines = [fill(words.task, task=trajectory.task.text.strip())]
    for step in trajectory.steps:
        lines.append(fill(words.step, action=step.action.strip()))
        if step.observation.strip():
            lines.append(fill(words.reply, observation=step.observation.strip()))
    lines.append(words.solved if trajectory.success else words.unsolved)
    return "\n".join(line for line in lines if line)


def said_by(trajectory: Trajectory, role: Role) -> str:
    """What one role said in a trajectory, turn by turn; empty where it had no part."""
    return "\n".join(message.response.strip() for message in trajectory.messages if message.role == role.name)
