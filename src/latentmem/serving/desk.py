"""The desk of a server that people run: a request gets its session, a place and a memory, and then the model speaks.

What a client is told is kept first: its call when it begins, its answer before the client gets the end of it. A memory
goes into the prompt alone; what is kept is the chat as it was sent, so that injected memory never becomes experience.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

from latentmem.config import Sampling
from latentmem.errors import BusyError, WindowError
from latentmem.models.agent import AgentModel
from latentmem.rollout import message_of, prompt_of
from latentmem.seeds import stream_seed
from latentmem.serving.asks import Answer, Ask, Counted, Earlier, OnTokens, Refused, Speaker, Spoken, Who
from latentmem.serving.identity import KnownRole, Roles
from latentmem.serving.lineage import chain
from latentmem.serving.places import RETRY_SECONDS, Load, Places
from latentmem.serving.recalling import Remembered
from latentmem.serving.sessions.store import SessionStore
from latentmem.serving.sessions.tables import Begun, Context, Opening, Sent
from latentmem.serving.sessions.writer import StoreFailed
from latentmem.teams.turn import Call, ServedCall
from latentmem.trajectory import Conversation, Recalled, Role, Task, text_of

logger = logging.getLogger(__name__)

DRAIN_RETRY_SECONDS = 5.0
"""After how long a client of a server that ends is told to come again."""


class Recalling(Protocol):
    """A function that recalls for one call."""

    def __call__(self, memory: str | None, task: Task, role: Role, tenants: Sequence[str]) -> Remembered:
        """Return what a role should remember for its task.

        Args:
            memory: the memory that the request asks for; None: the server's.
            task: what the episode is about.
            role: who asks.
            tenants: whose episodes may be recalled.

        Raises:
            Refused: the request may not choose, or there is no such memory.
        """


@dataclass(frozen=True)
class Voice:
    """What speaks for the agents."""

    model: AgentModel
    """Many threads may ask it."""
    text_of: Callable[[Sequence[int]], str]
    """Writes sampled tokens as text, the end of the response left out."""
    tool_form: str = "told"
    """How it writes calls of tools; see `tools`."""
    drop_kept: Callable[[], object] = lambda: None
    """Drops the prompts that the model keeps as it has read them."""


@dataclass(frozen=True)
class Shop:
    """What every turn works with."""

    store: SessionStore
    voice: Voice
    recall: Recalling
    sampling: Sampling
    """How responses are drawn where a request does not say; its limit is nobody's to exceed."""


