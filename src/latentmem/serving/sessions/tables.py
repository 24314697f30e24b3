"""The tables of the store of sessions, and what is done with them; every function here runs inside one transaction."""

import secrets
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue, TypeAdapter

from latentmem.serving.asks import Answer, Refused
from latentmem.serving.sessions.session import MOVES, Counts, Ended, Ending, KeptCall, Mode, Session, State

APPLICATION_ID = 0x4C4D5353
VERSION = 1
TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
    """CREATE TABLE sessions (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        tenant TEXT NOT NULL,
        id TEXT NOT NULL,             -- chosen by the client or by us; two tenants may choose the same
        key TEXT NOT NULL,            -- id of the API key that opened it
        state TEXT NOT NULL,
        mode TEXT NOT NULL,
        is_named INTEGER NOT NULL,
        domain TEXT NOT NULL,
        task_id TEXT,
        task_text TEXT,
        seed INTEGER NOT NULL,
        opened REAL NOT NULL,
        touched REAL NOT NULL,
        shares INTEGER NOT NULL,
        ending TEXT,                  -- JSON; set first, then the episode goes to the bank, then the state moves
        trajectory TEXT,
        outcome TEXT,
        UNIQUE (tenant, id)
    )""",
    "CREATE INDEX sessions_by_tenant ON sessions (tenant)",  # with `seq` behind it, as every index
    "CREATE INDEX sessions_by_touch ON sessions (touched) WHERE state IN ('queuing', 'running')",
    """CREATE TABLE calls (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        session INTEGER NOT NULL REFERENCES sessions (seq),
        id TEXT NOT NULL UNIQUE,      -- id of the answer
        retry_key TEXT,
        digest TEXT NOT NULL,         -- of the request's body
        lineage TEXT NOT NULL,
        seed INTEGER NOT NULL,
        began REAL NOT NULL,
        place INTEGER,                -- number of its answer in the session, from 1
        answer TEXT,                  -- JSON
        lost TEXT                     -- why there is no answer
    )""",
    "CREATE INDEX calls_by_session ON calls (session, place)",
    "CREATE INDEX calls_by_retry ON calls (retry_key) WHERE retry_key IS NOT NULL",
    "CREATE INDEX calls_by_digest ON calls (digest)",
    "CREATE INDEX running_calls ON calls (session) WHERE answer IS NULL AND lost IS NULL",
    """CREATE TABLE contexts (          -- what was said so far in each conversation, as a digest
        digest TEXT NOT NULL,
        session INTEGER NOT NULL REFERENCES sessions (seq),
        is_answered INTEGER NOT NULL, -- whether it ends with a response of ours
        lineage TEXT NOT NULL,        -- the key's columns come first, or SQLite 3.40's integrity_check complains
        length INTEGER NOT NULL,      -- messages
        PRIMARY KEY (digest, session, is_answered)
    ) WITHOUT ROWID""",
    "CREATE INDEX contexts_by_session ON contexts (session)",
    """CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        session INTEGER NOT NULL REFERENCES sessions (seq),
        retry_key TEXT,
        told REAL NOT NULL,
        body TEXT NOT NULL
    )""",
    "CREATE INDEX events_by_session ON events (session)",
)
OPEN = "state IN ('queuing', 'running')"
ANSWER = TypeAdapter(Answer)


@dataclass(frozen=True)
class Opening:
    """What a new session is told; None: what the first request says."""

    tenant: str
    id: str | None = None
    key: str = ""
    mode: Mode = "serve"
    domain: str = "served"
    task_id: str | None = None
    task_text: str | None = None
    shares: bool = True


@dataclass(frozen=True)
class Sent:
    """A request as far as it is known again when it is sent again."""

    call: str
    """Id of its answer."""
    key: str | None = None
    """Requests of a session with equal keys are one request."""
    digest: str = ""
    is_again: bool = False
    """Whether an earlier request of equal digest is this one."""


@dataclass(frozen=True)
class Context:
    """A conversation up to one of its messages."""

    digest: str
    length: int


@dataclass(frozen=True)
class Begun:
    """A call that may begin, or the answer it had before."""

    session: Session
    id: str
    lineage: str
    seed: int
    known: Answer | None = None
    runs: bool = False
    """Whether the same call is running already; then this one has to wait for its end."""


COLUMNS = (
    "tenant, id, key, state, mode, is_named, domain, task_id, task_text, seed, opened, touched, shares, ending, "
    "trajectory, outcome"
)


def session_of(row: Sequence[Any]) -> Session:
    """Return the session that a row of `COLUMNS` holds."""
    values = dict(zip(COLUMNS.split(", "), row, strict=True))
    ending = values.pop("ending")
    flags = {name: bool(values.pop(name)) for name in ("is_named", "shares")}
    return Session(
        **{**values, **flags, "state": State(values["state"])},
        ending=None if ending is None else Ending.model_validate_json(ending),
    )


