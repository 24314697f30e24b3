"""One episode of a program while it runs: what it asked, what it was answered, and what went wrong.

A request that is sent again, because its client lost patience or its connection, is the same request: it gets the same
response, and counts once. A request that is lost for good spoils the episode, because nobody knows what the program
would have done with the response.
"""

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock

from latentmem.serving.asks import Answer, Ask, Earlier, Spoken
from latentmem.serving.lineage import Lineages
from latentmem.teams.turn import Speak
from latentmem.trajectory import SYSTEM_ROLES, Conversation, Role, text_of


@dataclass
class Asked:
    """One request of a program, however often it was sent."""

    ask: Ask
    role: Role
    lineage: str
    number: int
    """Which request of its lineage it is."""
    spoken: dict[int, "Future[Spoken]"] = field(default_factory=dict)
    """The responses that are sampled, or were, by the choice's number."""
    attempt: "Future[None]" = field(default_factory=Future)
    """Ends when the attempt in progress is answered or lost."""
    answer: Answer | None = None
    lost: str | None = None
    """Why the last attempt got no answer."""
    was_refused: bool = False
    """Whether the program was told that this cannot be asked, so that it knows how to go on."""


class Session:
    """One episode; its functions may be called from any thread."""

    def __init__(self, speak: Speak) -> None:
        """Begin an episode; `speak` lets its agents speak."""
        self.id = secrets.token_urlsafe(18)
        self.token = f"lm-{secrets.token_urlsafe(32)}"
        self.speak = speak
        self.rewards: dict[str, float] = {}
        """Rewards of single roles, by name; the last one counts."""
        self.told: float | None = None
        """The reward that the program gave the whole team; the domain's score stays the team's reward."""
        self.fault: str | None = None
        """What ended the episode from here."""
        self.is_over = False
        self._asked: list[Asked] = []
        self._lineages = Lineages()
        self._names: dict[str, str] = {}
        self._firsts: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()
        self._end: Callable[[], None] | None = None
        self._lock = Lock()

    def can_be_ended_by(self, end: Callable[[], None]) -> None:
        """Take the function that ends the program."""
        with self._lock:
            self._end = end
            ended = self.fault is not None
        if ended:
            end()

    def abort(self, fault: str) -> None:
        """End the program from outside."""
        with self._lock:
            self.fault = self.fault or fault
            end = self._end
        if end is not None:
            end()

    def close(self) -> str | None:
        """End the episode: nothing is admitted any more. Return what its program's end does not tell of its failure."""
        with self._lock:
            self.is_over, self._end = True, None
            lost = [asked for asked in self._asked if asked.answer is None and not asked.was_refused]
        if self.fault is None and lost:
            reasons = [asked.lost or "it was still running when the program ended" for asked in lost]
            self.fault = f"{len(lost)} of {len(self._asked)} calls got no answer: {reasons[0]}"
        return self.fault

    def reward(self, value: float, agent: str | None) -> None:
        """Take a reward from 0 to 1: of a role by its name, or of the team."""
        with self._lock:
            if agent is None:
                self.told = value
            else:
                self.rewards[agent] = value

    def ask(self, ask: Ask, role: Role) -> tuple[Asked, "Future[None] | None"]:
        """Take a request: return it, and what to wait for if an earlier sending of it is in progress."""
        with self._lock:
            asked = self._same(ask)
            if asked is None:
                lineage = self._lineage(ask.conversation)
                asked = Asked(ask, role, lineage, self._numbers[lineage])
                self._numbers[lineage] += 1
                self._asked.append(asked)
                return asked, None
            if not asked.attempt.done():
                return asked, asked.attempt
            if asked.answer is None:
                asked.attempt, asked.lost = Future(), None
            return asked, None

    def answered(self, asked: Asked, answer: Answer) -> None:
        """Take note of the answer."""
        with self._lock:
            asked.answer, asked.lost = answer, None
            messages = asked.ask.conversation.messages
            for choice in answer.choices:
                self._lineages.heard(self._arrival(asked.lineage), messages, choice.as_sent_back)
            if not asked.attempt.done():
                asked.attempt.set_result(None)

    def lost(self, asked: Asked, reason: str) -> None:
        """Take note that the attempt got no answer."""
        with self._lock:
            asked.lost = reason
            if not asked.attempt.done():
                asked.attempt.set_result(None)

    def earlier(self, call: str) -> Earlier | None:
        """Return an answered request by the id of its answer."""
        with self._lock:
            found = next((a for a in self._asked if a.answer is not None and a.answer.id == call), None)
        if found is None or found.answer is None:
            return None
        sent = found.ask.conversation
        messages = (*sent.messages, found.answer.choices[0].as_sent_back)
        return Earlier(self.id, Conversation(messages=messages, tools=sent.tools))

    def _same(self, ask: Ask) -> Asked | None:
        """Return the request that this one is sent again for."""
        if ask.retry_key is not None:
            return next((a for a in self._asked if a.ask.retry_key == ask.retry_key), None)
        if ask.sent_again:
            return next((a for a in reversed(self._asked) if a.ask.digest == ask.digest), None)
        return None

    def _lineage(self, conversation: Conversation) -> str:
        """Return a name for the request's conversation that does not depend on what else the program asks."""
        arrival = self._lineages.of(conversation.messages)
        if arrival not in self._names:
            first = _digest(conversation)
            again = self._firsts[first]
            self._names[arrival] = f"{first}-{again}" if again else first
            self._firsts[first] += 1
        return self._names[arrival]

    def _arrival(self, lineage: str) -> str:
        return next(arrival for arrival, name in self._names.items() if name == lineage)


def _digest(conversation: Conversation) -> str:
    said = [("system" if m.get("role") in SYSTEM_ROLES else m.get("role"), text_of(m)) for m in conversation.messages]
    return hashlib.sha256(json.dumps(said).encode("utf-8", "surrogatepass")).hexdigest()[:16]
