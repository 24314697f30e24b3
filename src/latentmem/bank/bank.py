"""The experience bank: trajectories stored durably, and a search for the nearest ones.

Only the `records` are authoritative. Everything else can be made again: the search `matrix` from the records' vectors,
the `lists` of an approximate search from the matrix, the vectors from the task texts. The bank takes an embedding
function, never a model, and holds no lock on the database while that function runs.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self, TextIO

from latentmem.bank import jsonl
from latentmem.bank.check import check_records
from latentmem.bank.embedding import Embed, check_embedder, unit_vectors
from latentmem.bank.exact import Vectors
from latentmem.bank.following import Indices
from latentmem.bank.forgetting import ForgottenReport, Receipt, forget, left_of
from latentmem.bank.lists import load_faiss
from latentmem.bank.matrix import Label
from latentmem.bank.records import open_records
from latentmem.bank.reembedding import reembed_records
from latentmem.bank.reports import AddReport, BankInfo, Found, VerifyReport
from latentmem.bank.stored_form import decode, decompress, encode
from latentmem.bank.tables import Filters, Meta, moment, record_of
from latentmem.bank.transaction import names_of
from latentmem.bank_place import Server, bank_place
from latentmem.config import BankSection, default
from latentmem.errors import BankError
from latentmem.trajectory import Task, Trajectory

_BATCH_SIZE = 256


class ExperienceBank:
    """Stored trajectories, and a search for the nearest ones.

    Any number of processes may read and write one bank: those of one host if it is a file, those of any host if it is
    on a server. Threads may share one object; they take turns. A forked child process must open its own.
    """

    def __init__(
        self,
        path: str | Path | Server,
        embed: Embed | None = None,
        *,
        embedder: str | None = None,
        index: Literal["exact", "approximate"] = default(BankSection, "index"),
        tenants: Collection[str] | None = None,
    ) -> None:
        """Open a bank; begin one if there is none and an embedder is given.

        Args:
            path: the SQLite file, whose index lies beside it as PATH.index; or the URL of a PostgreSQL server,
                postgresql://USER@HOST/DATABASE?bank=NAME, whose index each host keeps in its cache.
            embed: n texts -> [n, e]. Without it the bank can only be read, exported, verified and deleted from.
            embedder: a name for `embed`, by default its own. A bank holds vectors of one embedder, and keeps its name.
            index: how this object searches; the stored bank is the same. `approximate` is for a million trajectories
                and more, may miss some of the nearest, needs faiss, and keeps its lists beside the bank as PATH.lists.
            tenants: whose trajectories this object sees, the empty text being the common pool; None: everybody's. What
                reads, searches, counts or deletes trajectories knows no others; `verify` and copies take them all.

        Raises:
            ValueError: `index` is neither of the two.
            BankError: there is neither a bank nor an embedder; the file is not a bank, cannot be opened, or was written
                by a newer version or with another embedder (`reembed` changes it); or faiss is not installed.
        """
        if index not in ("exact", "approximate"):
            raise ValueError(f"index is {index!r}; it must be 'exact' or 'approximate'")
        self.path = bank_place(path)
        self.tenants = names_of(tenants)
        if index == "approximate":
            load_faiss(self.path)
        self._embed_function = embed
        self._embedder = embedder or str(getattr(embed, "name", "unnamed"))
        self._records = open_records(self.path, create=embed is not None)
        self._indices = Indices(self._records.beside, is_approximate=index == "approximate")
        if embed is not None:
            try:
                with self._records.read() as transaction:
                    self._check_embedder(transaction.meta())
            except BankError:
                self._records.close()
                raise

    def seen_by(self, tenants: Collection[str] | None) -> "ExperienceBank":
        """Return this same bank as these tenants see it; it shares the connection and the index, and takes no time."""
        view = copy.copy(self)
        view.tenants = names_of(tenants)
        return view

    def close(self) -> None:
        """Close the database; the object, and those that `seen_by` made of it, cannot be used afterwards."""
        self._records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, trajectories: Trajectory | Sequence[Trajectory]) -> AddReport:
        """Store a batch in one transaction. When this returns, all is on stable storage; if it raises, nothing is.

        Raises:
            DataError: a trajectory has no JSON form that could be read back (a lone surrogate, nan).
            BankError: there is no embedder, or another one than the bank's; a vector is useless; the bank is locked;
                or the disk is full.
        """
        batch = [trajectories] if isinstance(trajectories, Trajectory) else list(trajectories)
        self._needs_embedder()
        fresh: dict[str, Trajectory] = {}
        ids = [trajectory.id for trajectory in batch]
        with self._records.read() as transaction:
            there = transaction.present(ids)
        for id_, trajectory in zip(ids, batch, strict=True):
            if id_ not in there:
                fresh.setdefault(id_, trajectory)
        new = list(fresh.values())
        stored_forms = [encode(trajectory) for trajectory in new]
        vectors = self._embed([t.task.text for t in new], [f"trajectory {t.id}" for t in new])
        num_added = 0
        if new:
            with self._records.write() as transaction:
                self._check_embedder(transaction.meta(), vectors.shape[1])
                transaction.set_embedder(self._embedder, vectors.shape[1])
                num_added = transaction.insert(list(map(record_of, new, vectors, stored_forms)))
        return AddReport(num_added, len(batch) - num_added)

    def delete(
        self,
        *,
        success: bool | None = None,
        domain: str | None = None,
        role: str | None = None,
        team: str | None = None,
        tenant: str | None = None,
        session: str | None = None,
        task_id: str | None = None,
        before: datetime | None = None,
        ids: Iterable[str] | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> Receipt:
        """Delete the trajectories that meet all given filters, in one transaction, so that nothing of them is left.

        No search returns them from then on, in any process. When this returns, the index and the lists of this host are
        removed, and a SQLite file is written anew without their bytes, which takes time in proportion to the bank.

        Args:
            success: successes or failures.
            domain: the task's domain.
            role: a role that spoke.
            team: the team that played.
            tenant: whose they are; the empty text is the common pool.
            session: the session that a served episode came from.
            task_id: the task's id.
            before: a time with its zone; what was stored earlier. Trajectories of a bank that an older version wrote
                count as stored when it was migrated.
            ids: these trajectories; ids that are not there do not matter.
            everything: all trajectories.
            dry_run: whether only the receipt is made.

        Raises:
            ValueError: there is neither a filter nor `everything=True`, or there are both; or `before` has no zone.
            BankError: the bank is locked or cannot be written.
        """
        filters: Filters = {
            "success": success, "domain": domain, "role": role, "team": team, "tenant": tenant, "session": session,
            "task_id": task_id, "before": None if before is None else moment(before),
        }  # fmt: skip
        if everything == (ids is not None or any(value is not None for value in filters.values())):
            raise ValueError("delete takes at least one filter, or everything=True and no filter")
        wanted = None if ids is None else frozenset(ids)
        return forget(self._records, self._indices, filters, wanted, self.tenants, where=str(self.path), dry=dry_run)

    def forgotten(self, ids: Iterable[str]) -> ForgottenReport:
        """Look whether anything of these trajectories is left: in the records, their roles, the index or the lists.

        Other hosts' indices of a bank on a server cannot be looked into; each drops its own at its next search.

        Raises:
            BankError: the bank cannot be read.
        """
        wanted = frozenset(ids)  # before the bank is locked: the iterable may read the bank itself
        with self._records.read() as transaction:
            return left_of(transaction, self._indices, str(self.path), wanted)

    def upgrade(self) -> int:
        """Migrate a bank of an older version now, instead of when something is next stored; return its version.

        Raises:
            BankError: it cannot be written.
        """
        with self._records.write() as transaction:
            return transaction.schema_version()

    def reembed(
        self, embed: Embed, embedder: str, on_progress: Callable[[int, int], object] = lambda done, known: None
    ) -> int:
        """Embed every task text anew, make `embedder` the bank's embedder, and return the number of trajectories.

        All or nothing. Others may add trajectories while the embedder runs; these are embedded too. `on_progress` gets
        the number of trajectories done so far, and of those known so far, after each batch.

        Raises:
            BankError: a vector is useless, the bank is locked, or the disk is full.
        """
        num_embedded = reembed_records(self._records, self.path, embed, embedder, on_progress)
        self._embed_function, self._embedder = embed, embedder
        return num_embedded

    def search(
        self,
        task: Task,
        *,
        k: int,
        success: bool | None = None,
        domain: str | None = None,
        role: str | None = None,
        team: str | None = None,
        tenants: Collection[str] | None = None,
    ) -> list[Found]:
        """Return the k trajectories on other tasks with the nearest task texts, among those that pass all filters.

        The search is exact unless the bank was opened with index="approximate". Then some of the nearest may be missed,
        but each result passes the filters, has its exact similarity and is in order. A trajectory on the same task
        (`Task.same_as`) is never returned. The most similar comes first; of equal float32 similarities, the one stored
        first. There may be fewer than k. `tenants` stands in place of those that this object sees.

        Raises:
            ValueError: k < 1.
            BankError: there is no embedder, or another one than the bank's; a vector is useless; or the bank cannot be
                read.
            DataError: the task's text holds a lone surrogate, or a record is damaged.
        """
        filters: dict[str, Any] = {"success": success, "domain": domain, "role": role, "team": team, "tenants": tenants}
        return self.search_many([task], k=k, **filters)[0]

    def search_many(
        self,
        tasks: Sequence[Task],
        *,
        k: int,
        success: bool | None = None,
        domain: str | None = None,
        role: str | None = None,
        team: str | None = None,
        tenants: Collection[str] | None = None,
    ) -> list[list[Found]]:
        """Search for many tasks at once, as `search` does: one call of the embedder, one pass over the matrix."""
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        self._needs_embedder()
        queries = self._embed([task.text for task in tasks], [f"task {task.key!r}" for task in tasks])
        filters: Filters = {"success": success, "domain": domain, "role": role, "team": team}
        labels: list[Label] = [(name, value) for name, value in filters.items() if value is not None]
        seen = self.tenants if tenants is None else names_of(tenants)
        # One transaction is one snapshot: index, exclusions and records agree whatever others write meanwhile.
        with self._records.read() as transaction:
            meta = transaction.meta()
            if not tasks or meta.width is None:
                return [[] for _ in tasks]
            self._check_embedder(meta, queries.shape[1])
            index = self._indices.current(transaction, meta.generation, meta.width)
            ranked = index.nearest(queries, k, labels, [transaction.same_task(task) for task in tasks], seen)
            stored_forms = transaction.stored_forms({seq for row in ranked for seq, _ in row})
        trajectories = {seq: self._decode(seq, stored_form) for seq, stored_form in stored_forms.items()}
        return [[Found(trajectories[seq], similarity) for seq, similarity in row] for row in ranked]

    def get(self, ids: Iterable[str], *, tenants: Collection[str] | None = None) -> list[Trajectory]:
        """Return the trajectories of these ids, in the order of the ids.

        `tenants` stands in place of those that this object sees.

        Raises:
            BankError: an id is not in the bank, or belongs to another tenant; nothing tells which.
        """
        seen = self.tenants if tenants is None else names_of(tenants)
        wanted = list(ids)  # before the bank is locked: the iterable may read the bank itself
        stored_forms: list[tuple[int, bytes]] = []
        with self._records.read() as transaction:
            for id_ in wanted:
                seq = transaction.seq_of(id_, seen)
                if seq is None:
                    raise BankError(f"{self.path}: no trajectory {id_!r}; it was deleted, or belongs to another bank")
                stored_forms += transaction.stored_forms([seq]).items()
        return [self._decode(seq, stored_form) for seq, stored_form in stored_forms]

    def ids(self) -> list[str]:
        """Return the ids of all trajectories in the order they were stored."""
        with self._records.read() as transaction:
            return transaction.ids(self.tenants)

    def generation(self) -> str:
        """Return a name that stays equal until something is deleted or embedded anew; additions do not change it.

        What was made of trajectories of the bank, and is kept elsewhere, is void once this changes.
        """
        with self._records.read() as transaction:
            return transaction.meta().generation

    def digest(self) -> str:
        """Return a hash that stays equal until something is added, deleted or embedded anew.

        Only the ids and the generation of the vectors are read, no trajectory.
        """
        with self._records.read() as transaction:
            return transaction.digest(self.tenants)

    @contextmanager
    def frozen(self, during: str) -> Iterator[None]:
        """Check that nothing changes the bank while the body runs; `during` names the body's work, for the error.

        Raises:
            BankError: the bank changed; this is found when the body ends.
        """
        before, num_before = self.digest(), len(self)
        yield
        if self.digest() != before:
            raise BankError(
                f"{self.path}: the bank changed during {during} ({num_before} trajectories before, {len(self)} now), "
                "so the recalled episodes come from two states of it; stop what else writes to it, and run this again"
            )

    def ids_of(self, task: Task) -> list[str]:
        """Return the ids of the trajectories on this same task (`Task.same_as`); no search for it returns them."""
        with self._records.read() as transaction:
            return transaction.ids_at(transaction.same_task(task), self.tenants)

    def newest(self, k: int, *, success: bool) -> list[Trajectory]:
        """Return the k successes or failures stored last, the newest first."""
        with self._records.read() as transaction:
            stored_forms = transaction.newest(k, success, self.tenants)
        return [self._decode(seq, stored_form) for seq, stored_form in stored_forms]

    def __contains__(self, id_: str) -> bool:
        with self._records.read() as transaction:
            return transaction.seq_of(id_, self.tenants) is not None

    def __len__(self) -> int:
        with self._records.read() as transaction:
            return transaction.size(self.tenants)

    def __iter__(self) -> Iterator[Trajectory]:
        """Iterate over all trajectories in the order they were stored; the bank may be used meanwhile."""
        return (self._decode(seq, stored_form) for seq, stored_form in self._pages())

    def info(self) -> BankInfo:
        """Count what the bank holds."""
        with self._records.read() as transaction:
            meta, counts = transaction.meta(), transaction.counts(self.tenants)
        return BankInfo(
            path=str(self.path),
            schema_version=meta.schema_version,
            created=meta.created,
            embedder=meta.embedder,
            width=meta.width,
            num_bytes=self._records.num_bytes() + self._indices.num_bytes(),
            **counts,
        )

    def verify(self) -> VerifyReport:
        """Read everything and report what does not agree; needs no embedder and changes nothing.

        Kinds of problem: `sqlite` (the file itself), `json` (unreadable, not canonical), `id` (not the content's hash),
        `columns`, `roles` (not what the JSON says), `vector` (of wrong width or length), `index` (damaged).
        """
        with self._records.read() as transaction:
            num_checked, problems = check_records(transaction, self.path)
            kinds = {problem.kind for problem in problems}
            if not kinds & {transaction.kind, "vector"}:
                problems += self._indices.problems(transaction, with_labels=not kinds & {"columns", "roles"})
        return VerifyReport(num_checked, tuple(problems))

    def export(self, target: str | Path | TextIO) -> int:
        """Write one canonical JSON line per trajectory, in the order of storing, and return their number.

        A file is written in UTF-8 and replaced atomically; a stream should encode as UTF-8 and leave newlines alone.
        Embeddings are not exported: an import computes them again.

        Raises:
            BankError: the target cannot be written, or is the bank itself.
            DataError: a record is damaged.
        """
        lines = (decompress(stored_form, self._where(seq)) for seq, stored_form in self._pages())
        if not isinstance(target, str | Path):
            return jsonl.write_stream(lines, target)
        return jsonl.write_file(lines, Path(target), not_over=[*self._records.files(), *self._indices.files])

    def copy_to(self, target: Path) -> None:
        """Copy the bank, as it is at one moment, to a new SQLite file; others may write to it meanwhile.

        When this returns, the copy is on stable storage.

        Raises:
            BankError: the bank cannot be read, or the copy not be written.
        """
        self._records.copy_to(target)

    def import_jsonl(self, path: str | Path, on_progress: Callable[[int], None] | None = None) -> AddReport:
        r"""Store the lines of a file that `export` wrote; lines end at b"\n" only.

        Lines are stored in batches of 256, each all or nothing. A trajectory that is already stored counts as a
        duplicate, so an interrupted import can simply be repeated. `on_progress` gets the number of lines done so far
        after each batch.

        Raises:
            DataError: the file cannot be read, or a line is not a trajectory; says which, and what was stored before.
            BankError: as for `add`.
        """
        self._needs_embedder()
        num_added = num_done = 0
        for trajectories in jsonl.read_batches(Path(path), _BATCH_SIZE):
            num_added += self.add(trajectories).num_added
            num_done += len(trajectories)
            if on_progress is not None:
                on_progress(num_done)
        return AddReport(num_added, num_done - num_added)

    def _pages(self) -> Iterator[tuple[int, bytes]]:
        """Yield all record numbers and stored forms in order; no transaction is open while the caller works on one."""
        reached = 0
        while True:
            with self._records.read() as transaction:
                page = transaction.page(reached, _BATCH_SIZE, self.tenants)
            if not page:
                return
            yield from page
            reached = page[-1][0]

    def _needs_embedder(self) -> Embed:
        if self._embed_function is None:
            raise BankError(f"{self.path}: opened without an embedder, so only for reading; open it with one")
        return self._embed_function

    def _embed(self, texts: list[str], names: list[str]) -> Vectors:
        return unit_vectors(self._needs_embedder(), texts, [f"{self.path}: {name}" for name in names])

    def _check_embedder(self, meta: Meta, width: int | None = None) -> None:
        check_embedder(self.path, meta, self._embedder, width)

    def _decode(self, seq: int, stored_form: bytes) -> Trajectory:
        return decode(stored_form, self._where(seq))

    def _where(self, seq: int) -> str:
        return f"{self.path}: record {seq}"
