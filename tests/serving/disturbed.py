"""Episodes of a client that sends again what was not acknowledged, over a server that may be disturbed at each COMMIT.

    python tests/serving/disturbed.py FOLDER STRIDE

fills the disk that FOLDER is on before each STRIDE-th COMMIT in turn, and frees it when a request was refused. The
folder should be on a small disk of its own.
"""

import errno
import itertools
import json
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from served import Parts, client, on_a_port, parts_of

from latentmem.errors import EngineError, LatentMemError
from latentmem.models.agent import ScriptedModel
from latentmem.serving.sessions.session import State
from latentmem.serving.sessions.writer import StoreFailed


class Echo(ScriptedModel):
    """Says the same to the same question, and fails at one of them."""

    concurrent = True

    def __init__(self) -> None:
        super().__init__({})

    def respond(self, prompts: Any, sampling: Any) -> Any:
        (prompt,) = prompts
        question = prompt.conversation.messages[-1]["content"]
        if question == "fail":
            raise EngineError("as it was asked to")
        return ScriptedModel({prompt.role: [f"heard {question}"]}).respond(prompts, sampling)


@dataclass(frozen=True)
class Request:
    """One request."""

    path: str
    body: dict[str, Any]
    key: str
    """The key that tells that it was sent before."""


def _chat(path: str, *questions: str) -> Request:
    told: list[dict[str, str]] = []
    for question in questions[:-1]:
        told += [{"role": "user", "content": question}, {"role": "assistant", "content": f"heard {question}"}]
    body = {"model": "scripted", "messages": [*told, {"role": "user", "content": questions[-1]}], "seed": 7}
    return Request(f"{path}/v1/chat/completions", body, f"{path} {questions}".strip())


def _open(session: str, **more: Any) -> Request:
    return Request("/sessions", {"id": session, **more}, f"open {session}")


def _reward(session: str, value: float, **data: Any) -> Request:
    event = {"event_type": "reward", "data": {"value": value, **data}}
    return Request(f"/sessions/{session}/events", event, f"{session} {value}")


def _complete(session: str, **ending: Any) -> Request:
    return Request(f"/sessions/{session}/complete", ending, f"complete {session}")


SCRIPT = (
    _open("whole", task="add", task_id="t"),
    _chat("/sessions/whole", "1 + 1?"),
    _chat("/sessions/whole", "1 + 1?", "and 2?"),
    _reward("whole", 0.25),
    _reward("whole", 0.75),
    _complete("whole"),
    _chat("/sessions/cut", "2 + 2?"),
    _chat("/sessions/cut", "fail"),
    _complete("cut", reward=1),
    _open("silent"),
    _complete("silent", reward=1),
    _open("kept out", mode="val"),
    _chat("/sessions/kept out", "3 + 3?"),
    _complete("kept out", reward=1),
    _chat("", "4 + 4?"),
    _chat("", "4 + 4?", "and 5?"),
    _chat("/sessions/unjudged", "6 + 6?"),
    _complete("unjudged"),
)


@contextmanager
def server(folder: Path) -> Iterator[tuple[Parts, str]]:
    """A server on a port, begun as after a crash; yields its parts and its address."""
    with parts_of(folder, Echo()) as parts, on_a_port(parts.app()) as address:
        yield parts, address


def play(address: str, acknowledge: Callable[[int, int, Any], object], refused: Callable[[], object] = int) -> None:
    """Send the requests of the script to a server; a request that finds the disk full is sent again.

    Args:
        address: the server's address.
        acknowledge: called after each answer with the request's number, the status and the answer.
        refused: called when there is no room on the disk.
    """
    with client(address) as http:
        for number, asked in enumerate(SCRIPT):
            send = partial(http.post, asked.path, json=asked.body, headers={"Idempotency-Key": asked.key})
            while (answer := send()).status_code == 507:
                refused()
            acknowledge(number, answer.status_code, answer.json())


