"""What happens at the desk, watched: what each call recalled and took goes to the visit, the limits and the audit.

The desk itself knows none of these. A session's own token opens that session alone, whatever a header or a body names.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from latentmem.errors import AuditError
from latentmem.serving.asks import Answer, Ask, Desk, Earlier, OnTokens, Refused, Speaker, Spoken, Turn, Who
from latentmem.serving.operators.visits import Caller, Visit, current
from latentmem.trajectory import Recalled

logger = logging.getLogger(__name__)

_LATER_SECONDS = 5.0

Spent = Callable[[str, int], None]
"""A function that gets tokens that a key used: its id and their number."""


@dataclass(frozen=True)
class Told:
    """What the audit is told of an answer with a memory."""

    tenant: str
    key: str
    session: str
    call: str
    role: str
    memory: str
    sources: tuple[str, ...]


class WatchedDesk:
    """A desk with somebody who keeps the books."""

    def __init__(
        self,
        desk: Desk,
        spent: Spent = lambda key, tokens: None,
        recalled: Callable[[Told], None] = lambda told: None,
        lost: Callable[[], None] = lambda: None,
        with_texts: bool = False,
    ) -> None:
        """Watch a desk.

        Args:
            desk: what answers.
            spent: gets the tokens that a key used.
            recalled: gets what was recalled for each answer.
            lost: called for each call that gets no answer.
            with_texts: whether visits hold what was asked and answered.
        """
        self._desk = desk
        self._spent = spent
        self._recalled = recalled
        self._lost = lost
        self._with_texts = with_texts

    def models(self) -> Sequence[str]:
        """Return the names of the models that can be asked."""
        return self._desk.models()

    async def earlier(self, who: Who, call: str) -> Earlier | None:
        """Return a call that this one may go on from."""
        return await self._desk.earlier(_bound(who), call)

    async def admit(self, who: Who, ask: Ask) -> Turn:
        """Admit a request.

        Raises:
            Refused: the desk refuses it, or it names another session than its token opens.
        """
        who = _bound(who)
        visit = current.get() or Visit("", "", "", Caller(who.tenant, who.key))
        turn = await self._desk.admit(who, ask)
        visit.session = turn.session
        if self._with_texts:
            visit.texts = {"asked": ask.conversation.model_dump(mode="json")}
        return _WatchedTurn(turn, self, visit)

    def told(self, visit: Visit, answer: Answer) -> None:
        """Tell the audit what an answer recalled, before anything is acknowledged.

        Raises:
            Refused: the audit takes no more.
        """
        first = answer.choices[0].message
        memory = first.recalled
        if not memory.sources:
            return
        caller = visit.caller
        who = Told(caller.tenant, caller.key, answer.session, answer.id, first.role, memory.kind, memory.sources)
        try:
            self._recalled(who)
        except AuditError as error:
            logger.warning("%s", error)
            raise Refused(503, "what was recalled cannot be put on record now", retry_after=_LATER_SECONDS) from None

    def answered(self, visit: Visit, answer: Answer) -> None:
        """Note an answer that was kept."""
        visit.calls.append(answer.id)
        visit.timings = answer.timings
        if self._with_texts:
            visit.texts["answered"] = [choice.message.response for choice in answer.choices]
        first = answer.choices[0].message
        visit.role, visit.recalled, visit.sources = first.role, first.recalled.kind, first.recalled.sources

    def was_lost(self, visit: Visit, reason: str) -> None:
        """Note a call that got no answer."""
        visit.reason = visit.reason or reason
        self._lost()

    def took(self, visit: Visit, spoken: Spoken) -> None:
        """Note the tokens of a response, also of one that nobody waits for any more."""
        message = spoken.message
        latents = message.recalled.num_latents
        visit.prompt_tokens += message.num_prompt_tokens
        visit.latent_tokens += latents
        generated = spoken.counted.tokens_of(message)
        visit.kept_tokens += spoken.counted.kept
        visit.generated_tokens += generated
        self._spent(visit.caller.key, message.num_prompt_tokens + latents + generated)


class _WatchedTurn:
    """A turn of a watched desk."""

    def __init__(self, turn: Turn, watching: WatchedDesk, visit: Visit) -> None:
        self._turn = turn
        self._watching = watching
        self._visit = visit

    @property
    def session(self) -> str:
        return self._turn.session

    @property
    def known(self) -> Answer | None:
        return self._turn.known

    @property
    def speaker(self) -> Speaker:
        return self._turn.speaker

    @property
    def recalled(self) -> Recalled | None:
        return self._turn.recalled

    @property
    def tool_form(self) -> str:
        return self._turn.tool_form

    def speak(self, choice: int, on_tokens: OnTokens | None) -> Spoken:
        spoken = self._turn.speak(choice, on_tokens)
        self._watching.took(self._visit, spoken)
        return spoken

    def text_of(self, token_ids: Sequence[int]) -> str:
        return self._turn.text_of(token_ids)

    def answered(self, answer: Answer) -> None:
        self._watching.told(self._visit, answer)
        self._turn.answered(answer)
        self._watching.answered(self._visit, answer)

    def lost(self, reason: str) -> None:
        self._turn.lost(reason)
        self._watching.was_lost(self._visit, reason)


def _bound(who: Who) -> Who:
    """Return who asks, bound to the session whose token was sent.

    Raises:
        Refused: another session is named.
    """
    visit = current.get()
    only = None if visit is None else visit.caller.session
    if only is None:
        return who
    if who.session not in (None, only):
        raise Refused(404, "there is no such session")
    return replace(who, session=only)
