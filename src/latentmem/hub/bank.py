"""A bank in a dataset repository: one SQLite file, a copy of one moment; a pulled bank makes its own index."""

import logging
import os
import tempfile
from pathlib import Path

from latentmem.bank import ExperienceBank
from latentmem.bank.copies import check_tables_only, copy_bank, new_generation
from latentmem.bank.reports import BankInfo
from latentmem.bank_place import Server, bank_place
from latentmem.errors import BankError
from latentmem.hub.cards import bank_card
from latentmem.hub.transfer import fetch, push, snapshot

logger = logging.getLogger(__name__)

_FILE = "bank.sqlite"


def push_bank(path: str | Path | Server, repo: str, *, public: bool = False) -> str:
    """Send a bank with a card and return the address of the commit. Others may write to the bank meanwhile.

    Episodes of tenants are not the sender's to publish: the copy that is sent holds the common pool alone.

    Args:
        path: the bank's SQLite file, or a server's URL; what is sent is a SQLite file.
        repo: OWNER/NAME; made if there is none.
        public: whether everybody may read a repository that is made now.

    Raises:
        BankError: there is no bank, or it has problems.
        HubError: the hub does not answer, or refuses.
    """
    bank = bank_place(path)
    beside = bank.parent if isinstance(bank, Path) and os.access(bank.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{bank.name}.push-") as place:
        copy = Path(place) / _FILE
        with ExperienceBank(bank) as opened:
            opened.copy_to(copy)
        info = _verified(copy, str(bank))
        if tenants := [name for name in info.tenants if name]:
            info = _without(tenants, copy, str(bank))
        card = bank_card(repo, info).encode("utf-8", "replace")
        return push(repo, "dataset", {_FILE: copy, "README.md": card}, "Experience bank of LatentMem", public=public)


def _without(tenants: list[str], copy: Path, where: str) -> BankInfo:
    with ExperienceBank(copy) as bank:
        receipt = bank.seen_by(tenants).delete(everything=True)
        logger.warning("%s: %d trajectories of tenants are not sent, only the common pool", where, receipt.count)
        return bank.info()


def pull_bank(repo: str, path: Path, revision: str | None = None, *, force: bool = False) -> BankInfo:
    """Bring a bank to a path, all of it or nothing, and return what it holds.

    Args:
        repo: OWNER/NAME.
        path: the path for the SQLite file; without `force`, an existing file is kept.
        revision: branch, tag or commit; None is the main branch.
        force: whether to replace a bank at `path`; another kind of file is never replaced.

    Raises:
        BankError: something is at `path`; or the hub's file is not a bank, or has problems.
        HubError: the hub does not answer, or refuses, or has no such repository.
    """
    if os.path.lexists(path):
        if not force:
            raise BankError(f"{path}: exists already; name another file, or replace that bank with --force")
        ExperienceBank(path).close()  # raises an error unless it is a bank
    found = snapshot(repo, "dataset", revision)
    if _FILE not in found.digests:
        raise BankError(f"{repo}: holds no {_FILE}; name the repository of a bank that `bank push` sent")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.pull-") as place:
            came = fetch(found, _FILE, Path(place))
            info = _verified(came, f"{repo}: {_FILE}")
            _put(came, path, force)
    except OSError as error:
        raise BankError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    return info


def _verified(path: Path, name: str) -> BankInfo:
    """Check a bank and return what it holds; `name` stands for its path in errors."""
    try:
        check_tables_only(path)
        with ExperienceBank(path) as bank:
            result, info = bank.verify(), bank.info()
    except BankError as error:
        raise BankError(str(error).replace(str(path), name)) from None
    if not result.ok:
        first = result.problems[0]
        where = first.where.replace(f"{path}: ", "").replace(str(path), "the file")
        raise BankError(f"{name}: {len(result.problems)} problems, the first: {first.kind}: {where}: {first.found}")
    return info


def _put(came: Path, path: Path, force: bool) -> None:
    if force and path.exists():
        new_generation(came)
        for derived in (".index", ".lists"):
            path.with_name(path.name + derived).unlink(missing_ok=True)
        copy_bank(came, path)
        return
    with came.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(came, path)  # unlike a move, it replaces nothing if another process was faster
    except FileExistsError:
        raise BankError(f"{path}: was made meanwhile by another program; name another file, or use --force") from None
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
