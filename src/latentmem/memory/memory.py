"""What a memory is to a team: something asked, before an episode, what one role should remember for one task.

Whatever is recalled is kept as text too (`Recall.record`), and that text is written here, once, for text memories and
for the composer alike: what rollouts were given and what training composes again cannot drift apart.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

from torch import Tensor

from latentmem.config import MemorySection
from latentmem.templates import fill
from latentmem.trajectory import Recalled, Role, Task, Trajectory


@dataclass(frozen=True)
class Spent:
    """What a memory has had language models read and write, the composer among them."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    """Latents are none."""
    num_malformed: int = 0
    """Replies, or lines of them, that could not be used."""

    def __add__(self, other: Self) -> Self:
        return replace(
            self,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            num_malformed=self.num_malformed + other.num_malformed,
        )


@dataclass
class Ledger:
    """Where all that serve one memory write down what they spend."""

    num_asked: int = 0
    """Prompts that were answered or rated."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_shortened: int = 0
    """Episodes that did not fit a prompt whole."""
    malformed: Counter[str] = field(default_factory=Counter)
    """Replies, or lines of them, that could not be used, by what was wrong with them."""

    def spent(self, since: Spent = Spent()) -> Spent:
        """Everything so far, or what came since then."""
        return Spent(
            self.prompt_tokens - since.prompt_tokens,
            self.generated_tokens - since.generated_tokens,
            self.malformed.total() - since.num_malformed,
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
    spent: Spent = Spent()
    """On making it. What recalls were made for together stands with the first of them."""


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


def tell(found: Sequence[Trajectory], words: MemorySection) -> str:
    """Past episodes as what stands before the user's text; empty where there are none."""
    return fill(words.text, memory="\n\n".join(describe(trajectory, words) for trajectory in found)) if found else ""


def charge(recalls: Sequence[Recall], spent: Spent) -> list[Recall]:
    """The recalls, what was spent on them together written down with the first."""
    return [replace(recall, spent=spent) if i == 0 else recall for i, recall in enumerate(recalls)]


def said_by(trajectory: Trajectory, role: Role) -> str:
    """What one role said in a trajectory, turn by turn; empty where it had no part."""
    return "\n".join(message.response.strip() for message in trajectory.messages if message.role == role.name)
