"""One admitted request from its first token to its answer; whatever happens, the turn learns how it ended.

Choices are sampled in threads. What they say comes to the event loop through a queue. A turn is answered only after all
of it is kept. When the client goes away, or a choice fails, the others are told that nobody waits, and the turn is
lost.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from functools import partial

from starlette.requests import Request

from latentmem.models.chat_forms import begun_call
from latentmem.models.conversations import names_of
from latentmem.serving.asks import Answer, Ask, Choice, Refused, Spoken, Timings, Turn
from latentmem.serving.reading import Reading
from latentmem.serving.tools import Piece, ToolReader

GONE = 499
"""Status that nobody reads."""
_endings: set[asyncio.Task[None]] = set()
"""Tasks that tell turns how they ended, held until they have."""


class Speaking:
    """A turn that speaks."""

    def __init__(self, turn: Turn, ask: Ask, pool: Executor) -> None:
        """Begin to sample all choices."""
        self.turn = turn
        self.ask = ask
        self.answer: Answer | None = turn.known
        """The whole, once it is kept."""
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._gone: str | None = None
        """Why nobody waits any more."""
        self._heard: asyncio.Queue[tuple[int, Sequence[int] | Spoken | BaseException]] = asyncio.Queue()
        self._voices: list[asyncio.Future[Spoken]] = []
        if self.answer is None:
            self._voices = [self._speak(number) for number in range(ask.n)]

    def give_up(self, reason: str) -> None:
        """Stop, unless the answer is kept; the turn is told when all choices have ended."""
        if self.answer is not None or self._gone is not None:
            return
        self._gone = reason
        self._heard.put_nowait((-1, Refused(GONE, reason)))
        ending = self._loop.create_task(self._lose(reason))
        _endings.add(ending)
        ending.add_done_callback(_endings.discard)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | Choice]]:
        """Yield what is said, with the number of the choice, and each choice when it is whole; then keep the answer.

        Raises:
            Refused: the client went away.
            Exception: what a choice failed with; the turn is lost.
        """
        if self.answer is not None:
            for number, choice in enumerate(self.answer.choices):
                for piece in ((choice.content,) if choice.content else ()) + choice.tool_calls:
                    yield number, piece
                yield number, choice
            return
        readings = [self._reading() for _ in range(self.ask.n)]
        choices: dict[int, Choice] = {}
        timings: list[Timings] = []
        try:
            while len(choices) < self.ask.n:
                number, heard = await self._heard.get()
                if isinstance(heard, BaseException):
                    raise heard
                if isinstance(heard, Spoken):
                    said, choices[number] = readings[number].close(heard)
                    timings.append(heard.timings)
                else:
                    said = readings[number].feed(heard)
                for piece in said:
                    yield number, piece
                if number in choices:
                    yield number, choices[number]
            answer = Answer(
                id=self.ask.call,
                created=int(time.time()),
                model=self.ask.model,
                session=self.turn.session,
                choices=tuple(choices[number] for number in range(self.ask.n)),
                timings=_longest(timings),
                role_is_known=self.turn.speaker.is_known,
                warnings=() if self.turn.speaker.warning is None else (self.turn.speaker.warning,),
            )
            if self._gone is not None:
                raise Refused(GONE, self._gone)
            await self._keep(answer)
        except Exception as error:
            self.give_up(f"{type(error).__name__}: {error}")
            raise

    async def _keep(self, answer: Answer) -> None:
        """Keep the answer. Once begun it is seen through, even when the client goes away meanwhile."""
        self.answer = answer
        try:
            await asyncio.shield(self._loop.run_in_executor(self._pool, self.turn.answered, answer))
        except Exception:
            self.answer = None
            raise

    def _speak(self, number: int) -> asyncio.Future[Spoken]:
        def hear(what: Sequence[int] | Spoken | BaseException) -> None:
            self._loop.call_soon_threadsafe(self._heard.put_nowait, (number, what))

        def on_tokens(ids: Sequence[int]) -> bool:
            if self.ask.stream:
                hear(tuple(ids))
            return self._gone is None

        def speak() -> Spoken:
            try:
                spoken = self.turn.speak(number, on_tokens)
            except StopIteration as error:  # no future can hold one, so it would be waited for without end
                raise RuntimeError("the engine has nothing more to say") from error
            hear(spoken)
            return spoken

        voice = self._loop.run_in_executor(self._pool, speak)
        voice.add_done_callback(partial(_pass_on, lambda error: self._heard.put_nowait((number, error))))
        return voice

    def _reading(self) -> Reading:
        asked, form = self.ask.conversation, self.turn.tool_form
        names = names_of(asked.tools)
        tools = ToolReader(form, names, self.ask.parallel_calls)
        return Reading(self.turn.text_of, self.ask.stop, tools, begun_call(form, asked.must_call, names))

    async def _lose(self, reason: str) -> None:
        await asyncio.gather(*self._voices, return_exceptions=True)
        await self._loop.run_in_executor(self._pool, self.turn.lost, reason)


def _pass_on(hear: Callable[[BaseException], None], voice: asyncio.Future[Spoken]) -> None:
    error = asyncio.CancelledError() if voice.cancelled() else voice.exception()
    if error is not None:
        hear(error)


def _longest(timings: Sequence[Timings]) -> Timings:
    """Return the longest time of each part: choices are sampled at the same time."""
    return Timings(
        recall=max(each.recall for each in timings),
        composing=max(each.composing for each in timings),
        queue=max(each.queue for each in timings),
        generation=max(each.generation for each in timings),
    )


async def until_gone(request: Request) -> None:
    """Wait until the client of a request whose body was read goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
