"""Memories that learn: their notes, which a language model makes of a bank, are one JSON file and can be made again.

The bank stays authoritative. A method decides what is learned from a batch of trajectories and what is told of it. This
file decides when and in what order, for all methods alike: trajectories in the order they were stored, each once, and
the notes replaced as a whole after each batch. A process that was killed goes on with the missing batch and ends with
the same notes. A language model's reply is untrusted text: it is parsed leniently and never makes the memory fail;
what cannot be used is counted in the file.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from latentmem.bank import Embed, ExperienceBank
from latentmem.config import RivalsSection, Sampling
from latentmem.errors import RunError
from latentmem.files import read_json, write_atomic
from latentmem.memory.memory import Recall, Recalls, Spent
from latentmem.models.agent import AgentModel, Prompt
from latentmem.parsing import Form, checked
from latentmem.trajectory import Recalled, Role, Task, Trajectory

logger = logging.getLogger(__name__)

DEFAULTS = RivalsSection()

NOTES_VERSION = 1
"""Version of the file; any other version is refused."""

Notes = dict[str, Any]
"""What a method has learned, as plain JSON values."""

EPISODE_WORDS = {"task", "step", "reply", "solved", "unsolved"}
"""Those of the configured words about past episodes that affect what is learned."""

_DECIMALS = 6
"""Decimals of a similarity. Batched arithmetic is off in the seventh, and equal texts must be equally near."""


class _Costs(Form):
    num_asked: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    num_shortened: int
    malformed: dict[str, int]


class _Learned(Form):
    """What is relied on in the file, whatever the method."""

    learned: tuple[str, ...]
    costs: _Costs


class Method(Protocol):
    """A way to learn from episodes and to tell what was learned."""

    @property
    def kind(self) -> str:
        """The method's name in stored messages."""

    @property
    def form(self) -> type[Form]:
        """What the method relies on in its notes; checked when they are read from the file."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the notes depend on except the bank, as plain JSON values."""

    @property
    def spent(self) -> Spent:
        """The cost of learning and recalling so far."""

    def begin(self) -> Notes:
        """Return empty notes."""

    def learn(self, notes: Notes, episodes: Sequence[Trajectory]) -> None:
        """Extend the notes by the episodes that were stored next."""

    def recall(self, notes: Notes, bank: ExperienceBank, queries: Sequence[tuple[Task, Role]]) -> list[Recalled]:
        """Return what each role should remember for its task; nothing comes from a trajectory of the task itself."""


