"""Tenants: a filter inside each search and a view of the whole bank; and banks of version 1, which know none."""

import random
import sqlite3
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import postgres_server
from latentmem import cli
from latentmem.bank import AddReport, ExperienceBank, copy_records, postgres, sqlite, sqlite_file
from latentmem.bank import lists as bank_approximate
from latentmem.bank_place import bank_place, read_url
from latentmem.errors import BankError
from latentmem.models.embedder import HashingEmbedder
from latentmem.trajectory import Message, Origin, Recalled, Step, Task, Trajectory

WIDTH = 16
embed = HashingEmbedder(WIDTH)
TENANTS = ["", "acme", "bolt"]
Store = Path | str


def make(
    text: str,
    tenant: str | None = None,
    *,
    session: str = "s",
    success: bool = True,
    domain: str = "sums",
    is_judged: bool = True,
    task_id: str | None = None,
) -> Trajectory:
    message = Message(
        role="solver", system="", user=text, response="said", token_ids=(2,), logps=(-0.5,), finish="stop",
        temperature=1.0, num_prompt_tokens=9, recalled=Recalled(kind="none"),
    )  # fmt: skip
    return Trajectory(
        task=Task(id=task_id, domain=domain, text=text),
        team="pair",
        model="tiny",
        steps=(Step(messages=(message,), action="said", observation=""),),
        reward=float(success),
        success=success,
        seed=0,
        origin=None if tenant is None else Origin(tenant=tenant, session=session, is_judged=is_judged),
    )


def tenant_of(trajectory: Trajectory) -> str:
    return "" if trajectory.origin is None else trajectory.origin.tenant


ASKED = Task(id=None, domain="sums", text="which one is asked")


def slow_search(stored: list[Trajectory], k: int, tenants: Any, **filters: Any) -> list[Trajectory]:
    """One loop, one sort; equal texts have equal vectors, so only the order of storing breaks ties."""

    def similarity(trajectory: Trajectory) -> float:
        a, b = embed([trajectory.task.text, ASKED.text]).astype("float64")
        return float((a * b).sum().astype("float32"))

    wanted = [
        t
        for t in stored
        if (tenants is None or any(tenant == tenant_of(t) for tenant in tenants))
        and filters.get("success") in (None, t.success)
        and filters.get("domain") in (None, t.task.domain)
        and not t.task.same_as(ASKED)
    ]
    return sorted(wanted, key=lambda t: -similarity(t))[:k]


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))
    if request.param == "sqlite":
        return tmp_path / "bank.sqlite"
    return str(request.getfixturevalue("postgres_server").new_bank())


