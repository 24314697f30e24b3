"""Sessions that are to be forgotten: found by what they are about, and taken out of the file, byte for byte.

What a session's calls were given as memory is other people's text. So when trajectories are forgotten, the calls of all
sessions lose the text of the memories that were made of them.
"""

import json
import sqlite3
from collections.abc import Collection, Iterator
from datetime import datetime

from latentmem.parsing import parse_json
from latentmem.serving.sessions.session import Session
from latentmem.serving.sessions.tables import COLUMNS, session_of

_PAGE = 500


def sessions_about(
    db: sqlite3.Connection,
    tenant: str | None,
    session: str | None,
    domain: str | None,
    task_id: str | None,
    before: datetime | None,
) -> list[Session]:
    """Return the sessions that meet all filters, in the order they were opened."""
    filters = {
        "tenant = ?": tenant,
        "id = ?": session,
        "domain = ?": domain,
        "task_id = ?": task_id,
        "opened < ?": None if before is None else before.timestamp(),
    }
    given = {test: value for test, value in filters.items() if value is not None}
    tests = " AND ".join(["TRUE", *given])
    query = f"SELECT {COLUMNS} FROM sessions WHERE {tests} ORDER BY seq"  # noqa: S608
    return [session_of(row) for row in db.execute(query, [*given.values()])]


def calls_made_of(db: sqlite3.Connection, sources: Collection[str]) -> list[int]:
    """Return the numbers of the calls whose memory was made of any of these trajectories."""
    wanted = frozenset(sources)
    return [
        seq
        for seq, answer in _answers(db)
        if any(wanted.intersection(choice["message"]["recalled"]["sources"]) for choice in answer["choices"])
    ]


def scrub_calls(db: sqlite3.Connection, calls: Collection[int]) -> int:
    """Take out of calls what their memories told, as text and as tokens of the prompt, and return their number."""
    for seq in calls:
        (stored,) = db.execute("SELECT answer FROM calls WHERE seq = ?", (seq,)).fetchone()
        answer = parse_json(stored)
        for choice in answer["choices"]:
            message = choice["message"]
            message["recalled"]["text"] = ""
            if message.get("served") and not message["recalled"]["num_latents"]:
                message["served"]["prompt_ids"] = []
        db.execute("UPDATE calls SET answer = ? WHERE seq = ?", (json.dumps(answer, ensure_ascii=False), seq))
    return len(calls)


def erase(db: sqlite3.Connection) -> bool:
    """Write what is deleted into the file and empty its log; return whether nobody hindered it."""
    (is_busy, _, _) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not is_busy


def _answers(
    db: sqlite3.Connection,
) -> Iterator[tuple[int, dict[str, list[dict[str, dict[str, dict[str, list[str]]]]]]]]:
    reached = 0
    while rows := db.execute(
        "SELECT seq, answer FROM calls WHERE seq > ? AND answer IS NOT NULL ORDER BY seq LIMIT ?", (reached, _PAGE)
    ).fetchall():
        for seq, stored in rows:
            yield seq, parse_json(stored)
        reached = rows[-1][0]
