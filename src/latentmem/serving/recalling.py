"""The memories while serving: what one role is given for one call, and how long that took.

What is recalled is searched for anew for each call, so it follows the bank; latents are composed once for each role,
task, set of trajectories and checkpoint. When something is deleted from the bank, all that was kept goes, and what was
being made of it meanwhile is made again.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from latentmem.bank import ExperienceBank
from latentmem.config import BankSection, MemorySection, default
from latentmem.errors import ConfigError
from latentmem.memory.composer import Composer
from latentmem.memory.framed import framed
from latentmem.memory.memory import Recall
from latentmem.memory.retrieval import Rate, best_rated
from latentmem.serving.asks import Refused, Timings
from latentmem.serving.following import Following
from latentmem.serving.kept import KeptRecalls
from latentmem.trajectory import Recalled, Role, Task, Trajectory

logger = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20
"""Most bytes of latents that are kept."""
_TRIES = 4
"""How often a recall is made again because the bank lost something meanwhile."""


@dataclass(frozen=True)
class Remembered:
    """What a memory gave for one call."""

    recall: Recall
    timings: Timings = field(default_factory=Timings)
    """Of these, `recall` and `composing`."""
    similarities: tuple[float, ...] = ()
    """How similar each source's task is to this one, in the order of `recall.record.sources`."""


@dataclass(frozen=True)
class Searching:
    """How the bank is searched."""

    num_retrieved: int = default(BankSection, "num_retrieved")
    only_successes: bool = default(BankSection, "only_successes")
    rate: Rate | None = None
    """Chooses among twice as many; it is asked by one thread at a time."""