@pytest.fixture
def small_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists from six rows on, all of which are read, so that the approximate search misses nothing."""
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS", 5)
    monkeypatch.setattr(bank_approximate, "_FEW_ROWS_PER_K", 0)
    monkeypatch.setattr(bank_approximate, "_LONGEST_TAIL", 4)


# The filter

trajectories = st.builds(
    make,
    st.sampled_from(["add one", "add two", "take one away", "which one", "which one is asked", "x"]),
    st.sampled_from([None, *TENANTS]),
    session=st.sampled_from("st"),
    success=st.booleans(),
    domain=st.sampled_from(["sums", "words"]),
)
views = st.one_of(st.none(), st.lists(st.sampled_from([*TENANTS, "nobody"]), max_size=3))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(trajectories, max_size=8), min_size=1, max_size=5),
    views,
    views,
    st.sampled_from([None, True]),
    st.sampled_from([None, "words"]),
    st.integers(1, 9),
)
def test_a_search_returns_what_slow_loops_find_among_the_tenants(
    batches: list[list[Trajectory]], own: Any, given_: Any, success: Any, domain: Any, k: int
) -> None:
    stored: dict[str, Trajectory] = {}
    with tempfile.TemporaryDirectory() as folder, ExperienceBank(Path(folder) / "bank", embed, tenants=own) as bank:
        for batch in batches:
            bank.add(batch)
            for trajectory in batch:
                stored.setdefault(trajectory.id, trajectory)
            everything = list(stored.values())
            filters = {"success": success, "domain": domain}
            found = bank.search(ASKED, k=k, **filters, tenants=given_)
            seen = own if given_ is None else given_
            assert [hit.trajectory for hit in found] == slow_search(everything, k, seen, **filters)
            view = bank.seen_by(given_)
            assert list(view) == [t for t in everything if given_ is None or tenant_of(t) in given_]


@pytest.mark.usefixtures("small_lists")
@pytest.mark.parametrize("index", ["exact", "approximate"])
def test_either_index_filters_in_either_store(store: Store, index: Any) -> None:
    rng = random.Random(1)
    stored = [
        make(f"{rng.choice(['add', 'take'])} {i % 40}", rng.choice([None, *TENANTS]), success=rng.random() < 0.7)
        for i in range(200)
    ]
    stored = list({t.id: t for t in stored}.values())
    with ExperienceBank(store, embed, index=index) as bank:
        for start in range(0, len(stored), 30):
            bank.add(stored[start : start + 30])
            for tenants in (None, [], [""], ["acme"], ["", "bolt"], ["nobody"], TENANTS):
                found = bank.search(ASKED, k=300, success=True, tenants=tenants)
                expected = slow_search(stored[: start + 30], 300, tenants, success=True)
                assert [hit.trajectory for hit in found] == expected
        assert bank.verify().ok
    with ExperienceBank(store, embed, index=index, tenants=["acme"]) as bank:  # with labels that were read from a file
        assert [hit.trajectory for hit in bank.search(ASKED, k=300)] == slow_search(stored, 300, ["acme"])


def test_a_view_knows_nothing_of_others(store: Store) -> None:
    mine, shared, others = make("a", "acme"), make("b"), make("c", "bolt", success=False, task_id="7")
    with ExperienceBank(store, embed) as bank:
        bank.add([mine, shared, others])
        assert bank.info().tenants == {"": 1, "acme": 1, "bolt": 1}
        view = bank.seen_by(["", "acme"])
        assert (len(view), list(view), view.ids()) == (2, [mine, shared], [mine.id, shared.id])
        assert (mine.id in view, others.id in view, others.id in bank) == (True, False, True)
        assert (view.newest(9, success=True), view.newest(9, success=False)) == ([shared, mine], [])
        assert (view.ids_of(others.task), bank.ids_of(others.task)) == ([], [others.id])
        info = view.info()
        assert (info.num_trajectories, info.tenants, info.roles) == (2, {"": 1, "acme": 1}, {"solver": 2})
        assert view.get([mine.id]) == [mine]
        assert view.get([others.id], tenants=["bolt"]) == [others]
        for ids, tenants in (([others.id], None), ([mine.id], ["bolt"]), (["0" * 32], None)):
            with pytest.raises(BankError, match="it was deleted, or belongs to another bank"):
                view.get(ids, tenants=tenants)
        before = view.digest()
        bank.add(make("d", "bolt"))
        assert view.digest() == before
        with view.frozen("a test"):
            bank.add(make("e", "bolt"))
        assert view.delete(everything=True).count == 2
        assert len(bank) == 3


def test_equal_episodes_of_two_tenants_are_both_kept(store: Store) -> None:
    twins = [make("a", tenant) for tenant in (None, "", "acme", "bolt")]
    with ExperienceBank(store, embed) as bank:
        assert bank.add(twins) == AddReport(4, 0)
        assert bank.add(twins) == AddReport(0, 4)
        for tenant, expected in (("", twins[:2]), ("acme", twins[2:3]), ("bolt", twins[3:])):
            assert [hit.trajectory for hit in bank.search(ASKED, k=9, tenants=[tenant])] == expected


def test_a_text_is_no_list_of_tenants(tmp_path: Path) -> None:
    path = tmp_path / "bank.sqlite"
    with ExperienceBank(path, embed) as bank:
        bank.add(make("a", "a"))
        for read in (
            lambda: bank.seen_by("acme"),
            lambda: bank.search(ASKED, k=1, tenants="acme"),
            lambda: bank.get([], tenants=""),
            lambda: ExperienceBank(path, tenants="acme"),
        ):
            with pytest.raises(ValueError, match=r"tenants is the text '.*'; give a list of names"):
                read()


def test_copies_keep_tenants_sessions_and_times(store: Store, tmp_path: Path) -> None:
    with ExperienceBank(store, embed, embedder="mine") as bank:
        bank.add([make("a", "acme", session="s1"), make("b")])
        sql(store, "UPDATE trajectories SET stored = '2020-01-01T00:00:00+00:00'")
    copy = tmp_path / "copy.sqlite"
    assert copy_records(bank_place(store), bank_place(copy)) == (2, 0)
    rows = sql(copy, "SELECT tenant, session, stored FROM trajectories ORDER BY seq")
    time = "2020-01-01T00:00:00+00:00"
    assert rows == [("acme", "s1", time), ("", None, time)]


# Banks of version 1

_VERSION_1 = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
    """CREATE TABLE trajectories (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, domain TEXT NOT NULL, success INTEGER NOT NULL,
        reward REAL NOT NULL, team TEXT NOT NULL, model TEXT NOT NULL, task_id TEXT, task_key TEXT,
        task_text TEXT NOT NULL, vector BLOB NOT NULL, json BLOB NOT NULL
    )""",
    """CREATE TABLE roles (
        seq INTEGER NOT NULL REFERENCES trajectories (seq) ON DELETE CASCADE, role TEXT NOT NULL,
        PRIMARY KEY (seq, role)
    ) WITHOUT ROWID""",
    "CREATE INDEX trajectories_by_task_key ON trajectories (task_key)",
    "CREATE INDEX trajectories_by_task_text ON trajectories (task_text)",
    "PRAGMA application_id = 1280132429",
    "PRAGMA journal_mode = WAL",
)
_VERSION_1_SERVER = """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE trajectories (
        seq BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, id TEXT COLLATE "C" NOT NULL UNIQUE,
        domain TEXT COLLATE "C" NOT NULL, success SMALLINT NOT NULL, reward DOUBLE PRECISION NOT NULL,
        team TEXT COLLATE "C" NOT NULL, model TEXT COLLATE "C" NOT NULL, task_id TEXT COLLATE "C",
        task_key TEXT COLLATE "C", task_text TEXT COLLATE "C" NOT NULL, vector BYTEA NOT NULL, json BYTEA NOT NULL
    );
    CREATE TABLE roles (
        seq BIGINT NOT NULL REFERENCES trajectories (seq) ON DELETE CASCADE, role TEXT COLLATE "C" NOT NULL
    );
    CREATE INDEX ON roles (seq); CREATE INDEX ON trajectories USING hash (task_key);
    CREATE INDEX ON trajectories USING hash (task_text)