@contextmanager
def watched(reached: Callable[[int], object]) -> Iterator[None]:
    """Call a function with 0, 1, 2, ... before the first COMMIT of any database, after it, before the second, ..."""
    points = itertools.count()

    class Watched(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement != "COMMIT":
                return super().execute(statement, *values)
            reached(next(points))
            done = super().execute(statement, *values)
            reached(next(points))
            return done

    with mock.patch.object(sqlite3, "connect", partial(sqlite3.connect, factory=Watched)):
        yield


# What is there


def state_of(parts: Parts) -> dict[str, Any]:
    """What the sessions and the bank hold, but for times and names that were drawn."""
    found: dict[str, Any] = {}
    for session in parts.store.about():
        calls = [
            (call.lineage, call.seed, call.answer and call.answer.choices[0].message.response, call.lost is None)
            for call in parts.store.calls(session)
        ]
        name = session.id if session.is_named else "(unnamed)"
        assert name not in found, "one conversation has two sessions"
        found[name] = {
            "session": (session.state, session.mode, session.task_id, session.task_text, session.outcome),
            "ending": session.ending,
            "calls": calls,
            "events": parts.store.events(session),
            "stored": session.trajectory,
        }
    return {**found, "bank": {t.id: (t.reward, t.rewards, t.error, t.origin) for t in parts.bank}}


def check(parts: Parts, acknowledged: list[tuple[int, int, Any]]) -> None:
    """Check that all that was acknowledged is there once, and that nothing is half done."""
    store = parts.store
    sessions = {session.id: session for session in store.about()}
    calls = [call for session in sessions.values() for call in store.calls(session)]
    for number, status, answer in acknowledged:
        asked = SCRIPT[number]
        name = asked.path.split("/")[2] if asked.path.count("/") > 1 else asked.body.get("id")
        if status >= 400:
            assert asked.body["messages"][-1]["content"] == "fail", answer
        elif asked.path == "/sessions":
            assert sessions[name].mode == asked.body.get("mode", "serve")
        elif asked.path.endswith("/completions"):
            (call,) = (call for call in calls if call.id == answer["id"])
            assert call.answer is not None
            assert call.answer.choices[0].content == answer["choices"][0]["message"]["content"]
        elif asked.path.endswith("/events"):
            values = [event["data"]["value"] for event in store.events(sessions[name])]
            assert values.index(asked.body["data"]["value"]) == answer["number"] - 1
            assert values.count(asked.body["data"]["value"]) == 1
        else:
            told = sessions[name]
            assert (told.state, told.outcome, told.trajectory) == (
                answer["state"], answer["outcome"], answer["trajectory"],
            )  # fmt: skip
    stored = {session.id: session.trajectory for session in sessions.values() if session.trajectory is not None}
    assert sorted(stored.items()) == sorted((t.origin.session, t.id) for t in parts.bank if t.origin is not None)
    for session in sessions.values():
        is_last = session.state in (State.SUCCEEDED, State.FAILED)
        assert is_last == (session.ending is not None) == (session.outcome is not None)
        assert store.counts(session).running == 0
    assert not parts.bank.verify().problems
    with closing(sqlite3.connect(store.path)) as db:
        found = db.execute("PRAGMA integrity_check").fetchall() + db.execute("PRAGMA foreign_key_check").fetchall()
        assert found == [("ok",)], found


# Full disks


class Disk:
    """The disk that a folder is on."""

    def __init__(self, folder: Path) -> None:
        self.ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no room on it."""
        with self.ballast.open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    @property
    def is_full(self) -> bool:
        """Whether it was filled."""
        return self.ballast.exists()

    def free(self) -> None:
        """Make room again."""
        self.ballast.unlink(missing_ok=True)


def play_on_full_disk(folder: Path, disk: Disk, point: int) -> tuple[int, dict[str, Any]]:
    """Fill the disk at a point; returns how many requests were refused for that, and what is there in the end."""
    acknowledged: list[tuple[int, int, Any]] = []
    refusals = list[None]()

    def acknowledge(*told: Any) -> None:
        acknowledged.append(told)
        disk.free()

    def refused() -> None:
        assert disk.is_full
        refusals.append(None)
        disk.free()

    with watched(lambda number: number == point and disk.fill()):
        try:
            with server(folder) as (_, address):
                play(address, acknowledge, refused)
        except (LatentMemError, StoreFailed):  # it could not begin; whoever runs it makes room
            assert disk.is_full
            disk.free()
    with server(folder) as (parts, address):
        check(parts, acknowledged)
        if not acknowledged:
            play(address, acknowledge)
        return len(refusals), state_of(parts)


def main(folder: Path, stride: int) -> None:
    """Play on a disk that is full before each COMMIT in turn; prints how often, and how often a client was told."""
    points = list[int]()
    with watched(points.append), server(folder / "whole") as (parts, address):
        play(address, lambda *_: None)
        whole = state_of(parts)
    before = points[::2][::stride]
    told = 0
    for point in before:
        num_refused, state = play_on_full_disk(folder / str(point), Disk(folder), point)
        assert state == whole, point
        told += bool(num_refused)
        shutil.rmtree(folder / str(point))
    print(json.dumps({"filled": len(before), "told": told}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
