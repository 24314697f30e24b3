"""What a bank tells about itself, about a search, and about what became of what it was given."""

from collections import Counter
from dataclasses import dataclass

from latentmem.bank.records import Problem
from latentmem.trajectory import Trajectory


@dataclass(frozen=True)
class AddReport:
    """What became of a batch."""

    num_added: int
    num_duplicates: int
    """Same task, messages and observations as one in the bank or earlier in the batch; stored once."""


@dataclass(frozen=True)
class Found:
    """A search result."""

    trajectory: Trajectory
    similarity: float
    """Cosine between the embeddings of the two task texts."""


@dataclass(frozen=True)
class BankInfo:
    """What a bank holds. The mappings count trajectories by name, names in order."""

    path: str
    schema_version: int
    created: str
    """Date and time in UTC, ISO 8601."""
    embedder: str | None
    """None until the first trajectory is stored, as is `width`."""
    width: int | None
    """e, of the embeddings."""
    num_bytes: int
    """On disk: records, write-ahead log, index and lists."""
    num_trajectories: int
    num_successes: int
    mean_reward: float | None
    domains: dict[str, int]
    teams: dict[str, int]
    models: dict[str, int]
    roles: dict[str, int]


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` looked at and found."""

    num_checked: int
    """Records that could be looked at; all there are, unless the database file itself is damaged."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def counts(self) -> dict[str, int]:
        """Number of problems of each kind that occurred."""
        return dict(Counter(problem.kind for problem in self.problems))
