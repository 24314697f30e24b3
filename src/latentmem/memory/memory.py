"""What a memory is to a team: something asked, before an episode, what one role should remember for one task.

Whatever is recalled is kept as text too (`Recall.record`), and that text is written here, once, for text memories and
for the composer alike: what rollouts were given and what training composes again cannot drift apart.
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
    """What recalling or learning took: what language models read and wrote for it, the composer among them."""

    num_asked: int = 0
    """Prompts that were answered or rated."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    """Latents are none."""
    num_shortened: int = 0
    """Episodes that did not fit a prompt whole."""
    malformed: Mapping[str, int] = field(default_factory=dict)
    """Replies, or lines of them, that could not be used, by what was wrong with them."""
    composing_seconds: float = 0.0
    """Time in the memory's own networks, as opposed to searching; of wall clock."""

    @property
    def num_malformed(self) -> int:
        """Replies, or lines of them, that could not be used."""
        return sum(self.malformed.values())

    def __add__(self, other: Self) -> Self:
        return self._with(other, 1)

    def __sub__(self, earlier: Self) -> Self:
        """What was spent since an earlier sum."""
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
    """As it is stored with each message that was given it."""
    latents: Tensor | None = None
    """[K, d_agent] float32, placed after the agent's prompt; None for memories made of text."""
    adapter: str | None = None
    """The adapter that the agents speak with, where what is remembered lies in their weights."""


@dataclass(frozen=True)
class Recalls(Sequence[Recall]):
    """What was recalled for several queries, in their order, and what that took."""

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
    """The seam behind which all memories stand."""

    @property
    def kind(self) -> str:
        """Its name in stored messages: none, text, latent."""

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """What each role should remember for its task, in the order of the queries.

        What is recalled for a query does not depend on the others. Trajectories of the very task are never used.
        """

    def add(self, trajectory: Trajectory) -> None:
        """Let the memory learn from an episode."""


def recall_one(memory: Memory, task: Task, role: Role) -> Recall:
    """What a memory gives one role for one task."""
    return memory.recall_many([(task, role)])[0]


class NoMemory:
    """Remembers nothing."""

    kind = "none"

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Empty recalls."""
        return Recalls([Recall(Recalled(kind=self.kind)) for _ in queries])

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


def tell(found: Sequence[Trajectory], words: MemorySection) -> str:
    """Past episodes as what stands before the user's text; empty where there are none."""
    return fill(words.text, memory="\n\n".join(describe(trajectory, words) for trajectory in found)) if found else ""


def said_by(trajectory: Trajectory, role: Role) -> str:
    """What one role said in a trajectory, turn by turn; empty where it had no part."""
    return "\n".join(message.response.strip() for message in trajectory.messages if message.role == role.name)
