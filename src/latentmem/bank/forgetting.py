"""Forgetting: what is deleted, the receipt of it, and a look for what may be left of it.

A bank forgets in three steps: one transaction takes the records away and voids every index, the files of this host that
were derived from them are removed, and the database's own file is written anew, since one from which rows were deleted
still holds some of their bytes. Another process may hinder the last two; the receipt, and `left_of`, say so.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from latentmem.bank.following import Indices
from latentmem.bank.records import Records
from latentmem.bank.tables import Filters, Problem, now
from latentmem.bank.transaction import Tenants, Transaction


@dataclass(frozen=True)
class Receipt:
    """What was deleted from a bank, or would be."""

    bank: str
    filters: Mapping[str, str | bool | list[str] | None]
    """The filters that were given; none: everything."""
    ids: tuple[str, ...]
    """Ids of the trajectories that met them, in the order they were stored."""
    is_dry_run: bool
    """Whether nothing was deleted."""
    time: str
    """Date and time in UTC, ISO 8601."""
    digest_before: str
    """`ExperienceBank.digest` of the whole bank before."""
    digest_after: str
    is_erased: bool
    """Whether this host's files hold nothing of it any more. False for a dry run; on a server, whose own files are its
    administrator's business; and where another process hindered it, which a warning tells."""

    @property
    def count(self) -> int:
        """Number of trajectories."""
        return len(self.ids)

    def to_json(self) -> str:
        """Return the receipt as JSON, with the count."""
        return json.dumps({"count": self.count} | asdict(self), ensure_ascii=False, indent=1) + "\n"


def forget(
    records: Records,
    indices: Indices,
    filters: Filters,
    ids: Collection[str] | None,
    tenants: Tenants,
    *,
    where: str,
    dry: bool,
) -> Receipt:
    """Delete the trajectories of some tenants that meet all filters, or count them.

    Args:
        records: what is deleted from.
        indices: what was derived from them on this host.
        filters: what all of them meet.
        ids: those of them that are meant; None: all.
        tenants: whose trajectories may be deleted.
        where: names the bank in the receipt.
        dry: whether nothing is deleted.

    Raises:
        BankError: the bank is locked or cannot be written.
    """
    with records.read() if dry else records.write() as transaction:
        before = transaction.digest()
        doomed = transaction.meeting(filters, tenants)
        if ids is not None:
            wanted = frozenset(ids)
            doomed = {seq: id_ for seq, id_ in doomed.items() if id_ in wanted}
        if not dry:
            transaction.delete(doomed)
        after = transaction.digest()
    if not dry:
        with records.read():  # whoever searches in this process waits
            indices.drop()
    is_erased = not dry and records.erase()
    if not dry:
        with records.read() as transaction:  # another process that was searching may have written its index meanwhile
            if any(indices.leftovers(transaction, {*doomed.values()})):
                indices.drop()
    given: dict[str, str | bool | list[str] | None] = {k: v for k, v in filters.items() if v is not None}
    return Receipt(
        bank=where,
        filters=given if ids is None else given | {"ids": sorted(ids)},
        ids=tuple(doomed.values()),
        is_dry_run=dry,
        time=now(),
        digest_before=before,
        digest_after=after,
        is_erased=is_erased,
    )


@dataclass(frozen=True)
class ForgottenReport:
    """What a look for forgotten trajectories found."""

    num_ids: int
    """Number of ids that were looked for."""
    problems: tuple[Problem, ...]
    """Where something of them is left."""

    @property
    def ok(self) -> bool:
        """Whether nothing of them is left: no search, and no file of this host, knows them."""
        return not self.problems


def left_of(transaction: Transaction, indices: Indices, where: str, ids: Collection[str]) -> ForgottenReport:
    """Look for trajectories in the records, the roles, the index and the lists."""
    wanted = set(ids)
    problems = [Problem("id", where, f"trajectory {id_} is stored") for id_ in sorted(transaction.present([*wanted]))]
    problems += [
        Problem("roles", where, f"record {seq} is gone, but not its roles") for seq in transaction.stray_roles()
    ]
    problems += indices.leftovers(transaction, wanted)
    return ForgottenReport(len(wanted), tuple(problems))
