"""Reports of a bank: what it holds, what a search found, what was added, and what a check found."""

from collections import Counter
from dataclasses import dataclass

from latentmem.bank.tables import Problem
from latentmem.trajectory import Trajectory


@dataclass(frozen=True)
class AddReport:
    """The result of adding a batch."""

    num_added: int
    num_duplicates: int
    """Trajectories with the same task, messages and observations as one in the bank or earlier in the batch."""


@dataclass(frozen=True)
class Found:
    """A search result."""

    trajectory: Trajectory
    similarity: float
    """Cosine of the angle between the embeddings of the two task texts."""


@dataclass(frozen=True)
class BankInfo:
    """What a bank holds. The mappings count trajectories by name, in the order of names."""

    path: str
    schema_version: int
    created: str
    """Date and time in UTC, ISO 8601."""
    embedder: str | None
    """None until the first trajectory is stored; the same holds for `width`."""
    width: int | None
    """e, the number of dimensions of the embeddings."""
    num_bytes: int
    """Bytes on disk: records, write-ahead log, index and lists."""
    num_trajectories: int
    num_successes: int
    mean_reward: float | None
    domains: dict[str, int]
    teams: dict[str, int]
    models: dict[str, int]
    roles: dict[str, int]
    tenants: dict[str, int]
    """The empty name is the common pool."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` checked and found."""

    num_checked: int
    """Number of records that could be read; all of them, unless the database file itself is damaged."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def counts(self) -> dict[str, int]:
        """Number of problems of each kind that was found."""
        return dict(Counter(problem.kind for problem in self.problems))
