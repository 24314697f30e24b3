"""A model that serves one caller at a time, behind a door for many: whoever comes meanwhile is in the next batch."""

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from threading import Lock

from latentmem.models.agent import Prompt, Sampled
from latentmem.rollout.turns import Ask


class Gathering:
    """A function that many threads may call, over one that a single thread may call."""

    def __init__(self, ask: Ask, alone: AbstractContextManager[object]) -> None:
        """Take the function, and a lock that is held while it is called."""
        self.ask = ask
        self._alone = alone
        self._noting = Lock()
        self._waiting: list[tuple[Sequence[Prompt], Future[list[Sampled]]]] = []

    def __call__(self, prompts: Sequence[Prompt]) -> list[Sampled]:
        """Return the responses to these prompts."""
        mine: Future[list[Sampled]] = Future()
        with self._noting:
            self._waiting.append((prompts, mine))
        with self._alone:
            if not mine.done():
                with self._noting:
                    batch, self._waiting = self._waiting, []
                self._serve(batch)
        return mine.result()

    def _serve(self, batch: Sequence[tuple[Sequence[Prompt], Future[list[Sampled]]]]) -> None:
        everything = [(prompt, number) for number, (prompts, _) in enumerate(batch) for prompt in prompts]
        # Rows of one role and task stand side by side, because their prompts begin alike.
        everything.sort(key=lambda row: row[0].group)
        try:
            responses = self.ask([prompt for prompt, _ in everything])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for one in batch:  # the mistake of one is not that of the others
                self._serve([one])
            return
        by_prompt = {id(prompt): sampled for (prompt, _), sampled in zip(everything, responses, strict=True)}
        for prompts, answered in batch:
            answered.set_result([by_prompt[id(prompt)] for prompt in prompts])
