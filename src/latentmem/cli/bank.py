"""`latentmem bank`: inspect an experience bank, change it, and move it elsewhere."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.cli.arguments import bank as bank_argument
from latentmem.cli.arguments import count, positive, takes_pulled, takes_pushed

if TYPE_CHECKING:
    from latentmem.bank import BankInfo, ExperienceBank
    from latentmem.bank_place import Place
    from latentmem.cli.arguments import Commands


_FILTERS = ("success", "domain", "role", "team", "tenant", "session", "task_id", "ids")
"""Those of `bank delete` whose options bear their names."""

_BANK = "the bank's SQLite file, or postgresql://USER@HOST/DATABASE?bank=NAME"


def add_commands(commands: "Commands") -> None:
    """Add the command `bank` and its subcommands."""
    bank = commands.add_parser(
        "bank", help="look into an experience bank, search, export, import, copy, verify, delete, reembed, push, pull"
    )
    kinds = bank.add_subparsers(required=True, metavar="WHAT")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        parser = kinds.add_parser(name, help=text)
        parser.add_argument("bank", type=bank_argument, metavar="BANK", help=_BANK)
        return parser

    command("info", "what is stored").set_defaults(run=_info)
    search = command("search", "the trajectories nearest to a text")
    search.add_argument("text")
    search.add_argument("-k", type=count, default=3, help="how many (default 3)")
    search.add_argument("--success", choices=("yes", "no"), help="only successful, or only failed, trajectories")
    search.add_argument("--domain", help="only this domain")
    search.add_argument("--role", help="only trajectories with this role")
    search.add_argument("--tenant", help="only this tenant's; '' is the common pool (default: everybody's)")
    search.set_defaults(run=_search)
    export = command("export", "write all trajectories as JSON Lines")
    export.add_argument("file", type=Path, help="where to write; - is standard output")
    export.add_argument("--tenant", help="only this tenant's; '' is the common pool (default: everybody's)")
    export.set_defaults(run=_export)
    importer = command("import", "add the trajectories of a JSON Lines file or of a released bank")
    importer.add_argument(
        "source", type=Path, metavar="SOURCE", help="JSON Lines of `bank export`, a Chroma folder, or its data.json"
    )
    importer.set_defaults(run=_import)
    copy = command("copy", "add all trajectories to another bank, with their vectors")
    copy.add_argument("target", type=bank_argument, metavar="TARGET", help="another bank; made if there is none")
    copy.set_defaults(run=_copy)
    command("verify", "check every record and the index").set_defaults(run=_verify)
    delete = command("delete", "delete the trajectories that meet all filters given, and check that none is left")
    delete.add_argument("--success", choices=("yes", "no"))
    delete.add_argument("--domain")
    delete.add_argument("--role", help="a role that spoke")
    delete.add_argument("--team")
    delete.add_argument("--tenant", help="whose they are; '' is the common pool")
    delete.add_argument("--session", help="the session that a served episode came from")
    delete.add_argument("--task-id", help="the task's id")
    delete.add_argument("--id", action="append", dest="ids", metavar="ID", help="a trajectory; may be given again")
    delete.add_argument("--older-than", type=positive, metavar="DAYS", help="stored more than so many days ago")
    delete.add_argument("--dry-run", action="store_true", help="only list them")
    delete.add_argument("--receipt", type=Path, metavar="FILE", help="write what was deleted, and when, as JSON")
    delete.set_defaults(run=_delete)
    reembed = command("reembed", "make all vectors again with another embedder")
    reembed.add_argument("--embedder", required=True, metavar="NAME", help="as in bank.embedder")
    reembed.set_defaults(run=_reembed)
    upgrade = command("upgrade", "bring a bank of an older version up to date now; else the next writer does it")
    upgrade.set_defaults(run=_upgrade)
    push = command("push", "send a copy to the Hugging Face hub, with a card")
    takes_pushed(push)
    push.set_defaults(run=_push)
    pull = kinds.add_parser("pull", help="bring a bank from the Hugging Face hub")
    takes_pulled(pull)
    pull.add_argument("bank", type=bank_argument, metavar="BANK", help="the SQLite file to write")
    pull.set_defaults(run=_pull)


def _open_bank(place: "Place", embed: bool = False, make: bool = False) -> "ExperienceBank":
    """Open the bank. With `embed`, load the embedder that filled it; with `make`, create a bank that does not exist."""
    from latentmem.bank import ExperienceBank, bank_exists
    from latentmem.errors import BankError

    if not make and isinstance(place, Path) and not place.is_file():
        raise BankError(f"{place}: no such bank; give the bank.sqlite of a run")
    if not embed:
        return ExperienceBank(place)
    from latentmem.config import BankSection

    filled_by = None
    if bank_exists(place):
        with ExperienceBank(place) as bank:
            filled_by = bank.info().embedder
    from latentmem.models.embedder import load_embedder

    embedder = load_embedder(filled_by or BankSection().embedder)
    return ExperienceBank(place, embedder, embedder=embedder.name)


def _success(options: argparse.Namespace) -> bool | None:
    return None if options.success is None else options.success == "yes"


def _tenants(options: argparse.Namespace) -> list[str] | None:
    return None if options.tenant is None else [options.tenant]


def _info(options: argparse.Namespace) -> None:
    with _open_bank(options.bank) as bank:
        info = bank.info()
    reward = "" if info.mean_reward is None else f", mean reward {info.mean_reward:.3f}"
    print(f"{info.path}: {info.num_trajectories} trajectories, {info.num_successes} successes{reward}")
    print(f"created {info.created}, schema {info.schema_version}, {info.num_bytes / 2**20:.1f} MB")
    print(f"embedder {info.embedder}, width {info.width}" if info.embedder else "embedder: none yet")
    for label in ("domains", "teams", "models", "roles", "tenants"):
        counts = getattr(info, label)
        if counts and [*counts] != [""]:
            named = {name or "(common pool)" if label == "tenants" else name: num for name, num in counts.items()}
            print(f"{label}: {', '.join(f'{name} {num}' for name, num in named.items())}")


def _search(options: argparse.Namespace) -> None:
    from latentmem.trajectory import Task

    with _open_bank(options.bank, embed=True) as bank:
        task = Task(id=None, domain=options.domain or "", text=options.text)
        seen = bank.seen_by(_tenants(options))
        hits = seen.search(task, k=options.k, success=_success(options), domain=options.domain, role=options.role)
        if not hits:
            print(f"{options.bank}: {_why_none(seen.info(), options)}", file=sys.stderr)
        for hit in hits:
            text = " ".join(hit.trajectory.task.text.split())[:100]
            print(f"{hit.similarity:.3f}  {hit.trajectory.id}  reward {hit.trajectory.reward:g}  {text}")


def _why_none(info: "BankInfo", options: argparse.Namespace) -> str:
    """Say why a search found nothing, as far as that is known."""
    from latentmem.errors import suggest

    if not info.num_trajectories:
        return "no trajectory is there to be found"
    for what, asked, known in (("role", options.role, info.roles), ("domain", options.domain, info.domains)):
        if asked is not None and asked not in known:
            return f"no trajectory has the {what} {asked!r}; {suggest(asked, known)}"
    return f"none of {info.num_trajectories} trajectories fits; those whose task is this very text are never found"


def _export(options: argparse.Namespace) -> None:
    with _open_bank(options.bank) as opened:
        bank = opened.seen_by(_tenants(options))
        if str(options.file) == "-":
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
            bank.export(sys.stdout)
        else:
            print(f"{bank.export(options.file)} trajectories written to {options.file}")


def _import(options: argparse.Namespace) -> None:
    from latentmem.errors import DataError

    if not options.source.exists():  # checked first, so that no new bank is made in vain
        raise DataError(
            f"{options.source}: no such file or folder; give the JSON Lines of `latentmem bank export`, "
            "or the authors' bank, a Chroma folder or a data.json"
        )
    from latentmem.released import is_released_bank, read_bank

    released = read_bank(options.source) if is_released_bank(options.source) else None
    with _open_bank(options.bank, embed=True, make=True) as bank:
        added = bank.import_jsonl(options.source) if released is None else bank.add(released.trajectories)
    print(f"{added.num_added} trajectories added, {added.num_duplicates} were there already")
    if released is not None and released.unreadable:
        print(f"{len(released.unreadable)} entries could not be read:")
        for why, num in Counter(entry.why for entry in released.unreadable).most_common():
            first = next(entry.where for entry in released.unreadable if entry.why == why)
            print(f"{num:6} {why} (first: {first})")


def _copy(options: argparse.Namespace) -> None:
    from latentmem.bank import copy_records

    num_added, num_duplicates = copy_records(options.bank, options.target)
    print(f"{num_added} trajectories copied to {options.target}, {num_duplicates} were there already")


def _verify(options: argparse.Namespace) -> None:
    from latentmem.errors import BankError

    with _open_bank(options.bank) as bank:
        result = bank.verify()
    for problem in result.problems:
        print(f"{problem.kind}: {problem.where}: {problem.found}")
    print(f"{result.num_checked} trajectories checked, {len(result.problems)} problems")
    if not result.ok:
        raise BankError(f"{options.bank}: {len(result.problems)} problems; restore it from an export or a copy")


def _delete(options: argparse.Namespace) -> None:
    from datetime import UTC, datetime, timedelta

    from latentmem.errors import BankError
    from latentmem.files import write_atomic

    filters = {name: getattr(options, name) for name in _FILTERS} | {"success": _success(options)}
    if options.older_than is not None:
        try:
            filters["before"] = datetime.now(UTC) - timedelta(days=options.older_than)
        except OverflowError:
            raise BankError(f"--older-than {options.older_than:g} is before all time; give fewer days") from None
    if all(value is None for value in filters.values()):
        raise BankError("bank delete needs a filter, such as --domain or --tenant; `bank delete --help` lists them")
    if options.receipt is not None and not options.receipt.absolute().parent.is_dir():
        raise BankError(
            f"{options.receipt}: there is no folder of that name to write the receipt into; nothing was done"
        )
    if options.receipt is not None and options.receipt.exists():
        raise BankError(f"{options.receipt}: exists already, and no receipt is overwritten; name another file")
    with _open_bank(options.bank) as bank:
        receipt = bank.delete(**filters, dry_run=options.dry_run)
        if options.receipt is not None:
            write_atomic(options.receipt, receipt.to_json())
        if options.dry_run:
            for id_ in receipt.ids:
                print(id_)
            print(f"{receipt.count} trajectories would be deleted")
            return
        left = bank.forgotten(receipt.ids)
    print(f"{receipt.count} trajectories deleted")
    if not left.ok:
        first = left.problems[0]
        raise BankError(
            f"{first.where}: {first.found} ({len(left.problems)} such problems); they are deleted, but not all of "
            "what was made of them"
        )


def _reembed(options: argparse.Namespace) -> None:
    from latentmem.models.embedder import load_embedder
    from latentmem.progress import progress

    with _open_bank(options.bank) as bank:
        embedder = load_embedder(options.embedder)
        with progress(len(bank), "reembed", "trajectory") as bar:

            def on_progress(num_done: int, num_known: int) -> None:
                bar.total = num_known
                bar.update(num_done - bar.n)

            num_embedded = bank.reembed(embedder, embedder.name, on_progress)
    print(f"{num_embedded} trajectories embedded with {embedder.name}")


def _upgrade(options: argparse.Namespace) -> None:
    with _open_bank(options.bank) as bank:
        print(f"{options.bank}: schema {bank.upgrade()}")


def _push(options: argparse.Namespace) -> None:
    from latentmem.hub import push_bank

    print(push_bank(options.bank, options.repo, public=options.public))


def _pull(options: argparse.Namespace) -> None:
    from latentmem.errors import BankError
    from latentmem.hub import pull_bank

    if not isinstance(options.bank, Path):
        raise BankError(
            f"{options.bank}: pull writes a SQLite file; name one, then `latentmem bank copy` it to the URL"
        )
    info = pull_bank(options.repo, options.bank, options.revision, force=options.force)
    print(f"{info.num_trajectories} trajectories, {info.num_successes} successes, written to {options.bank}")