def kept_call(call: str, lineage: str, seed: int, began: float, answer: str | None, lost: str | None) -> KeptCall:
    """Return the call that a row of `calls` holds."""
    return KeptCall(call, lineage, seed, began, None if answer is None else ANSWER.validate_json(answer), lost)


def find_session(db: sqlite3.Connection, tenant: str, id_: str) -> Session | None:
    """Return a session of a tenant."""
    query = f"SELECT {COLUMNS} FROM sessions WHERE tenant = ? AND id = ?"  # noqa: S608
    row = db.execute(query, (tenant, id_)).fetchone()
    return None if row is None else session_of(row)


def sessions_of(
    db: sqlite3.Connection, tenant: str, state: State | None, after: str | None, limit: int
) -> list[Session]:
    """Return a page of the sessions of a tenant; see `SessionStore.page`.

    Raises:
        Refused: the tenant has no session `after`.
    """
    asked, values = ["tenant = ?"], [tenant]
    if state is not None:
        asked, values = [*asked, "state = ?"], [*values, state.value]
    before: tuple[int, ...] = ()
    if after is not None:
        before = db.execute("SELECT seq FROM sessions WHERE tenant = ? AND id = ?", (tenant, after)).fetchone()
        if before is None:
            raise Refused(404, f"there is no session {after[:200]!r} to go on after", "after")
        asked.append("seq < ?")
    query = f"SELECT {COLUMNS} FROM sessions WHERE {' AND '.join(asked)} ORDER BY seq DESC LIMIT ?"  # noqa: S608
    return [session_of(row) for row in db.execute(query, (*values, *before, limit))]


def seq_of(db: sqlite3.Connection, session: Session) -> int:
    """Return the number of a session.

    Raises:
        Refused: it was deleted.
    """
    row = db.execute("SELECT seq FROM sessions WHERE tenant = ? AND id = ?", (session.tenant, session.id)).fetchone()
    if row is None:
        raise Refused(404, f"no session {session.id!r}; it was deleted")
    return int(row[0])


def lose_running(db: sqlite3.Connection) -> None:
    """Take note that the calls which ran in an earlier process get no answer."""
    db.execute("UPDATE calls SET lost = 'the server ended' WHERE answer IS NULL AND lost IS NULL")


def secret_of(db: sqlite3.Connection) -> bytes:
    """Return the secret that tokens are made with; it is made once."""
    db.execute("INSERT OR IGNORE INTO meta VALUES ('secret', ?)", (secrets.token_bytes(32),))
    return bytes(db.execute("SELECT value FROM meta WHERE key = 'secret'").fetchone()[0])


def open_session(db: sqlite3.Connection, opening: Opening, *, is_named: bool) -> Session:
    """Open a session.

    Raises:
        Refused: the tenant has one of that id.
    """
    id_ = opening.id or f"s-{secrets.token_urlsafe(18)}"
    if find_session(db, opening.tenant, id_) is not None:
        raise Refused(409, f"there is a session {id_!r} already; give another id, or none", "session")
    now = time.time()
    values = (
        *(opening.tenant, id_, opening.key, State.QUEUING.value, opening.mode, is_named, opening.domain),
        *(opening.task_id, opening.task_text, secrets.randbits(62), now, now, opening.shares, None, None, None),
    )
    places = ", ".join("?" * len(values))
    db.execute(f"INSERT INTO sessions ({COLUMNS}) VALUES ({places})", values)  # noqa: S608
    found = find_session(db, opening.tenant, id_)
    assert found is not None
    return found


