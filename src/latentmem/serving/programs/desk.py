"""The desk behind the endpoints while programs are played: a request belongs to an episode, and its agent speaks now.

How responses are drawn is the run's to say, in training and in evaluation alike: a program's temperature, top_p and
seed are not used. Its `max_tokens` and its stop texts are, since they only shorten a response.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import perf_counter
from typing import Protocol

from latentmem.errors import WindowError
from latentmem.outside import one_line
from latentmem.serving.asks import Answer, Ask, Counted, Earlier, OnTokens, Refused, Speaker, Spoken, Timings, Who
from latentmem.serving.identity import KnownRole, Roles
from latentmem.serving.programs.session import Asked, Session
from latentmem.teams.turn import Call, ProgramFailed, ServedCall
from latentmem.trajectory import Recalled

MODEL = "latentmem"
"""The name under which the agents' model is listed; a program may ask for any other, such as one that it has built in.
"""

HOW = "take the address from OPENAI_BASE_URL and the key from OPENAI_API_KEY"


class Writing(Protocol):
    """What the desk has to know of the agents' model."""

    @property
    def tool_form(self) -> str:
        """How the model writes calls of tools."""

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, the end of the response left out."""


class ProgramDesk:
    """Admits the requests of the episodes that are being played."""

    def __init__(self, writing: Callable[[], Writing], known: Sequence[KnownRole]) -> None:
        """Take what makes tokens text, and the roles that are known beforehand."""
        self._writing = writing
        self._roles = Roles(known)
        self.sessions: dict[str, Session] = {}
        """The episodes by their ids."""

    def models(self) -> Sequence[str]:
        """Return the one name."""
        return [MODEL]

    def session_of(self, who: Who) -> Session:
        """Return the episode that a request belongs to.

        Raises:
            Refused: there is none, or it is over.
        """
        session = self.sessions.get(who.session or "")
        if session is None:
            raise Refused(
                401, f"no episode that is being played has this key and this address; {HOW}, in each episode anew"
            )
        if session.is_over:
            raise Refused(409, "the episode is over", code="session_ended")
        return session

    def holder_of(self, token: str) -> Session | None:
        """Return the episode whose token this is."""
        return next((s for s in list(self.sessions.values()) if s.token == token), None)

    async def admit(self, who: Who, ask: Ask) -> "ProgramTurn":
        """Find the request's episode and role; one that was sent again waits for its earlier sending."""
        session = self.session_of(who)
        speaker = self._roles.speaker(who.role, ask.conversation)
        asked, in_progress = session.ask(ask, speaker.role)
        while in_progress is not None:
            await asyncio.wrap_future(in_progress)
            asked, in_progress = session.ask(ask, speaker.role)
        return ProgramTurn(session, asked, ask, speaker, self._writing())

    async def earlier(self, who: Who, call: str) -> Earlier | None:
        """Return a call of the same episode that was answered before."""
        return self.session_of(who).earlier(call)


class ProgramTurn:
    """One request of an episode."""

    def __init__(self, session: Session, asked: Asked, ask: Ask, speaker: Speaker, writing: Writing) -> None:
        self._session = session
        self._asked = asked
        self._ask = ask
        self.speaker = speaker
        self._writing = writing

    @property
    def session(self) -> str:
        """The episode's id."""
        return self._session.id

    @property
    def known(self) -> Answer | None:
        """The answer that the same request was given before."""
        return self._asked.answer

    @property
    def recalled(self) -> Recalled | None:
        """Nothing: the memory is asked when the agent speaks."""
        return None

    @property
    def tool_form(self) -> str:
        """How the model writes calls of tools."""
        return self._writing.tool_form

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, the end of the response left out."""
        return self._writing.text_of(token_ids)

    def speak(self, choice: int, on_tokens: OnTokens | None) -> Spoken:
        """Sample one response, unless an earlier sending of the request has."""
        mine: Future[Spoken] = Future()
        spoken = self._asked.spoken.setdefault(choice, mine)
        if spoken is not mine:
            said = spoken.result()
            if on_tokens is not None:
                on_tokens(said.message.token_ids)
            return said
        try:
            said = self._sample(choice, on_tokens)
        except BaseException as error:
            self._asked.spoken.pop(choice, None)
            mine.set_exception(error)
            raise
        mine.set_result(said)
        return said

    def _sample(self, choice: int, on_tokens: OnTokens | None) -> Spoken:
        ask, asked = self._ask, self._asked
        counted = [Counted()]
        served = ServedCall(
            call=ask.call,
            conversation=ask.conversation,
            lineage=asked.lineage,
            number=asked.number,
            choice=choice,
            limit=ask.max_tokens,
            stop=ask.stop,
            on_tokens=on_tokens,
            on_sampled=lambda sampled: counted.append(Counted(sampled.num_kept, sampled.num_sampled)),
        )
        call = Call(asked.role, ask.conversation.system, ask.conversation.user, served=served)
        began = perf_counter()
        try:
            (message,) = self._session.speak([call])
        except WindowError as error:
            asked.was_refused = True
            raise Refused(400, one_line(str(error), 500), code="context_length_exceeded") from None
        except ProgramFailed as error:
            raise Refused(409, str(error), code="session_ended") from None
        except Exception as error:  # the rollout has taken note of it, and ends with it
            self._session.abort("the rollout was ended")
            raise Refused(503, f"the run has stopped: {one_line(str(error))}") from None
        return Spoken(message, Timings(generation=perf_counter() - began), counted=counted[-1])

    def answered(self, answer: Answer) -> None:
        """Keep the answer for a request that goes on from it, or is sent again."""
        self._session.answered(self._asked, answer)

    def lost(self, reason: str) -> None:
        """Take note that the request got no answer."""
        self._session.lost(self._asked, reason)
