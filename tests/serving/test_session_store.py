"""The store of sessions: changes that share one sync, tokens, tenants that choose the same names."""

import sqlite3
import threading

import pytest

from latentmem.errors import ServingError
from latentmem.serving.asks import Refused
from latentmem.serving.sessions.session import MOVES, Ended, Ending, State
from latentmem.serving.sessions.store import SessionStore
from latentmem.serving.sessions.tables import Context, Opening, Sent
from latentmem.serving.sessions.tokens import Opened, Tokens
from latentmem.serving.sessions.writer import StoreFailed, Writer

TABLES = ("CREATE TABLE words (word TEXT NOT NULL UNIQUE)",)


@pytest.fixture
def writer(tmp_path):
    made = Writer(tmp_path / "w.sqlite", TABLES, 7, 1)
    yield made
    made.close()


def words(writer):
    with writer.read() as db:
        return [word for (word,) in db.execute("SELECT word FROM words ORDER BY word")]


def insert(word):
    return lambda db: db.execute("INSERT INTO words VALUES (?)", (word,)).rowcount


def held(writer):
    """Let the writer wait, so that what is asked for meanwhile is one transaction; returns what lets it go on."""
    began, let = threading.Event(), threading.Event()

    def hold(db):
        began.set()
        assert let.wait(30)

    writer.submit(hold)
    assert began.wait(30)
    return let


def test_changes_that_come_during_a_sync_share_the_next_one(writer):
    commits = []
    writer.write(lambda db: db.set_trace_callback(commits.append))
    let = held(writer)
    asked = [writer.submit(insert(f"w{i:02}")) for i in range(40)]
    let.set()
    assert [each.result(30) for each in asked] == [1] * 40
    assert len(words(writer)) == 40
    assert sum(statement == "COMMIT" for statement in commits) == 3  # of the trace, of the wait, and of all forty


def test_a_change_that_fails_takes_nobody_with_it(writer):
    let = held(writer)

    def half(db):
        insert("half")(db)
        raise Refused(409, "no")

    first, failing, twice, last = (writer.submit(c) for c in (insert("a"), half, insert("a"), insert("b")))
    let.set()
    assert (first.result(30), last.result(30)) == (1, 1)
    with pytest.raises(Refused):
        failing.result(30)
    with pytest.raises(sqlite3.IntegrityError):
        twice.result(30)
    assert words(writer) == ["a", "b"]


def test_a_full_disk_refuses_what_does_not_fit_and_takes_it_later(writer):
    writer.write(lambda db: db.execute("PRAGMA max_page_count = 1").fetchone())
    let = held(writer)
    small, large, last = (writer.submit(insert(word)) for word in ("a", "x" * 100_000, "c"))
    let.set()
    assert (small.result(30), last.result(30)) == (1, 1)
    with pytest.raises(StoreFailed, match=r"w\.sqlite: the disk is full; nothing") as told:
        large.result(30)
    assert told.value.is_full
    assert words(writer) == ["a", "c"]
    writer.write(lambda db: db.execute("PRAGMA max_page_count = 100000").fetchone())
    assert writer.write(insert("x" * 100_000)) == 1


def test_what_was_asked_for_before_the_end_is_written(tmp_path):
    writer = Writer(tmp_path / "w.sqlite", TABLES, 7, 1)
    asked = [writer.submit(insert(str(i))) for i in range(20)]
    writer.close()
    assert all(each.result(0) == 1 for each in asked)
    with pytest.raises(ServingError, match="closed"):
        writer.write(insert("late"))


def test_files_of_others_and_of_newer_versions_are_refused(tmp_path):
    Writer(tmp_path / "w.sqlite", TABLES, 7, 2).close()
    with pytest.raises(ServingError, match=r"was written by a newer latentmem \(version 2\)"):
        Writer(tmp_path / "w.sqlite", TABLES, 7, 1)
    with pytest.raises(ServingError, match="another program's database"):
        Writer(tmp_path / "w.sqlite", TABLES, 8, 2)
    (tmp_path / "text").write_text("no database, but a text that is long enough to look at")
    with pytest.raises(ServingError, match="cannot be opened"):
        Writer(tmp_path / "text", TABLES, 7, 1)


@pytest.fixture
def store(tmp_path):
    made = SessionStore(tmp_path / "sessions.sqlite")
    yield made
    made.close()


def begun(store, tenant, session, call, *digests, key="k"):
    contexts = [Context(digest, i) for i, digest in enumerate(digests, 1)]
    return store.begin(Opening(tenant, session, key), Sent(call), contexts, None, "task").result()


def test_two_tenants_may_choose_the_same_name_and_never_meet(store):
    one, other = begun(store, "a", "s", "c1", "d"), begun(store, "b", "s", "c2", "d")
    assert (one.session.tenant, other.session.tenant) == ("a", "b")
    store.tell(one.session, {"event_type": "note", "data": {}}, None).result()
    assert store.events(other.session) == []
    assert [call.id for call in store.calls(other.session)] == ["c2"]
    assert store.get("c", "s") is None
    unnamed = begun(store, "a", None, "c3", "d")
    assert begun(store, "b", None, "c4", "d", "e").session.id != unnamed.session.id


def test_a_session_that_is_forgotten_leaves_nothing(store, tmp_path):
    session = begun(store, "a", "s", "c1", "MARKER").session
    store.tell(session, {"event_type": "note", "data": {"said": "MARKER"}}, None).result()
    assert store.forget([("b", "s"), ("a", "s")]) == 1
    assert store.get("a", "s") is None
    with pytest.raises(Refused):
        store.calls(session)
    assert store.erase()
    assert b"MARKER" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_only_the_moves_of_the_table_are_made(store):
    session = begun(store, "a", "s", "c1", "d").session
    assert session.state is State.RUNNING
    with pytest.raises(ValueError, match="cannot move from running to queuing"):
        store.move(session, Ended(State.QUEUING, "")).result()
    store.end(session, Ending(cause="completed")).result()
    assert store.move(session, Ended(State.FAILED, "lost")).result().state is State.FAILED
    assert store.move(session, Ended(State.SUCCEEDED, "won")).result().outcome == "lost"
    assert [state for state in State if not MOVES[state]] == [State.SUCCEEDED, State.FAILED]


def test_a_token_tells_its_session_and_no_other_text_does():
    tokens = Tokens(b"secret")
    opened = Opened("tenant", "sitzung-é", "key")
    token = tokens.make(opened)
    assert tokens.read(token) == opened
    assert Tokens(b"other").read(token) is None
    head, _, tail = token.partition(".")
    for forged in ("", "lms_", token[:-1], f"{head}x.{tail}", token.replace("lms_", ""), f"{token}é", "lms_." + tail):
        assert tokens.read(forged) is None