def begin_call(
    db: sqlite3.Connection,
    opening: Opening,
    sent: Sent,
    contexts: Sequence[Context],
    seed: int | None,
    task_text: str,
) -> Begun:
    """Begin a call; see `SessionStore.begin`.

    Raises:
        Refused: its session has ended.
    """
    if opening.id is not None:
        session = find_session(db, opening.tenant, opening.id)
    else:
        session = _sent_before(db, opening, sent) or _continued(db, opening, contexts)
    if session is None:
        session = open_session(db, opening, is_named=opening.id is not None)
    seq = seq_of(db, session)
    if (before := _same_request(db, seq, sent)) is not None:
        call, lineage, its_seed, answer, lost = before
        if answer is not None:
            return Begun(session, call, lineage, its_seed, known=ANSWER.validate_json(answer))
        if lost is None:
            return Begun(session, call, lineage, its_seed, runs=True)
        if not session.is_over:  # it is sent again, so it is not lost any more
            change = "UPDATE calls SET id = ?, lost = NULL, began = ? WHERE id = ?"
            db.execute(change, (sent.call, time.time(), call))
            _touch(db, seq)
            return Begun(session, sent.call, lineage, its_seed)
    if session.is_over:
        raise Refused(409, f"session {session.id!r} has ended; open another one for another episode", "session")
    if session.state is State.QUEUING:
        db.execute("UPDATE sessions SET state = 'running' WHERE seq = ?", (seq,))
    db.execute(
        """UPDATE sessions SET task_text = coalesce(task_text, ?), task_id = coalesce(task_id, ?) WHERE seq = ?""",
        (task_text, opening.task_id, seq),
    )
    _touch(db, seq)
    lineage = _lineage(db, seq, contexts)
    chosen = secrets.randbits(62) if seed is None else seed
    db.execute(
        "INSERT INTO calls (session, id, retry_key, digest, lineage, seed, began) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (seq, sent.call, sent.key, sent.digest, lineage, chosen, time.time()),
    )
    _remember(db, seq, lineage, contexts[-1:], is_answered=False)
    now = find_session(db, session.tenant, session.id)
    assert now is not None
    return Begun(now, sent.call, lineage, chosen)


def _continued(db: sqlite3.Connection, opening: Opening, contexts: Sequence[Context]) -> Session | None:
    """Return the unnamed session whose responses a conversation continues."""
    digests = [context.digest for context in contexts]
    query = f"""SELECT sessions.tenant, sessions.id FROM contexts JOIN sessions ON sessions.seq = contexts.session
        WHERE contexts.digest IN ({", ".join("?" * len(digests))}) AND is_answered AND NOT is_named AND tenant = ?
        AND key = ? AND {OPEN} AND ending IS NULL ORDER BY length DESC, contexts.session DESC LIMIT 1"""  # noqa: S608
    row = db.execute(query, (*digests, opening.tenant, opening.key)).fetchone()
    return None if row is None else find_session(db, *row)


def _sent_before(db: sqlite3.Connection, opening: Opening, sent: Sent) -> Session | None:
    """Return the unnamed session that the same request, sent before, has opened or continued."""
    if sent.key is None and not sent.is_again:
        return None
    same, value = ("retry_key", sent.key) if sent.key is not None else ("digest", sent.digest)
    query = f"""SELECT sessions.tenant, sessions.id FROM calls JOIN sessions ON sessions.seq = calls.session
        WHERE calls.{same} = ? AND NOT is_named AND tenant = ? AND key = ? ORDER BY calls.seq DESC LIMIT 1"""  # noqa: S608
    row = db.execute(query, (value, opening.tenant, opening.key)).fetchone()
    return None if row is None else find_session(db, *row)


def _same_request(db: sqlite3.Connection, seq: int, sent: Sent) -> tuple[str, str, int, str | None, str | None] | None:
    if sent.key is None and not sent.is_again:
        return None
    same, value = ("retry_key", sent.key) if sent.key is not None else ("digest", sent.digest)
    query = f"""SELECT id, lineage, seed, answer, lost FROM calls WHERE session = ? AND {same} = ?
        ORDER BY seq DESC LIMIT 1"""  # noqa: S608
    found: tuple[str, str, int, str | None, str | None] | None = db.execute(query, (seq, value)).fetchone()
    return found


def _lineage(db: sqlite3.Connection, seq: int, contexts: Sequence[Context]) -> str:
    """Return the lineage of a request: that of the longest answer it goes on from, or else of the longest request.

    A program may change an answer before it goes on. The same request again begins a lineage of its own.
    """
    for known, is_answered in ((contexts, True), (contexts[:-1], False)):
        digests = [context.digest for context in known]
        query = f"""SELECT lineage FROM contexts WHERE session = ? AND is_answered = ?
            AND digest IN ({", ".join("?" * len(digests))}) ORDER BY length DESC LIMIT 1"""  # noqa: S608
        row = db.execute(query, (seq, is_answered, *digests)).fetchone()
        if row is not None:
            return str(row[0])
    (count,) = db.execute("SELECT count(DISTINCT lineage) FROM calls WHERE session = ?", (seq,)).fetchone()
    return str(count)


def _remember(
    db: sqlite3.Connection, seq: int, lineage: str, contexts: Sequence[Context], *, is_answered: bool
) -> None:
    db.executemany(
        "INSERT OR REPLACE INTO contexts (digest, session, is_answered, lineage, length) VALUES (?, ?, ?, ?, ?)",
        [(context.digest, seq, is_answered, lineage, context.length) for context in contexts],
    )


def _touch(db: sqlite3.Connection, seq: int) -> None:
    db.execute("UPDATE sessions SET touched = ? WHERE seq = ?", (time.time(), seq))