"""
_INSERT_1 = (
    "INSERT INTO trajectories (id, domain, success, reward, team, model, task_id, task_key, task_text, vector, json) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


def sql(store: Store, statement: str, *values: Any) -> list[Any]:
    if isinstance(store, str):
        return postgres_server.sql(store, statement.replace("?", "%s"), *values)
    db = sqlite3.connect(store)
    try:
        with db:
            return db.execute(statement, values).fetchall()
    finally:
        db.close()


def insert_1(store: Store, trajectory: Trajectory) -> None:
    """Store a trajectory as version 1 did."""
    task = trajectory.task
    sql(
        store,
        _INSERT_1,
        trajectory.id, task.domain, int(trajectory.success), trajectory.reward, trajectory.team, trajectory.model,
        task.id, task.key if task.id is not None else None, task.text, embed([task.text])[0].astype("<f4").tobytes(),
        zlib.compress(trajectory.to_json().encode()),
    )  # fmt: skip
    sql(store, "INSERT INTO roles (seq, role) SELECT seq, 'solver' FROM trajectories WHERE id = ?", trajectory.id)


def begin_1(store: Store, stored: list[Trajectory]) -> None:
    """Make a bank as version 1 did."""
    meta: dict[str, Any] = {"schema_version": 1, "created": "2025-05-05T00:00:00+00:00", "generation": "a" * 32}
    meta |= {"embedder": "hashing", "width": WIDTH}
    if isinstance(store, str):
        sql(store, f'CREATE SCHEMA "{read_url(store).name}"')
        sql(store, _VERSION_1_SERVER)
        meta = {key: value if isinstance(value, int) else f'"{value}"' for key, value in meta.items()}
    else:
        for statement in _VERSION_1:
            sql(store, statement)
    for key, value in meta.items():
        sql(store, "INSERT INTO meta VALUES (?, ?)", key, str(value) if isinstance(store, str) else value)
    for trajectory in stored:
        insert_1(store, trajectory)


OLD = [
    make(text, success=i % 2 == 0, task_id=str(i)).model_copy(update={"schema_version": 1 + i % 2})
    for i, text in enumerate(["one", "two", "three and one"])
]


def everything_of(bank: ExperienceBank) -> list[Any]:
    """All that can be read of a bank, but its version, its times and its size."""
    info = vars(bank.info()) | {"schema_version": 0, "num_bytes": 0}
    found = [(hit.trajectory.id, hit.similarity) for hit in bank.search(ASKED, k=9, tenants=["", "acme"])]
    return [info, found, list(bank), bank.ids(), bank.newest(9, success=True), bank.get([OLD[1].id]), bank.digest()]


def test_a_bank_of_version_1_is_read_as_it_is_and_migrated_by_the_first_write(store: Store, tmp_path: Path) -> None:
    begin_1(store, OLD)
    with ExperienceBank(store, embed, embedder="hashing") as bank:
        before = everything_of(bank)
        assert (bank.info().schema_version, bank.info().tenants) == (1, {"": 3})
        assert list(bank) == OLD
        assert bank.search(ASKED, k=9, tenants=["acme"]) == []
        assert bank.verify().ok
        bank.copy_to(tmp_path / "copy.sqlite")
        assert sql(store, "SELECT value FROM meta WHERE key = 'schema_version'")[0][0] in (1, "1")
        with ExperienceBank(store, embed, embedder="hashing") as other:
            assert other.upgrade() == 2
        assert everything_of(bank) == before  # in a connection that was opened before
        assert bank.verify().ok
        assert bank.info().schema_version == 2
        late = make("late").model_copy(update={"schema_version": 2})
        insert_1(store, late)  # a process of an older version that has the bank open
        assert bank.add([*OLD, late, make("mine", "acme", session="s1")]) == AddReport(1, 4)
        assert bank.verify().ok
        assert len(bank.seen_by([""])) == 4
        assert bank.delete(session="s1").count == 1
    with ExperienceBank(tmp_path / "copy.sqlite", embed, embedder="hashing") as copy:
        assert copy.add(make("new", "acme")) == AddReport(1, 0)
        assert list(copy.seen_by([""])) == OLD
        assert copy.verify().ok


def test_adding_to_a_bank_of_version_1_migrates_it_in_the_same_transaction(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_1(store, OLD)
    with ExperienceBank(store, embed, embedder="hashing") as bank:
        with monkeypatch.context() as patch:  # the migration fails at its last statement
            patch.setattr(sqlite, "_FROM_VERSION_1", (*sqlite._FROM_VERSION_1, "INSERT INTO meta VALUES (NULL, NULL)"))
            patch.setattr(postgres, "_FROM_VERSION_1", postgres._FROM_VERSION_1 + "INSERT INTO meta VALUES (NULL, '')")
            with pytest.raises(BankError):
                bank.add(make("new"))
        assert bank.info().schema_version == 1
        assert list(bank) == OLD
        assert bank.verify().ok
        assert bank.add(make("new", "acme")) == AddReport(1, 0)
        assert (bank.info().schema_version, bank.info().tenants) == (2, {"": 3, "acme": 1})
        assert bank.verify().ok


def test_who_may_not_migrate_a_server_reads_it_and_is_told_who_may(
    postgres_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))
    url = postgres_server.new_bank()
    begin_1(url, OLD)
    name = read_url(url).name
    sql(
        url,
        f'CREATE ROLE writer LOGIN; GRANT USAGE ON SCHEMA "{name}" TO writer; '
        f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "{name}" TO writer',
    )
    with ExperienceBank(url.replace("tester@", "writer@"), embed, embedder="hashing") as bank:
        assert list(bank) == OLD
        assert len(bank.search(ASKED, k=9)) == 3
        with pytest.raises(BankError, match="schema 1, which this version can only read; let its owner run `latentm"):
            bank.add(make("new"))
        with ExperienceBank(url) as owner:
            assert owner.upgrade() == 2
        sql(url, f'GRANT UPDATE ON ALL TABLES IN SCHEMA "{name}" TO writer')
        assert bank.add(make("new")) == AddReport(1, 0)


def test_an_index_of_the_older_form_is_replaced_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "bank.sqlite"
    with ExperienceBank(path, embed) as bank:
        bank.add([make("a"), make("b", "acme")])
        bank.search(ASKED, k=1)
    file = path.with_name("bank.sqlite.index")
    file.write_bytes(b"LMEMIDX2" + file.read_bytes()[8:])
    with ExperienceBank(path, embed) as bank:
        assert bank.verify().ok
        assert [hit.trajectory for hit in bank.search(ASKED, k=9, tenants=["acme"])] == [make("b", "acme")]
    assert file.read_bytes()[:8] != b"LMEMIDX2"
    assert not caplog.records


def test_a_bank_of_version_1_on_a_shelf_is_read_and_not_added_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bank.sqlite"
    begin_1(path, OLD)
    content = path.read_bytes()
    # As on a file system that is mounted for reading; a superuser may write wherever permissions forbid it.
    monkeypatch.setattr(sqlite, "open_database", lambda path, create: sqlite_file._connect(path, "mode=ro&immutable=1"))
    with ExperienceBank(path, embed, embedder="hashing") as bank:
        assert list(bank) == OLD
        assert len(bank.search(ASKED, k=9, tenants=[""])) == 3
        assert bank.verify().ok
        for change in (lambda: bank.add(make("new")), bank.upgrade, lambda: bank.delete(everything=True)):
            with pytest.raises(BankError, match="cannot be written; check the permissions of the file"):
                change()
        assert (bank.info().schema_version, len(bank)) == (1, 3)
    assert path.read_bytes() == content


def test_the_command_upgrades_a_bank_and_says_its_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bank.sqlite"
    begin_1(path, OLD)
    for _ in range(2):
        assert cli.main(["bank", "upgrade", str(path)]) == 0
        assert capsys.readouterr().out == f"{path}: schema 2\n"
    with ExperienceBank(path) as bank:
        assert list(bank) == OLD
