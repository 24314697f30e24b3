"""The model in this process, asked by many threads: their prompts become one batch that rows join and leave.

A thread of its own samples while there is anything to sample. Every few tokens the prompts that wait are read and join
the rows that run, in turn from each call, so a call of many prompts holds nobody up. A row leaves when it has ended,
and its caller gets it then. The weights are free between two tokens, so a composer on them waits for one token at most.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace

from latentmem.config import Sampling
from latentmem.errors import BusyError, EngineError
from latentmem.models.agent import Prompt, Sampled
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefilling import Kept
from latentmem.models.running import Row, Running

logger = logging.getLogger(__name__)

JOIN_EVERY = 4
"""Tokens between two moments at which prompts join: joining copies what the rows have read, and costs about as much as
one token. As many prompts as rows join at once, so callers that come together soon are one batch."""
GATHER_SECONDS = 0.01
"""How long the first prompt waits for others when nothing runs: read with it, they cost far less than after it."""


class _Place:
    """A prompt that waits or runs."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.since = time.perf_counter()
        self.queue_seconds = 0.0
        self.done: Future[Sampled] = Future()
        self.is_wanted = True


class Batcher:
    """An `AgentModel` in front of a model in this process; many threads may ask it at the same time."""

    concurrent = True

    def __init__(
        self,
        model: LanguageModel,
        max_rows: int | None = None,
        max_waiting: int | None = None,
        kept: Kept | None = None,
    ) -> None:
        """Prepare to sample; no thread is started yet.

        Args:
            model: its own weights sample, whatever its `engine` is.
            max_rows: most rows that run at once; None is the model's `max_batch_size`.
            max_waiting: most prompts that wait for a place; None is no limit. A call with more prompts is taken if
                nothing else waits.
            kept: receives the prompts as the frozen model has read them, and gives them to those that go on from
                them; None is one of its own.
        """
        self.model = model
        self.max_rows = max_rows or model.max_batch_size
        self.max_waiting = max_waiting
        self._kept = kept or Kept()
        self._state = threading.Lock()
        self._waiting: deque[deque[_Place]] = deque()
        """The prompts of each call."""
        self._running: dict[Row, _Place] = {}
        self._thread: threading.Thread | None = None
        """The thread that samples, or the last one that did."""
        self._is_working = False
        self._is_closed = False

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def num_waiting(self) -> int:
        """Number of prompts that wait for a place."""
        with self._state:
            return sum(map(len, self._waiting))

    @property
    def num_running(self) -> int:
        """Number of prompts whose responses are being sampled."""
        return len(self._running)

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        """Sample one response per prompt, in the order of the prompts.

        Raises:
            BusyError: too many prompts wait.
            ModelError: a prompt does not fit the context window, or the model's values are not finite.
            EngineError: the batcher is closed.
        """
        mine = [_Place(self.model.begun(prompt, sampling)) for prompt in prompts]
        if not mine:
            return []
        with self._state:
            self._check(len(mine))
            self._waiting.append(deque(mine))
            if not self._is_working:
                self._is_working = True
                self._thread = threading.Thread(target=self._work, name="batcher")
                self._thread.start()
        try:
            ended, _ = wait([place.done for place in mine], return_when=FIRST_EXCEPTION)
            for done in ended:
                done.result()  # the first failure ends the call
            return [place.done.result() for place in mine]
        finally:
            for place in mine:
                place.is_wanted = False

    def drop_kept(self) -> None:
        """Keep none of the prompts that were read before; what is being sampled goes on."""
        self._kept = Kept(self._kept.positions)

    def close(self) -> None:
        """End all that waits or runs, with an error; returns when the thread has ended."""
        with self._state:
            self._is_closed = True
            thread = self._thread
        if thread is not None:
            thread.join()

    def _check(self, num_new: int) -> None:
        if self._is_closed:
            raise EngineError(f"model {self.name!r} samples no more: it is being shut down")
        num_waiting = sum(map(len, self._waiting))
        if self.max_waiting is not None and num_waiting and num_waiting + num_new > self.max_waiting:
            raise BusyError(
                f"model {self.name!r}: {num_waiting} prompts wait already, of at most {self.max_waiting}; ask again "
                "later, or let more wait"
            )

    # The thread that samples

    def _work(self) -> None:
        running = Running(self.model.model)
        steps = 0
        time.sleep(GATHER_SECONDS)
        while True:
            with self._state:
                if self._is_closed:
                    self._end_all()
                if not self._waiting and not self._running:
                    self._is_working = False
                    return
                adapter = next(iter(self._running)).prompt.adapter if self._running else self._next_adapter()
                num_waiting = sum(map(len, self._waiting))
                is_time = num_waiting >= len(self._running) or steps % JOIN_EVERY == 0
                new = self._take(adapter) if is_time else []
            try:
                with self.model.as_agent(adapter):
                    self._admit(running, new)
                    if running:
                        for row in running.step():
                            self._settle(row)
                unwanted = [row for row, place in self._running.items() if not place.is_wanted]  # looked at once
                running.drop(unwanted)
                for row in unwanted:
                    del self._running[row]
            except Exception as error:
                # Not the fault of one prompt: these have been checked. Memory may have run out, for all of them.
                logger.exception("model %s: a batch of %d failed", self.name, len(self._running) + len(new))
                running = Running(self.model.model)
                for place in [*self._running.values(), *new]:
                    if not place.done.done():
                        place.done.set_exception(error)
                self._running.clear()
            steps += 1

    def _next_adapter(self) -> str | None:
        return self._waiting[0][0].row.prompt.adapter

    def _take(self, adapter: str | None) -> list[_Place]:
        """Take prompts for the places that are free, one from each call in turn, as long as they want this adapter."""
        taken: list[_Place] = []
        while self._waiting and len(self._running) + len(taken) < self.max_rows:
            if self._next_adapter() != adapter:
                break
            call = self._waiting.popleft()
            place = call.popleft()
            if call:
                self._waiting.append(call)
            if place.is_wanted:
                taken.append(place)
        return taken

    def _admit(self, running: Running, new: Sequence[_Place]) -> None:
        """Read prompts, and let them join; those with latents of one shape are read together."""
        kinds: dict[int, list[_Place]] = {}
        for place in new:
            kinds.setdefault(place.row.num_latents, []).append(place)
        for places in kinds.values():
            try:
                self._read(running, places)
            except Exception as error:
                if len(places) == 1:
                    places[0].done.set_exception(error)
                    continue
                for place in places:
                    self._admit(running, [place])

    def _read(self, running: Running, places: Sequence[_Place]) -> None:
        rows = [place.row for place in places]
        for place in places:
            place.queue_seconds = time.perf_counter() - place.since
        adapter = rows[0].prompt.adapter
        with self.model.as_agent(adapter) as reader:
            kept = self._kept if adapter is None else None
            running.join(rows, self.model.read(rows, reader, kept, whole=True))
        self._running.update(zip(rows, places, strict=True))

    def _settle(self, row: Row) -> None:
        """Hand over the response of a row that has ended, or what failed in it."""
        place = self._running.pop(row)
        try:
            place.done.set_result(replace(self.model.sampled(row), queue_seconds=place.queue_seconds))
        except Exception as error:
            place.done.set_exception(error)

    def _end_all(self) -> None:
        closed = EngineError(f"model {self.name!r} samples no more: it is being shut down")
        for place in [*(place for call in self._waiting for place in call), *self._running.values()]:
            place.done.set_exception(closed)
        self._waiting.clear()
        self._running.clear()