def keep_answer(db: sqlite3.Connection, call: str, answer: Answer, contexts: Sequence[Context]) -> None:
    """Keep the answer of a call, and the conversations that now end with it.

    Raises:
        Refused: its session has ended, or was deleted.
    """
    row = db.execute("SELECT session, lineage, lost FROM calls WHERE id = ?", (call,)).fetchone()
    if row is None or row[2] is not None:
        raise Refused(409, "the session of this call ended before its answer", "session")
    seq, lineage, _ = row
    db.execute(
        """UPDATE calls SET answer = ?, place = (SELECT coalesce(max(place), 0) + 1 FROM calls WHERE session = ?)
        WHERE id = ?""",
        (ANSWER.dump_json(answer).decode(), seq, call),
    )
    _remember(db, seq, lineage, contexts, is_answered=True)
    _touch(db, seq)


def counts_of(db: sqlite3.Connection, seq: int) -> Counts:
    """Count the calls of a session."""
    query = """SELECT count(answer), count(lost), sum(answer IS NULL AND lost IS NULL) FROM calls WHERE session = ?"""
    answered, lost, running = db.execute(query, (seq,)).fetchone()
    return Counts(answered, lost, running or 0)


def tell_event(db: sqlite3.Connection, session: Session, event: Mapping[str, JsonValue], retry_key: str | None) -> int:
    """Keep an event and return its number in the session.

    Raises:
        Refused: the session has ended.
    """
    seq = seq_of(db, session)
    if retry_key is not None:
        query = "SELECT (SELECT count(*) FROM events AS e WHERE e.session = ? AND e.seq <= events.seq) FROM events \
            WHERE session = ? AND retry_key = ?"
        known = db.execute(query, (seq, seq, retry_key)).fetchone()
        if known is not None:
            return int(known[0])
    now = find_session(db, session.tenant, session.id)
    if now is None or now.is_over:
        raise Refused(409, f"session {session.id!r} has ended; it takes no more events", "session")
    body = _JSON.dump_json(dict(event)).decode()
    db.execute(
        "INSERT INTO events (session, retry_key, told, body) VALUES (?, ?, ?, ?)", (seq, retry_key, time.time(), body)
    )
    _touch(db, seq)
    return int(db.execute("SELECT count(*) FROM events WHERE session = ?", (seq,)).fetchone()[0])


_JSON: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])


def end_session(db: sqlite3.Connection, session: Session, ending: Ending) -> Session:
    """Keep how a session was ended, if it was not before, and return it as it is.

    One that is idle is not ended if something has happened in it since it was looked up.
    """
    seq = seq_of(db, session)
    now = find_session(db, session.tenant, session.id)
    assert now is not None
    is_used = ending.cause == "idle" and (now.touched > session.touched or counts_of(db, seq).running)
    if not now.is_over and not is_used:
        db.execute(
            "UPDATE sessions SET ending = ?, touched = ? WHERE seq = ?", (ending.model_dump_json(), time.time(), seq)
        )
        db.execute(
            "UPDATE calls SET lost = 'the session ended first' WHERE session = ? AND answer IS NULL AND lost IS NULL",
            (seq,),
        )
        now = find_session(db, session.tenant, session.id)
        assert now is not None
    return now


def move_session(db: sqlite3.Connection, session: Session, ended: Ended) -> Session:
    """Let an ended session move to its last state, if it has not, and return it as it is."""
    seq = seq_of(db, session)
    now = find_session(db, session.tenant, session.id)
    assert now is not None
    if MOVES[now.state]:
        if ended.state not in MOVES[now.state]:
            raise ValueError(f"session {session.id!r} cannot move from {now.state} to {ended.state}")
        trajectory = None if ended.trajectory is None else ended.trajectory.id
        db.execute(
            "UPDATE sessions SET state = ?, outcome = ?, trajectory = ? WHERE seq = ?",
            (ended.state.value, ended.outcome, trajectory, seq),
        )
        db.execute("DELETE FROM contexts WHERE session = ?", (seq,))
        now = find_session(db, session.tenant, session.id)
        assert now is not None
    return now


def forget_session(db: sqlite3.Connection, tenant: str, id_: str) -> int:
    """Delete a session with all that belongs to it; return 1, or 0 if there is none."""
    found = db.execute("SELECT seq FROM sessions WHERE tenant = ? AND id = ?", (tenant, id_)).fetchone()
    if found is None:
        return 0
    for table in ("contexts", "events", "calls"):
        db.execute(f"DELETE FROM {table} WHERE session = ?", found)  # noqa: S608
    db.execute("DELETE FROM sessions WHERE seq = ?", found)
    return 1
