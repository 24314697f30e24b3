"""A desk that answers from a script, and a real server of its endpoints on a free port."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request

from latentmem.errors import ServingError
from latentmem.listening import take_port
from latentmem.serving.asks import Answer, Ask, Counted, Earlier, OnTokens, Refused, Speaker, Spoken, Timings, Who
from latentmem.serving.face.routes import openai_routes
from latentmem.serving.identity import role_of
from latentmem.trajectory import Conversation, Message, Recalled, Role, Served

EOS = 256
SOLVER = Speaker(Role(name="solver", profile=""))
RECALLED = Recalled(kind="latent:x", text="t", sources=("s1", "s2"), num_latents=4)


def ids_of(text: str) -> list[int]:
    """The tokens of a text: its bytes."""
    return list(text.encode())


@dataclass
class ScriptedTurn:
    """Says the next text of the desk's script, byte by byte or in other pieces."""

    desk: "ScriptedDesk"
    who: Who
    ask: Ask
    session: str
    known: Answer | None = None
    tool_form: str = "hermes"
    speaker: Speaker = SOLVER
    recalled: Recalled | None = RECALLED
    answer: Answer | None = None
    lost_because: str | None = None
    heard: list[bool] = field(default_factory=list)
    """What `on_tokens` returned."""
    ended: threading.Event = field(default_factory=threading.Event)

    def speak(self, choice: int, on_tokens: OnTokens | None) -> Spoken:
        said = self.desk.script(self.ask, choice)
        if isinstance(said, Exception):
            raise said
        ids = ids_of(said)
        cut = next(
            (i for i in range(len(ids)) for s in self.ask.stop if bytes(ids[: i + 1]).endswith(s.encode())), None
        )
        finish: Any = "stop"
        if cut is not None:
            ids, finish = ids[: cut + 1], "cut"
        elif self.ask.max_tokens is not None and len(ids) >= self.ask.max_tokens:
            ids, finish = ids[: self.ask.max_tokens], "length"
        else:
            ids.append(EOS)
        step = self.desk.step
        for start in range(0, len(ids), step):
            if start and self.desk.between is not None:
                self.desk.between(start)
            if on_tokens is not None:
                self.heard.append(on_tokens(ids[start : start + step]))
                if not self.heard[-1]:
                    break
        text = self.text_of(ids)
        if finish == "cut":
            text = text[: min(text.find(s) for s in self.ask.stop if s in text)]
        message = Message(
            role=role_of(self.who.role, self.ask.conversation, ()).name,
            system=self.ask.conversation.system,
            user=self.ask.conversation.user,
            response=text.strip(),
            token_ids=tuple(ids),
            logps=(-0.5,) * len(ids),
            finish=finish,
            temperature=1.0,
            num_prompt_tokens=11,
            recalled=self.recalled or Recalled(kind="none"),
            served=Served(call=self.ask.call, conversation=self.ask.conversation, prompt_ids=(7, 8), lineage="0"),
        )
        return Spoken(message, Timings(recall=0.25, generation=1.5), counted=Counted(kept=7))

    def text_of(self, token_ids: Sequence[int]) -> str:
        return bytes(i for i in token_ids if i != EOS).decode("utf-8", "replace")

    def answered(self, answer: Answer) -> None:
        if self.desk.on_answered is not None:
            self.desk.on_answered(answer)
        self.answer = answer
        self.desk.calls[answer.id] = self
        self.ended.set()

    def lost(self, reason: str) -> None:
        assert self.lost_because is None, "lost twice"
        self.lost_because = reason
        self.ended.set()


@dataclass
class ScriptedDesk:
    """A desk; `script` gives what a choice says, or the error it fails with."""

    script: Callable[[Ask, int], str | Exception]
    step: int = 1
    """Tokens told at once."""
    between: Callable[[int], None] | None = None
    """Called between two pieces."""
    on_answered: Callable[[Answer], None] | None = None
    refusal: Refused | None = None
    """What the next request is refused with."""
    form: str = "hermes"
    turns: list[ScriptedTurn] = field(default_factory=list)
    calls: dict[str, ScriptedTurn] = field(default_factory=dict)

    def begin_anew(self, script: Callable[[Ask, int], str | Exception]) -> None:
        """Forget all that was, and follow another script."""
        self.__init__(script)  # type: ignore[misc]

    def models(self) -> Sequence[str]:
        return ["tiny"]

    async def admit(self, who: Who, ask: Ask) -> ScriptedTurn:
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            raise refusal
        if ask.model not in self.models():
            raise Refused(404, f"there is no model {ask.model!r}; there is tiny", "model", code="model_not_found")
        turn = ScriptedTurn(self, who, ask, who.session or "made", tool_form=self.form)
        before = [t for t in self.turns if t.session == turn.session and t.answer is not None]
        same = [t for t in before if ask.retry_key and t.ask.retry_key == ask.retry_key]
        if not same and ask.sent_again:
            same = [t for t in before if t.ask.digest == ask.digest]
        turn.known = same[-1].answer if same else None
        self.turns.append(turn)
        return turn

    async def earlier(self, who: Who, call: str) -> Earlier | None:
        turn = self.calls.get(call)
        if turn is None or turn.answer is None or who.session not in (None, turn.session):
            return None
        sent = turn.ask.conversation
        return Earlier(
            turn.session,
            Conversation(messages=(*sent.messages, turn.answer.choices[0].as_sent_back), tools=sent.tools),
        )


@contextmanager
def serving(desk: Any, caller: Any = None) -> Iterator[str]:
    """The endpoints of a desk on a free port of this machine; yields their address."""
    with ThreadPoolExecutor(32) as pool:
        routes = openai_routes(desk, pool, caller) if caller else openai_routes(desk, pool)
        with running(Starlette(routes=routes)) as url:
            yield url


@contextmanager
def running(app: Any) -> Iterator[str]:
    """An app on a free port of this machine; yields its address."""
    listener = take_port("127.0.0.1", 0, ServingError)
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


async def session_of_token(request: Request) -> Who:
    """A caller whose bearer token is that of a session: `session-NAME`."""
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    return Who(session=token.removeprefix("session-")) if token.startswith("session-") else Who()
