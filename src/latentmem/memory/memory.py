"""The interface of a memory: before an episode, a team asks it what one role should remember for one task.

Each recall is also kept as text (`Recall.record`). Text memories and the composer alike use the text written here, so
what rollouts were given and what training composes again cannot drift apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, overload

from torch import Tensor

from latentmem.config import MemorySection
from latentmem.templates import fill
from latentmem.trajectory import Recalled, Role, Task, Trajectory


@dataclass(frozen=True)
class Spent:
    """The cost of recalling or learning: what language models, the composer among them, read and wrote for it."""

    num_asked: int = 0
    """Number of prompts that were answered or rated."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    """Latents do not count."""
    num_shortened: int = 0
    """Number of episodes that had to be shortened for a prompt."""
    malformed: Mapping[str, int] = field(default_factory=dict)
    """Numbers of replies, or lines of replies, that could not be used, by reason."""
    composing_seconds: float = 0.0
    """Wall-clock time in the memory's own networks; searching does not count."""

    @property
    def num_malformed(self) -> int:
        """Number of replies, or lines of replies, that could not be used."""
        return sum(self.malformed.values())

    def __add__(self, other: Self) -> Self:
        return self._with(other, 1)

    def __sub__(self, earlier: Self) -> Self:
        """Return what was spent since an earlier sum."""
        return self._with(earlier, -1)

    def _with(self, other: Self, sign: int) -> Self:
        reasons = {**self.malformed, **other.malformed}
        counts = {key: self.malformed.get(key, 0) + sign * other.malformed.get(key, 0) for key in reasons}
        return replace(
            self,
            num_asked=self.num_asked + sign * other.num_asked,
            prompt_tokens=self.prompt_tokens + sign * other.prompt_tokens,
            generated_tokens=self.generated_tokens + sign * other.generated_tokens,
            num_shortened=self.num_shortened + sign * other.num_shortened,
            malformed={key: count for key, count in counts.items() if count},
            composing_seconds=self.composing_seconds + sign * other.composing_seconds,
        )


@dataclass(frozen=True)
class Recall:
    """Memory for one task and role."""

    record: Recalled
    """The recall as it is stored with each message that was given it."""
    latents: Tensor | None = None
    """[K, d_agent] float32, placed after the agent's prompt; None for a memory without latents."""
    adapter: str | None = None
    """The adapter that the agents speak with, if the memory lies in their weights."""
    composer: str = ""
    """Version of the composer's weights, if it is known."""


@dataclass(frozen=True)
class Recalls(Sequence[Recall]):
    """The recalls for several queries, in their order, and their cost."""

    recalls: Sequence[Recall]
    spent: Spent = Spent()

    @overload
    def __getitem__(self, index: int) -> Recall: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Recall]: ...
    def __getitem__(self, index: int | slice) -> Recall | Sequence[Recall]:
        return self.recalls[index]

    def __len__(self) -> int:
        return len(self.recalls)


class Memory(Protocol):
    """The interface of all memories."""

    @property
    def kind(self) -> str:
        """The memory's name in stored messages: none, text, latent or another."""

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Return what each role should remember for its task, in the order of the queries.

        The recall of one query does not depend on the others. Trajectories of the same task are never used.
        """

    def add(self, trajectory: Trajectory) -> None:
        """Let the memory learn from an episode."""


def recall_one(memory: Memory, task: Task, role: Role) -> Recall:
    """Return what a memory gives one role for one task."""
    return memory.recall_many([(task, role)])[0]


class NoMemory:
    """A memory that remembers nothing."""

    kind = "none"

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Return empty recalls."""
        return Recalls([Recall(Recalled(kind=self.kind)) for _ in queries])

    def add(self, trajectory: Trajectory) -> None:
        """Keep nothing."""


def describe(trajectory: Trajectory, words: MemorySection = MemorySection()) -> str:  # noqa: B008 - it is frozen
    """Write a trajectory as text: the task, each action with its observation, and the outcome."""
    lines = [fill(words.task, task=trajectory.task.text.strip())]
    for step in trajectory.steps:
        lines.append(fill(words.step, action=step.action.strip()))
        if step.observation.strip():
            lines.append(fill(words.reply, observation=step.observation.strip()))
    lines.append(words.solved if trajectory.success else words.unsolved)
    return "\n".join(line for line in lines if line)


def tell(found: Sequence[Trajectory], words: MemorySection) -> str:
    """Write past episodes as the text that stands before the user's; return an empty text if there are none."""
    return fill(words.text, memory="\n\n".join(describe(trajectory, words) for trajectory in found)) if found else ""


def said_by(trajectory: Trajectory, role: Role) -> str:
    """Return what one role said in a trajectory, turn by turn; an empty text if it said nothing."""
    return "\n".join(message.response.strip() for message in trajectory.messages if message.role == role.name)
