"""A composer that follows its checkpoints: a new one is taken up while the server runs.

The new weights are loaded into a second composer, then the two change places. Who composes with the old one ends with
it; then it goes. A checkpoint that cannot be used leaves the old composer in its place, with one warning.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from latentmem.errors import CheckpointError, LatentMemError
from latentmem.memory.checkpoints import weights_file
from latentmem.memory.composer import Composer
from latentmem.models.turns import InTurn

logger = logging.getLogger(__name__)

_TRIES = 5
"""How often a checkpoint is read that is replaced meanwhile."""


@dataclass(eq=False)
class Version:
    """A composer with the weights of one checkpoint."""

    composer: Composer
    digest: str
    """Hash of the checkpoint's file; `untrained` without one."""
    batch_size: int
    num_users: int = 0
    is_replaced: bool = False
    _waiting: list[tuple[str, Future[Tensor]]] = field(default_factory=list)
    _state: threading.Lock = field(default_factory=threading.Lock)
    _turn: InTurn = field(default_factory=InTurn)

    def compose(self, text: str) -> Tensor:
        """Compose latents [K, d_agent] from a text; those that wait are composed together, by whoever comes first.

        Raises:
            ModelError: the text does not fit the composer's window.
        """
        mine: Future[Tensor] = Future()
        with self._state:
            self._waiting.append((text, mine))
        with self._turn:
            if not mine.done():
                self._compose_waiting(mine)
        return mine.result()

    def _compose_waiting(self, mine: "Future[Tensor]") -> None:
        with self._state:
            place = next(i for i, (_, asked) in enumerate(self._waiting) if asked is mine)
            first = max(0, place + 1 - self.batch_size)
            batch = self._waiting[first : first + self.batch_size]
            del self._waiting[first : first + self.batch_size]
        texts = list(dict.fromkeys(text for text, _ in batch))
        try:
            composed = dict(zip(texts, self._composed(texts), strict=True))
        except Exception as error:
            if len(batch) == 1:
                mine.set_exception(error)
                return
            for text, asked in batch:  # one that fails fails alone
                try:
                    asked.set_result(self._composed([text])[0])
                except Exception as own:
                    asked.set_exception(own)
            return
        for text, asked in batch:
            asked.set_result(composed[text])

    @torch.no_grad()
    def _composed(self, texts: Sequence[str]) -> list[Tensor]:
        latents = self.composer.compose(list(texts))
        if latents.is_cuda:
            torch.cuda.synchronize()  # else the composer's time would count as the agents'
        return [row.clone() for row in latents]  # a view would keep all of them


class Following:
    """The composer of one latent memory, with the weights of the checkpoint that counts now."""

    def __init__(
        self,
        current: Callable[[], Path | None],
        load: Callable[[Path | None], Composer],
        batch_size: int = 8,
    ) -> None:
        """Load the first weights.

        Args:
            current: returns the folder of the checkpoint that counts now; None: the composer stays untrained.
            load: makes a composer with the weights in a folder.
            batch_size: texts composed at once.

        Raises:
            CheckpointError: there is no checkpoint, or it cannot be used.
        """
        self._current = current
        self._load = load
        self._batch_size = batch_size
        self._state = threading.Lock()
        self._loading = threading.Lock()
        folder = current()
        self._seen: object = _signature(folder)
        self._version = self._loaded(folder)

    @property
    def digest(self) -> str:
        """Version of the weights that compose now."""
        return self._version.digest

    @contextmanager
    def version(self) -> Iterator[Version]:
        """Yield the composer that counts now; it stays usable in the block, even if it is replaced meanwhile."""
        with self._state:
            held = self._version
            held.num_users += 1
        try:
            yield held
        finally:
            with self._state:
                held.num_users -= 1
                is_over = held.is_replaced and not held.num_users
            if is_over:
                held.composer.detach()

    def refresh(self) -> bool:
        """Take up a new checkpoint if there is one that can be used, and return whether that was so."""
        with self._loading:
            try:
                folder = self._current()
            except LatentMemError as error:
                return self._stays(str(error), error)
            found = _signature(folder)
            if found == self._seen:
                return False
            if folder is None:
                return self._stays(found, CheckpointError("there is no checkpoint any more"))
            try:
                new = self._loaded(folder)
            except LatentMemError as error:
                return self._stays(found, error)
            self._seen = found
            with self._state:
                old, self._version = self._version, new
                old.is_replaced = True
                is_over = not old.num_users
            if is_over:
                old.composer.detach()
            logger.info("%s: composes from now on (version %s)", folder, new.digest[:12])
            return True

    def _stays(self, seen: object, error: LatentMemError) -> bool:
        """Keep the composer there is; warn once."""
        if seen != self._seen:
            logger.warning("the composer stays as it is: %s", error)
        self._seen = seen
        return False

    def close(self) -> None:
        """Take the composer off its backbone."""
        with self._state:
            held = self._version
            held.is_replaced = True
            is_over = not held.num_users
        if is_over:
            held.composer.detach()

    def _loaded(self, folder: Path | None) -> Version:
        """Load a checkpoint whose file is the same before and after."""
        if folder is None:
            return Version(self._load(None), "untrained", self._batch_size)
        for _ in range(_TRIES):
            digest = _digest(folder)
            composer = self._load(folder)
            if _digest(folder) == digest:
                return Version(composer, digest, self._batch_size)
            composer.detach()
        raise CheckpointError(f"{weights_file(folder)}: is replaced again and again while it is read")


def _signature(folder: Path | None) -> object:
    """Return what changes when a checkpoint does: the folder, and the time and size of its file."""
    if folder is None:
        return None
    try:
        found = weights_file(folder).stat()
    except OSError:
        return (str(folder), 0, 0)
    return (str(folder), found.st_mtime_ns, found.st_size)


def _digest(folder: Path) -> str:
    path = weights_file(folder)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