class LearnedMemory:
    """A memory made of a bank, a method, and the file of what the method has learned from the bank."""

    def __init__(self, bank: ExperienceBank, method: Method, path: Path, batch_size: int = DEFAULTS.batch_size) -> None:
        """Read the notes, if there are any.

        Args:
            bank: what is learned from and searched.
            method: learns and tells.
            path: the file of the notes; only one process may `learn` into it.
            batch_size: number of trajectories learned from between two saves.

        Raises:
            RunError: the file is damaged, of another version, or of another memory.
        """
        self.bank = bank
        self.method = method
        self.path = path
        self.batch_size = batch_size
        self._read()

    @property
    def kind(self) -> str:
        """The method's kind."""
        return self.method.kind

    @property
    def digest(self) -> str:
        """A hash of everything that recalls depend on; equal for equal notes."""
        content = [_plain(self.method.settings), self.learned, self.notes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def learn(self, on_progress: Callable[[int], object] = lambda num_learned: None) -> None:
        """Learn from the trajectories of the bank that the notes lack, batch by batch; each batch is saved at once.

        If another process has already updated the notes, they are read, and nothing is left to do. If the settings have
        changed, or learned trajectories are no longer in the bank, the notes are made again, with a warning.

        Args:
            on_progress: called after each batch with the number of trajectories learned from.

        Raises:
            RunError: the notes cannot be read or written; notes on disk are kept.
        """
        outdated = self._read()
        ids = self.bank.ids()
        if not outdated and self.learned != ids[: len(self.learned)]:
            outdated = "trajectories that are not, or not so, in the bank"
        if outdated:
            logger.warning("%s: made with %s; it is made again", self.path, outdated)
            self._begin()
        for start in range(len(self.learned), len(ids), self.batch_size):
            batch = ids[start : start + self.batch_size]
            began, before = time.perf_counter(), self.method.spent
            self.method.learn(self.notes, self.bank.get(batch))
            self.learned += batch
            self._add_costs(self.method.spent - before, time.perf_counter() - began)
            self._save()
            on_progress(len(self.learned))

    def recall_many(self, queries: Sequence[tuple[Task, Role]]) -> Recalls:
        """Ask the method once for all queries; the notes do not change."""
        before = self.method.spent
        records = self.method.recall(self.notes, self.bank, queries)
        return Recalls([Recall(record) for record in records], self.method.spent - before)

    def add(self, trajectory: Trajectory) -> None:
        """Store the trajectory in the bank and learn from it."""
        self.bank.add(trajectory)
        self.learn()

    def _begin(self) -> None:
        self.learned: list[str] = []
        """Ids of the trajectories learned from, in the order of the bank."""
        self.notes = self.method.begin()
        self.costs: dict[str, Any] = {
            "num_asked": 0, "prompt_tokens": 0, "generated_tokens": 0, "seconds": 0.0, "num_shortened": 0,
            "malformed": {},
        }  # fmt: skip
        """The cost of learning; the cost of recalling is stored with the recalls."""

    def _read(self) -> str:
        """Load the notes from the file; return why its content cannot be used, or an empty text."""
        self._begin()
        if not self.path.exists():
            return ""
        found = read_json(self.path)
        remedy = "remove the file, and it is made again from the bank"
        if found.get("version") != NOTES_VERSION:
            raise RunError(
                f"{self.path}: version {found.get('version')!r} of a memory's notes; this version of latentmem reads "
                f"{NOTES_VERSION}; {remedy}"
            )
        if found.get("memory") != self.kind:
            raise RunError(f"{self.path}: notes of memory {found.get('memory')!r}, expected {self.kind!r}; {remedy}")
        if found.get("settings") != _plain(self.method.settings):
            return "other settings"
        try:
            checked(found, _Learned)
            checked(found.get("notes"), self.method.form)
        except ValueError as error:
            raise RunError(f"{self.path}: damaged ({error}); {remedy}") from None
        self.learned, self.notes, self.costs = found["learned"], found["notes"], found["costs"]
        return ""

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "version": NOTES_VERSION,
            "memory": self.kind,
            "settings": _plain(self.method.settings),
            "costs": self.costs,
            "learned": self.learned,
            "notes": self.notes,
        }
        write_atomic(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _add_costs(self, spent: Spent, seconds: float) -> None:
        for key in ("num_asked", "prompt_tokens", "generated_tokens", "num_shortened"):
            self.costs[key] += getattr(spent, key)
        self.costs["seconds"] += seconds
        for reason, count in spent.malformed.items():
            self.costs["malformed"][reason] = self.costs["malformed"].get(reason, 0) + count


class Scribe:
    """A language model that writes for a memory: greedily, with all prompts of one kind at once."""

    def __init__(
        self,
        model: AgentModel,
        max_response_tokens: int = DEFAULTS.max_response_tokens,
        max_episode_characters: int = DEFAULTS.max_episode_characters,
    ) -> None:
        self.model = model
        self.sampling = Sampling(temperature=0, max_response_tokens=max_response_tokens)
        self.max_episode_characters = max_episode_characters
        self.spent = Spent()
        """The cost of the replies so far."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that the replies depend on except the prompts."""
        return {
            "model": self.model.name,
            "temperature": self.sampling.temperature,
            "max_response_tokens": self.sampling.max_response_tokens,
            "max_episode_characters": self.max_episode_characters,
        }

    def ask(self, what: str, system: str, texts: Sequence[str]) -> list[str]:
        """Return the reply to each text, in their order, without surrounding blanks; a reply may be empty.

        Args:
            what: names the kind of prompt; a `ScriptedModel` finds its responses by it.
            system: the system prompt of all texts.
            texts: the user's messages.

        Raises:
            ModelError: a prompt does not fit the context window.
        """
        prompts = [
            Prompt(role=what, system=system, user=text, group=f"asked by a memory, {what}", seed=0) for text in texts
        ]
        sampled = self.model.respond(prompts, self.sampling) if prompts else []
        self.spent += Spent(
            num_asked=len(prompts),
            prompt_tokens=sum(reply.num_prompt_tokens for reply in sampled),
            generated_tokens=sum(len(reply.token_ids) for reply in sampled),
        )
        return [reply.text.strip() for reply in sampled]

    def shorten(self, episode: str) -> str:
        """Shorten the text of an episode for a prompt: keep the beginning and the end of a long one."""
        half = self.max_episode_characters // 2
        if len(episode) <= self.max_episode_characters:
            return episode
        self.spent += Spent(num_shortened=1)
        return f"{episode[:half]}\n[...]\n{episode[len(episode) - half :]}"

    def note_malformed(self, counts: Mapping[str, int]) -> None:
        """Count replies, or lines of replies, that could not be used, by reason."""
        self.spent += Spent(malformed=counts)


class Similarity:
    """A function that gives cosines between the embeddings of texts; each text is embedded once."""

    def __init__(self, embed: Embed) -> None:
        self.embed = embed
        self._known: dict[str, npt.NDArray[np.float64]] = {}

    def __call__(self, texts: Sequence[str], others: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return cosines [n, N] of n texts and N others, in millionths; equal texts are equally near to anything."""
        if not texts or not others:
            return np.empty((len(texts), len(others)))
        cosines: npt.NDArray[np.float64] = np.round(self._vectors(texts) @ self._vectors(others).T, _DECIMALS)
        return cosines

    def _vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            rows = np.asarray(self.embed(new), dtype=np.float64)
            self._known |= zip(new, rows / np.linalg.norm(rows, axis=1, keepdims=True), strict=True)
        return np.stack([self._known[text] for text in texts])


def failures_too(success: bool | None) -> dict[str, Any]:
    """Return what the settings of notes add if failures are learned from too; nothing if only successes are.

    >>> failures_too(None), failures_too(True)
    ({'only_successes': False}, {})
    """
    return {} if success else {"only_successes": False}


def _plain(settings: Mapping[str, Any]) -> Any:
    """Return the settings as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(settings))