class ServingDesk:
    """Admits requests to the model; see `asks.Desk`. Its coroutines belong to one event loop."""

    def __init__(
        self,
        shop: Shop,
        roles: Sequence[KnownRole] = (),
        *,
        domain: str,
        parallel: int,
        queue: int,
        pools: Callable[[str], Sequence[str]] = lambda tenant: tuple({"", tenant}),
        shares: Callable[[Who], bool] = lambda _: True,
    ) -> None:
        """Take what turns work with, and the limits.

        Args:
            shop: what every turn works with.
            roles: the roles that are known beforehand.
            domain: the domain of tasks whose program names none.
            parallel: largest number of requests answered at the same time.
            queue: largest number of requests that wait.
            pools: whose episodes are recalled for a tenant.
            shares: whether a new session's judged episode goes to the common pool.
        """
        self.shop = shop
        self.places = Places(parallel, queue)
        self._roles = Roles(roles)
        self.domain = domain
        self.parallel = parallel
        self.pools = pools
        self.shares = shares
        self._running: dict[str, asyncio.Future[None]] = {}
        """What ends with each running call, by the call's id."""
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._drains = False

    @property
    def known_roles(self) -> frozenset[str]:
        """Names of the roles that are known beforehand."""
        return self._roles.names

    @property
    def load(self) -> Load:
        """How busy the desk is."""
        return self.places.load

    @property
    def drains(self) -> bool:
        """Whether the desk takes no more requests."""
        return self._drains

    def models(self) -> Sequence[str]:
        """Return the names of the models that can be asked."""
        return [self.shop.voice.model.name]

    async def drain(self) -> None:
        """Take no more requests, and wait until those in flight have ended."""
        self._drains = True
        await self._idle.wait()

    def check_open(self) -> None:
        """Refuse a request while the server ends.

        Raises:
            Refused: it ends.
        """
        if self._drains:
            raise Refused(503, "the server is ending; send the request again", retry_after=DRAIN_RETRY_SECONDS)

    async def admit(self, who: Who, ask: Ask) -> "ServingTurn":
        """Find the request's session and role, and wait for a place.

        Raises:
            Refused: it is not allowed, there is no place, or nothing can be stored.
        """
        self.check_open()
        if who.session is not None and "/" in who.session:
            raise Refused(400, "session: a session's name has no slash", "session")
        began = time.perf_counter()
        self._in_flight += 1
        self._idle.clear()
        turn = None
        try:
            await self.places.take()
            try:
                turn = await self._begin(who, ask, time.perf_counter() - began)
            finally:
                if turn is None or turn.known is not None:
                    self.places.give_back()
        finally:
            if turn is None or turn.known is not None:
                self._left()
        return turn

    async def _begin(self, who: Who, ask: Ask, waited: float) -> "ServingTurn":
        opening = Opening(
            tenant=who.tenant,
            id=who.session,
            key=who.key,
            domain=who.domain or self.domain,
            task_id=who.task,
            shares=self.shares(who),
        )
        contexts = _contexts(ask.conversation)
        sent = Sent(ask.call, ask.retry_key, ask.digest, ask.sent_again)
        task_text = first_user_text(ask)
        while True:
            asked = self.shop.store.begin(opening, sent, contexts, ask.seed, task_text)
            try:
                begun = await asyncio.shield(asyncio.wrap_future(asked))
            except asyncio.CancelledError:
                asked.add_done_callback(lambda done: _lose_begun(self.shop.store, ask.call, done))
                raise
            except StoreFailed as error:
                raise unstored(error) from None
            if not begun.runs:
                break
            before = self._running.get(begun.id)
            if before is not None:  # the same request was sent twice: whoever comes second waits for the first
                await asyncio.shield(before)
            else:  # it has ended, and the disk had no room for that
                await self._lose(begun.id)
        speaker = self._roles.speaker(who.role, ask.conversation)
        if begun.known is None:
            self._running[begun.id] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        return ServingTurn(
            self.shop,
            ask,
            begun,
            speaker,
            self.pools(who.tenant),
            waited,
            lambda: loop.call_soon_threadsafe(self._done, begun.id),
        )

    async def _lose(self, call: str) -> None:
        try:
            await asyncio.wrap_future(self.shop.store.lost(call, "it got no answer, which could not be kept"))
        except StoreFailed as error:
            raise unstored(error) from None

    async def earlier(self, who: Who, call: str) -> Earlier | None:
        """Return a call that was answered before and that another one may go on from."""
        answer = await asyncio.to_thread(self.shop.store.answered_call, who.tenant, who.session, call)
        if answer is None or (served := answer.choices[0].message.served) is None:
            return None
        messages = (*served.conversation.messages, answer.choices[0].as_sent_back)
        return Earlier(answer.session, Conversation(messages=messages, tools=served.conversation.tools))

    def _done(self, call: str) -> None:
        """Free the place of a call; who waits for its answer goes on."""
        self.places.give_back()
        self._running.pop(call).set_result(None)
        self._left()

    def _left(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()


@dataclass
class ServingTurn:
    """One admitted request; see `asks.Turn`."""

    shop: Shop
    ask: Ask
    begun: Begun
    speaker: Speaker
    pools: Sequence[str]
    waited: float
    """Seconds until it had a place."""
    free: Callable[[], object]
    _remembered: Remembered | None = None
    _remembering: threading.Lock = field(default_factory=threading.Lock)
    _is_over: bool = False
    _is_refused: bool = False
    """Whether it asked for what cannot be: nothing was sampled, and its program knows."""

    def __post_init__(self) -> None:
        self._is_over = self.known is not None

    @property
    def session(self) -> str:
        """The session that it belongs to."""
        return self.begun.session.id

    @property
    def known(self) -> Answer | None:
        """The answer that the same request was given before."""
        return self.begun.known

    @property
    def recalled(self) -> Recalled | None:
        """What was recalled for it, once that is known."""
        return None if self._remembered is None else self._remembered.recall.record

    @property
    def tool_form(self) -> str:
        """How the model writes calls of tools."""
        return self.shop.voice.tool_form

    def speak(self, choice: int, on_tokens: OnTokens | None) -> Spoken:
        """Sample the response of one choice, from 0.

        Raises:
            Refused: the engine cannot serve it now.
        """
        try:
            return self._speak(choice, on_tokens)
        except BusyError as error:
            self._is_refused = True
            raise Refused(429, str(error), retry_after=RETRY_SECONDS) from None
        except WindowError as error:
            self._is_refused = True
            raise Refused(400, str(error), "messages", code="context_length_exceeded") from None
        except Refused:
            self._is_refused = True
            raise

    def _speak(self, choice: int, on_tokens: OnTokens | None) -> Spoken:
        remembered = self._recall()
        ask, limit = self.ask, self.shop.sampling.max_response_tokens
        conversation, role = ask.conversation, self.speaker.role
        call = Call(
            role=role,
            system=conversation.system,
            user=conversation.user,
            served=ServedCall(
                call=self.begun.id,
                conversation=conversation,
                lineage=self.begun.lineage,
                limit=min(ask.max_tokens or limit, limit),
                stop=ask.stop,
                on_tokens=on_tokens,
            ),
        )
        group = f"session {self.session}, {role.name}"
        seed = stream_seed(self.begun.seed, choice)
        prompt = prompt_of(call, remembered.recall, group, seed, self.begun.session.tenant)
        sampling = self.shop.sampling.model_copy(
            update={
                name: value
                for name, value in (("temperature", ask.temperature), ("top_p", ask.top_p))
                if value is not None
            }
        )
        began = time.perf_counter()
        (sampled,) = self.shop.voice.model.respond([prompt], sampling)
        seconds = time.perf_counter() - began
        queue, generation = self.waited + sampled.queue_seconds, seconds - sampled.queue_seconds
        timings = replace(remembered.timings, queue=queue, generation=generation)
        message = message_of(call, sampled, remembered.recall, sampling.temperature)
        return Spoken(message, timings, counted=Counted(sampled.num_kept, sampled.num_sampled))

    def _recall(self) -> Remembered:
        with self._remembering:
            if self._remembered is None:
                task, role = self.begun.session.task, self.speaker.role
                self._remembered = self.shop.recall(self.ask.memory, task, role, self.pools)
            return self._remembered

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, the end of the response left out."""
        return self.shop.voice.text_of(token_ids)

    def answered(self, answer: Answer) -> None:
        """Keep the answer. When this returns it is on stable storage.

        Raises:
            Refused: it cannot be stored, or the session has ended meanwhile.
        """
        said = [[*self.ask.conversation.messages, choice.as_sent_back] for choice in answer.choices]
        contexts = [Context(chain(messages)[-1].hex(), len(messages)) for messages in said]
        try:
            self.shop.store.answered(self.begun.id, answer, contexts).result()
        except StoreFailed as error:
            raise unstored(error) from None
        self._end()

    def lost(self, reason: str) -> None:
        """Take note that the request got no answer; of one that was refused, that there was none."""
        if self._is_over:
            return
        store = self.shop.store
        try:
            (store.refused(self.begun.id) if self._is_refused else store.lost(self.begun.id, reason)).result()
        except StoreFailed as error:
            logger.warning("call %s got no answer, and that could not be kept: %s", self.begun.id, error)
        self._end()

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self.free()


def unstored(error: StoreFailed) -> Refused:
    """Return the answer to a request that could not be stored."""
    return Refused(507 if error.is_full else 503, str(error), retry_after=DRAIN_RETRY_SECONDS)


def _contexts(conversation: Conversation) -> list[Context]:
    """Return the beginnings of a conversation, the whole of it last."""
    return [Context(digest.hex(), length) for length, digest in enumerate(chain(conversation.messages), 1)]


def first_user_text(ask: Ask) -> str:
    """Return the text of the first user message; without any, all that is said."""
    messages = ask.conversation.messages
    return next((text_of(m) for m in messages if m.get("role") == "user"), ask.conversation.user)


def _lose_begun(store: SessionStore, call: str, done: "Future[Begun]") -> None:
    """Take back a call whose client went away before it was admitted."""
    if not done.cancelled() and done.exception() is None:
        store.lost(call, "the client went away before its turn")
