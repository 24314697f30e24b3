"""A server over a scripted model, on a real port in a thread, with a bank of its own."""

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from latentmem.bank import ExperienceBank
from latentmem.config import Sampling
from latentmem.errors import ServingError
from latentmem.listening import take_port
from latentmem.memory.memory import NoMemory
from latentmem.models.agent import ScriptedModel
from latentmem.models.embedder import HashingEmbedder
from latentmem.serving.app import create_app
from latentmem.serving.asks import Refused
from latentmem.serving.desk import ServingDesk, Shop, Voice
from latentmem.serving.recalling import Remembered
from latentmem.serving.sessions.endings import Endings
from latentmem.serving.sessions.session import Storing
from latentmem.serving.sessions.store import SessionStore
from latentmem.serving.sessions.tokens import Tokens
from latentmem.trajectory import Role, Task


def spelled(token_ids: Sequence[int]) -> str:
    """The text of a scripted model's tokens."""
    return bytes(i for i in token_ids if i < 256).decode("utf-8", "replace")


@dataclass
class Parts:
    """What a server is made of."""

    model: Any
    store: SessionStore
    bank: ExperienceBank
    desk: ServingDesk
    endings: Endings
    tokens: Tokens

    def app(self, **more: Any) -> Any:
        return create_app(self.desk, self.endings, self.tokens, **more)


def nothing_recalled(memory: str | None, task: Task, role: Role, tenants: Sequence[str]) -> Remembered:
    """Recall nothing."""
    if memory not in (None, "none"):
        raise Refused(400, f"latentmem.memory: {memory!r} is not served here", "latentmem.memory")
    return Remembered(NoMemory().recall_many([(task, role)])[0])


@contextmanager
def parts_of(
    folder: Path,
    model: Any,
    *,
    recall: Any = nothing_recalled,
    unjudged: Any = "store",
    idle_seconds: float = 3600,
    parallel: int = 8,
    queue: int = 64,
    keep: Any = None,
    **desk_parts: Any,
) -> Iterator[Parts]:
    """The parts of a server whose files lie in a folder."""
    embedder = HashingEmbedder()
    with ExperienceBank(folder / "bank.sqlite", embedder, embedder="hashing") as bank:
        store = SessionStore(folder / "sessions.sqlite")
        try:
            shop = Shop(
                store=store,
                voice=Voice(model, spelled),
                recall=recall,
                sampling=Sampling(max_response_tokens=64),
            )
            desk = ServingDesk(shop, domain="served", parallel=parallel, queue=queue, **desk_parts)
            endings = Endings(store, keep or bank.add, Storing("program", model.name, unjudged), idle_seconds)
            yield Parts(model, store, bank, desk, endings, Tokens(store.secret))
        finally:
            store.close()


@contextmanager
def on_a_port(app: Any) -> Iterator[str]:
    """Serve an application on a free port; yields its address."""
    with take_port("127.0.0.1", 0, ServingError) as listener:
        listener.listen(64)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11", ws="none", lifespan="on"))
        started = threading.Event()

        async def serve() -> None:
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started and not task.done():
                await asyncio.sleep(0.005)
            started.set()
            await task

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        started.wait(30)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


def scripted(*responses: str, role: str = "solver") -> ScriptedModel:
    """A model with one role; it may be asked by many threads, in turn."""
    return Script({role: list(responses)})


class Script(ScriptedModel):
    """A scripted model that many threads may ask; a role that has no script says what the first one says."""

    concurrent = True

    def __init__(self, responses: Mapping[str, Sequence[str]]) -> None:
        super().__init__(responses)
        self._lock = threading.Lock()

    def respond(self, prompts: Any, sampling: Any) -> Any:
        with self._lock:
            first = next(iter(self.responses.values()))
            for prompt in prompts:
                if prompt.role not in self.responses:
                    self.responses[prompt.role], self._used[prompt.role] = first, 0
            return super().respond(prompts, sampling)


def client(address: str, **more: Any) -> httpx2.Client:
    """A client of a server."""
    return httpx2.Client(base_url=address, timeout=60, **more)
