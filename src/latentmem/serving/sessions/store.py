"""Sessions on disk: each session, call and event is on stable storage before anybody is told of it.

What a session is, and which of its moves are legal, stands in `session`; the SQL stands in `tables`. A call is written
when it begins and again when it is answered, so that a call which a crash cut short is known, and masks its session.
"""

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from latentmem.parsing import parse_json
from latentmem.serving.asks import Answer
from latentmem.serving.sessions.forgetting import calls_made_of, erase, scrub_calls, sessions_about
from latentmem.serving.sessions.session import Counts, Ended, Ending, KeptCall, Session, State
from latentmem.serving.sessions.tables import (
    ANSWER,
    APPLICATION_ID,
    COLUMNS,
    OPEN,
    TABLES,
    VERSION,
    Begun,
    Context,
    Opening,
    Sent,
    begin_call,
    counts_of,
    end_session,
    find_session,
    forget_session,
    keep_answer,
    kept_call,
    lose_running,
    move_session,
    open_session,
    secret_of,
    seq_of,
    session_of,
    sessions_of,
    tell_event,
)
from latentmem.serving.sessions.writer import Writer


class SessionStore:
    """Sessions, their calls and their events; threads may share it."""

    def __init__(self, path: Path) -> None:
        """Open the store, or begin one; calls that ran when the last process ended are lost.

        Raises:
            ServingError: the file cannot be used.
        """
        self.path = path
        self._writer = Writer(path, TABLES, APPLICATION_ID, VERSION)
        self._writer.write(lose_running)

    def close(self) -> None:
        """Write what was asked for, and close the file."""
        self._writer.close()

    @property
    def secret(self) -> bytes:
        """The secret that tokens of sessions are made with."""
        return self._writer.write(secret_of)

    # Sessions

    def open(self, opening: Opening) -> "Future[Session]":
        """Open a session.

        Raises:
            Refused: there is one of that id; its tenant is the same.
        """
        return self._writer.submit(lambda db: open_session(db, opening, is_named=True))

    def get(self, tenant: str, id_: str) -> Session | None:
        """Return a session of a tenant."""
        with self._writer.read() as db:
            return find_session(db, tenant, id_)

    def counts(self, session: Session) -> Counts:
        """Count the session's calls."""
        with self._writer.read() as db:
            return counts_of(db, seq_of(db, session))

    def page(self, tenant: str, state: State | None = None, after: str | None = None, limit: int = -1) -> list[Session]:
        """Return the sessions of a tenant, the one that was opened last first.

        Args:
            tenant: whose they are.
            state: only those of this state; None: of any.
            after: id of the session behind which the page begins; None: it begins with the last one.
            limit: how many to return at most; -1: all.

        Raises:
            Refused: the tenant has no session `after`.
        """
        with self._writer.read() as db:
            return sessions_of(db, tenant, state, after, limit)

    def num_by_state(self) -> dict[State, int]:
        """Count all sessions."""
        with self._writer.read() as db:
            found = dict(db.execute("SELECT state, count(*) FROM sessions GROUP BY state").fetchall())
        return {state: found.get(state.value, 0) for state in State}

    def idle_since(self, moment: float) -> list[Session]:
        """Return open sessions in which nothing was asked or told since a moment, and nothing runs."""
        query = f"""SELECT {COLUMNS} FROM sessions WHERE {OPEN} AND touched < ? AND ending IS NULL AND NOT EXISTS
            (SELECT 1 FROM calls WHERE session = sessions.seq AND answer IS NULL AND lost IS NULL)"""  # noqa: S608
        with self._writer.read() as db:
            return [session_of(row) for row in db.execute(query, (moment,))]

    def half_ended(self) -> list[Session]:
        """Return sessions that were ended but not stored yet."""
        query = f"SELECT {COLUMNS} FROM sessions WHERE {OPEN} AND ending IS NOT NULL"  # noqa: S608
        with self._writer.read() as db:
            return [session_of(row) for row in db.execute(query)]

    # Calls

    def begin(
        self,
        opening: Opening,
        sent: Sent,
        contexts: Sequence[Context],
        seed: int | None,
        task_text: str,
    ) -> "Future[Begun]":
        """Begin a call, in its session or in a new one.

        Args:
            opening: whose it is, and what a new session is told. Without an id, the call belongs to the open session,
                of the same key, that sampled the longest beginning of its conversation; else it opens one.
            sent: tells whether it is an earlier request that is sent again.
            contexts: the beginnings of the conversation, the whole of it last.
            seed: the request's seed; None makes one.
            task_text: the task's text if the session has none yet.

        Raises:
            Refused: the session has ended.
        """
        return self._writer.submit(lambda db: begin_call(db, opening, sent, contexts, seed, task_text))

    def answered(self, call: str, answer: Answer, contexts: Sequence[Context]) -> "Future[None]":
        """Keep the answer of a call, with what the conversation may now begin with.

        Raises:
            Refused: its session has ended meanwhile.
        """
        return self._writer.submit(lambda db: keep_answer(db, call, answer, contexts))

    def lost(self, call: str, reason: str) -> "Future[None]":
        """Take note that a call gets no answer."""
        return self._writer.submit(lambda db: _lost(db, call, reason))

    def calls(self, session: Session, after: int = 0, limit: int = -1) -> list[KeptCall]:
        """Return the calls of a session: those with an answer in the order of their answers, then the others.

        Args:
            session: the session.
            after: how many to leave out at the beginning.
            limit: how many to return at most; -1: all.
        """
        query = """SELECT id, lineage, seed, began, answer, lost FROM calls WHERE session = ?
            ORDER BY place IS NULL, place, seq LIMIT ? OFFSET ?"""
        with self._writer.read() as db:
            rows = db.execute(query, (seq_of(db, session), limit, after)).fetchall()
        return [kept_call(*row) for row in rows]

    def spoke(self, session: Session) -> set[str]:
        """Return the roles that have spoken in a session."""
        answers = [call.answer for call in self.calls(session) if call.answer is not None]
        return {choice.message.role for answer in answers for choice in answer.choices}

    def answered_call(self, tenant: str, session: str | None, call: str) -> Answer | None:
        """Return the answer of a call of a tenant; with a session, of a call in it."""
        query = """SELECT answer FROM calls JOIN sessions ON sessions.seq = calls.session
            WHERE calls.id = ? AND tenant = ? AND (? IS NULL OR sessions.id = ?) AND answer IS NOT NULL"""
        with self._writer.read() as db:
            row = db.execute(query, (call, tenant, session, session)).fetchone()
        return None if row is None else ANSWER.validate_json(row[0])

    def refused(self, call: str) -> "Future[None]":
        """Take back a call that was refused: nothing was sampled, so its session is whole without it."""
        return self._writer.submit(lambda db: _take_back(db, call))

    # Events and ends

    def tell(self, session: Session, event: Mapping[str, JsonValue], retry_key: str | None) -> "Future[int]":
        """Add an event and return its number in the session, from 1; one with a known retry key is not added again.

        Raises:
            Refused: the session has ended.
        """
        return self._writer.submit(lambda db: tell_event(db, session, event, retry_key))

    def events(self, session: Session) -> list[dict[str, Any]]:
        """Return the events of a session in their order."""
        with self._writer.read() as db:
            rows = db.execute(
                "SELECT body FROM events WHERE session = ? ORDER BY seq", (seq_of(db, session),)
            ).fetchall()
        return [parse_json(body) for (body,) in rows]

    def end(self, session: Session, ending: Ending) -> "Future[Session]":
        """Keep how a session was ended, if it was not before, and return it; calls that still run are lost."""
        return self._writer.submit(lambda db: end_session(db, session, ending))

    def move(self, session: Session, ended: Ended) -> "Future[Session]":
        """Let an ended session move to its last state."""
        return self._writer.submit(lambda db: move_session(db, session, ended))

    # Forgetting

    def about(
        self,
        *,
        tenant: str | None = None,
        session: str | None = None,
        domain: str | None = None,
        task_id: str | None = None,
        before: datetime | None = None,
    ) -> list[Session]:
        """Return the sessions that meet all filters; `before` is a time with its zone."""
        with self._writer.read() as db:
            return sessions_about(db, tenant, session, domain, task_id, before)

    def scrub(self, sources: Collection[str]) -> int:
        """Delete, in all calls, what memories made of these trajectories told; return the number of calls."""
        with self._writer.read() as db:
            calls = calls_made_of(db, sources)
        return self._writer.write(lambda db: scrub_calls(db, calls))

    def erase(self) -> bool:
        """Leave no byte of what was deleted in the file and its log; return whether that succeeded."""
        with self._writer.read() as db:
            return erase(db)

    def forget(self, sessions: Collection[tuple[str, str]]) -> int:
        """Delete sessions, by tenant and id, with all that belongs to them, and return their number."""
        return self._writer.write(lambda db: sum(forget_session(db, tenant, id_) for tenant, id_ in sessions))


def _lost(db: sqlite3.Connection, call: str, reason: str) -> None:
    db.execute("UPDATE calls SET lost = ? WHERE id = ? AND answer IS NULL AND lost IS NULL", (reason, call))


def _take_back(db: sqlite3.Connection, call: str) -> None:
    row = db.execute(
        "SELECT session, lineage FROM calls WHERE id = ? AND answer IS NULL AND lost IS NULL", (call,)
    ).fetchone()
    if row is None:
        return
    db.execute("DELETE FROM calls WHERE id = ?", (call,))
    left = "NOT EXISTS (SELECT 1 FROM calls WHERE session = contexts.session AND lineage = contexts.lineage)"
    db.execute(f"DELETE FROM contexts WHERE session = ? AND lineage = ? AND {left}", row)  # noqa: S608
