"""`latentmem bank`: inspect an experience bank, change it, and move it elsewhere."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.cli.arguments import bank as bank_argument
from latentmem.cli.arguments import count, takes_pulled, takes_pushed

if TYPE_CHECKING:
    from latentmem.bank import ExperienceBank
    from latentmem.bank_place import Place
    from latentmem.cli.arguments import Commands


_BANK = "the bank's SQLite file, or postgresql://USER@HOST/DATABASE?bank=NAME"


def add_commands(commands: "Commands") -> None:
    """Add the command `bank` and its subcommands."""
    bank = commands.add_parser(
        "bank", help="look into an experience bank, search, export, import, copy, verify, delete, push, pull"
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
    search.set_defaults(run=_search)
    export = command("export", "write all trajectories as JSON Lines")
    export.add_argument("file", type=Path, help="where to write; - is standard output")
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
    delete = command("delete", "delete the trajectories that meet all filters given")
    delete.add_argument("--success", choices=("yes", "no"))
    delete.add_argument("--domain")
    delete.add_argument("--role")
    delete.add_argument("--team")
    delete.set_defaults(run=_delete)
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


def _info(options: argparse.Namespace) -> None:
    with _open_bank(options.bank) as bank:
        info = bank.info()
    reward = "" if info.mean_reward is None else f", mean reward {info.mean_reward:.3f}"
    print(f"{info.path}: {info.num_trajectories} trajectories, {info.num_successes} successes{reward}")
    print(f"created {info.created}, schema {info.schema_version}, {info.num_bytes / 2**20:.1f} MB")
    print(f"embedder {info.embedder}, width {info.width}" if info.embedder else "embedder: none yet")
    for label in ("domains", "teams", "models", "roles"):
        counts = getattr(info, label)
        if counts:
            print(f"{label}: {', '.join(f'{name} {num}' for name, num in counts.items())}")


def _search(options: argparse.Namespace) -> None:
    from latentmem.trajectory import Task

    with _open_bank(options.bank, embed=True) as bank:
        task = Task(id=None, domain=options.domain or "", text=options.text)
        for hit in bank.search(task, k=options.k, success=_success(options), domain=options.domain, role=options.role):
            text = " ".join(hit.trajectory.task.text.split())[:100]
            print(f"{hit.similarity:.3f}  {hit.trajectory.id}  reward {hit.trajectory.reward:g}  {text}")


def _export(options: argparse.Namespace) -> None:
    with _open_bank(options.bank) as bank:
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
    from latentmem.errors import BankError

    filters = {"success": _success(options), "domain": options.domain, "role": options.role, "team": options.team}
    if all(value is None for value in filters.values()):
        raise BankError("bank delete needs a filter: --success, --domain, --role or --team")
    with _open_bank(options.bank) as bank:
        print(f"{bank.delete(**filters)} trajectories deleted")


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