class Recaller:
    """Recalls for the calls that are served; many threads may ask."""

    def __init__(
        self,
        memory: str,
        bank: ExperienceBank | None,
        latent: Mapping[str, Following],
        count: Callable[[str], int],
        *,
        text_budget: int,
        choices: Sequence[str] = (),
        searching: Searching = Searching(),
        words: MemorySection = MemorySection(),  # noqa: B008 - it is frozen
        kept_bytes: int = KEPT_BYTES,
        refresh_seconds: float | None = 2.0,
    ) -> None:
        """Take the memories that may be asked for, and begin to look for new checkpoints.

        Args:
            memory: the memory of calls that ask for none: `none`, `text`, or a name in `latent`.
            bank: searched; None if nothing but `none` is served.
            latent: the composers of latent memories, by name.
            count: number of tokens of a text.
            text_budget: most tokens of a memory that is text.
            choices: the memories that a call may ask for.
            searching: how the bank is searched.
            words: how episodes are told as text.
            kept_bytes: most bytes of latents that are kept.
            refresh_seconds: how often it is looked for new checkpoints; None: only when `refresh` is called.
        """
        self.memory = memory
        self.bank = bank
        self._latent = latent
        self._count = count
        self._budget = text_budget
        self._choices = {*choices, memory}
        self._searching = searching
        self._rating = threading.Lock()
        self._words = words
        self._secret = secrets.token_bytes(16)
        self.kept = KeptRecalls(kept_bytes)
        """The latents that were composed lately."""
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        if latent and refresh_seconds is not None:
            self._watcher = threading.Thread(
                target=self._watch, args=(refresh_seconds,), name="checkpoints", daemon=True
            )
            self._watcher.start()

    def __call__(self, memory: str | None, task: Task, role: Role, tenants: Sequence[str]) -> Remembered:
        """Return what a role should remember for its task.

        Args:
            memory: the memory that the call asks for; None: the server's.
            task: what the episode is about; trajectories of the same task are never used.
            role: who asks.
            tenants: whose episodes may be recalled.

        Raises:
            Refused: the call may not choose this memory, or there is none of that name.
            BankError: the bank cannot be read.
        """
        name = self.memory if memory is None else memory
        if name not in self._choices:
            known = ", ".join(map(repr, sorted(self._choices)))
            raise Refused(400, f"latentmem.memory: {name!r} is not served here; there is {known}", "latentmem.memory")
        if name == "none":
            return Remembered(Recall(Recalled(kind="none")))
        assert self.bank is not None
        for _ in range(_TRIES):
            state = self.bank.generation()
            self.kept.at(state)
            given = (
                self._text(task, role, tenants) if name == "text" else self._latents(name, task, role, tenants, state)
            )
            if self.bank.generation() == state:
                return given
        raise Refused(503, "the bank loses episodes again and again; send the request again", retry_after=1.0)

    def refresh(self) -> bool:
        """Take up new checkpoints, and return whether there was any."""
        return sum(following.refresh() for following in self._latent.values()) > 0

    def versions(self) -> dict[str, str]:
        """Return the version of each latent memory's weights, by its name."""
        return {name: following.digest for name, following in self._latent.items()}

    # What was recalled earlier

    def again(self, record: Recalled, composer: str) -> Recall | None:
        """Return a recall as it was, from its record; None if no memory of its kind is served.

        Args:
            record: what was stored of it.
            composer: version of the weights that composed; if these are not served any more, others compose.
        """
        if not record.num_latents:
            return Recall(record)
        following = self._following(composer)
        if following is None:
            return None
        with following.version() as version:
            return Recall(record, version.compose(record.text), composer=version.digest)

    def made_of(
        self, kind: str, composer: str, task: Task, role: Role, trajectories: Sequence[Trajectory]
    ) -> Recall | None:
        """Return the recall of a role at a task, made of these trajectories; None if no such memory is served.

        Args:
            kind: `text` or `latent`.
            composer: as in `again`.
            task: what the episode is about.
            role: who asks.
            trajectories: best first.
        """
        if kind == "text":
            text, told = framed(trajectories, role, self._words, self._budget, self._count, self._secret)
            return Recall(Recalled(kind="text", text=text, sources=tuple(trajectory.id for trajectory in told)))
        following = self._following(composer)
        if following is None:
            return None
        with following.version() as version:
            text = version.composer.prompt(task, role, trajectories)
            ids = tuple(trajectory.id for trajectory in trajectories)
            record = Recalled(kind="latent", text=text, sources=ids, num_latents=version.composer.num_latents)
            return Recall(record, version.compose(text), composer=version.digest)

    def num_kept_of(self, sources: Collection[str]) -> int:
        """Return how many kept recalls that were made of any of these trajectories would still be given."""
        if self.bank is not None:
            self.kept.at(self.bank.generation())
        return self.kept.num_made_of(sources)

    def _following(self, composer: str) -> Following | None:
        followings = [*self._latent.values()]
        same = [following for following in followings if following.digest == composer]
        return next(iter(same or followings), None)

    def close(self) -> None:
        """Look for no more checkpoints, and take the composers off their backbones."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()
        for following in self._latent.values():
            following.close()

    def _watch(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            try:
                self.refresh()
            except Exception:  # the weights in use are as good as before
                logger.exception("looking for new checkpoints failed")

    def _found(self, task: Task, tenants: Sequence[str]) -> list[tuple[Trajectory, float]]:
        """Search, and return trajectories with their similarities, best first."""
        assert self.bank is not None
        how = self._searching
        k = how.num_retrieved if how.rate is None else 2 * how.num_retrieved
        success = True if how.only_successes else None
        (hits,) = self.bank.search_many([task], k=k, success=success, tenants=tenants)
        similarity = {hit.trajectory.id: hit.similarity for hit in hits}
        found = [hit.trajectory for hit in hits]
        if how.rate is not None:
            with self._rating:
                found = best_rated(how.rate, [task], {task.key: found}, how.num_retrieved)[task.key]
        return [(trajectory, similarity[trajectory.id]) for trajectory in found]

    def _text(self, task: Task, role: Role, tenants: Sequence[str]) -> Remembered:
        began = time.perf_counter()
        found = self._found(task, tenants)
        text, told = framed(
            [trajectory for trajectory, _ in found], role, self._words, self._budget, self._count, self._secret
        )
        sources = tuple(trajectory.id for trajectory in told)
        similarities = tuple(similarity for trajectory, similarity in found if trajectory.id in sources)
        record = Recalled(kind="text", text=text, sources=sources)
        return Remembered(Recall(record), Timings(recall=time.perf_counter() - began), similarities)

    def _latents(self, name: str, task: Task, role: Role, tenants: Sequence[str], state: str) -> Remembered:
        began = time.perf_counter()
        found = self._found(task, tenants)
        ids = tuple(trajectory.id for trajectory, _ in found)
        with self._latent[name].version() as version:
            key = (version.digest, name, role.name, role.profile, task.text, ids)
            recall = self.kept.get(key)
            searched = composed = time.perf_counter()
            if recall is None:
                composer = version.composer
                text = composers_text(composer, task, role, [trajectory for trajectory, _ in found])
                record = Recalled(kind="latent", text=text, sources=ids, num_latents=composer.num_latents)
                searched = time.perf_counter()
                recall = Recall(record, version.compose(text), composer=version.digest)
                composed = time.perf_counter()
                self.kept.put(key, recall, state)
        timings = Timings(recall=searched - began, composing=composed - searched)
        return Remembered(recall, timings, tuple(similarity for _, similarity in found))


def composers_text(composer: Composer, task: Task, role: Role, found: Sequence[Trajectory]) -> str:
    """Return the text to compose from; the task and the role's profile are cut where they are too long for it.

    A program's first message may hold a whole document, and a system message many pages.
    """
    try:
        return composer.prompt(task, role, found)
    except ConfigError:
        limit = composer.max_prompt_tokens // 2
    encode, decode = composer.backbone.encode, composer.backbone.decode
    while True:
        text, profile = (decode(encode(long)[:limit]) for long in (task.text, role.profile))
        shorter = task.model_copy(update={"text": text}), role.model_copy(update={"profile": profile})
        try:
            return composer.prompt(*shorter, found)
        except ConfigError:
            if not limit:
                raise
            limit //= 2
