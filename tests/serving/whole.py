"""A whole server over a scripted model, on a port: desk, sessions, text memory, operators and rights, and its gate."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from served import Parts, on_a_port, parts_of

from latentmem.models.embedder import HashingEmbedder
from latentmem.serving.operators.audit import AuditLog
from latentmem.serving.operators.keys import Keys
from latentmem.serving.operators.logs import RequestLog
from latentmem.serving.operators.operators import Operators
from latentmem.serving.recalling import Recaller, Searching
from latentmem.serving.rights.forget import Forgetting
from latentmem.serving.rights.routes import Rights, rights_routes


@dataclass
class Whole:
    """What the server is made of."""

    parts: Parts
    operators: Operators
    recaller: Recaller
    rights: Rights
    app: Any
    gate: Any
    log: io.StringIO
    address: str

    def key(self, tenant: str, *scopes: str, **limits: Any) -> dict[str, str]:
        """Headers with a new key."""
        _, secret = self.operators.keys.create(tenant, scopes or ("infer", "read", "write", "admin"), **limits)
        return {"Authorization": f"Bearer {secret}"}

    def client(self, headers: dict[str, str] | None = None) -> httpx2.Client:
        return httpx2.Client(base_url=self.address, headers=headers or {}, timeout=60)


@contextmanager
def whole(folder: Path, model: Any, *, memory: str = "text", num_retrieved: int = 2, **more: Any) -> Iterator[Whole]:
    """The server in this process; its files lie in a folder."""
    log = io.StringIO()
    operators = Operators(Keys(folder / "keys.sqlite"), AuditLog(folder / "audit.jsonl"), RequestLog(log))
    made: list[Recaller] = []
    try:
        with parts_of(folder, model, recall=lambda *asked: made[0](*asked), shares=operators.shares, **more) as parts:
            recaller = Recaller(
                memory, parts.bank, {}, lambda text: len(text.split()), text_budget=2000,
                choices=("text", "none"), searching=Searching(num_retrieved, only_successes=False),
            )  # fmt: skip
            made.append(recaller)
            rights = Rights(
                store=parts.store, bank=parts.bank, embed=HashingEmbedder(), memory=recaller, model=model,
                weights=None, roles=(), pools=parts.desk.pools, audit=operators.audit,
                forgetting=Forgetting(parts.bank, parts.store, operators.audit, recaller.num_kept_of),
            )  # fmt: skip
            app = parts.app(
                authenticate=operators.authenticate,
                watched=operators.watched,
                routers=[operators.routes(), rights_routes(rights, operators.authenticate)],
            )
            gate = operators.gate(app, parts.tokens.read)
            with on_a_port(gate) as address:
                yield Whole(parts, operators, recaller, rights, app, gate, log, address)
            recaller.close()
    finally:
        operators.close()


def play(client: httpx2.Client, session: str, text: str, *, reward: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """One episode of one call; returns the answer of the call and the session at its end."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": text}], **more}
    answer = client.post(f"/sessions/{session}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    ended = client.post(f"/sessions/{session}/complete", json={} if reward is None else {"reward": reward})
    assert ended.status_code == 200, ended.text
    return {"answer": answer.json(), "session": ended.json()}
