"""`latentmem forget` and `latentmem replay`: what may be asked about what a server recorded."""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.cli.arguments import CONFIG_HELP, count, serving_packages, takes_overrides

if TYPE_CHECKING:
    from latentmem.cli.arguments import Commands
    from latentmem.config import Config


def add_commands(commands: "Commands") -> None:
    """Add the commands `forget` and `replay`."""
    forget = commands.add_parser(
        "forget", help="delete recorded episodes wherever they are, with a receipt and a proof"
    )
    forget.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    forget.add_argument("--tenant", metavar="NAME", help="whose (default: everybody's)")
    forget.add_argument("--session", metavar="ID")
    forget.add_argument("--domain", metavar="NAME")
    forget.add_argument("--task-id", metavar="ID")
    forget.add_argument("--success", choices=("yes", "no"))
    forget.add_argument("--before", type=_moment, metavar="DATE", help="recorded earlier, as 2026-01-31, in UTC")
    forget.add_argument("--everything", action="store_true", help="that no filter is given is meant so")
    forget.add_argument("--derived", action="store_true", help="also episodes played with a memory made of these")
    forget.add_argument("--dry-run", action="store_true", help="only count")
    forget.add_argument("--receipt", type=Path, metavar="FILE", help="write the receipt as JSON")
    takes_overrides(forget)
    forget.set_defaults(run=_forget)
    replay = commands.add_parser("replay", help="sample a session's calls again, with and without memory")
    replay.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    replay.add_argument("session", metavar="SESSION")
    replay.add_argument("--tenant", default="", metavar="NAME", help="whose it is (default: the operator's)")
    replay.add_argument(
        "--limit", type=count, default=256, metavar="N", help="longest response in tokens (default 256)"
    )
    takes_overrides(replay)
    replay.set_defaults(run=_replay)


def _moment(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2026-01-31") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _config(options: argparse.Namespace, route: str) -> "Config":
    """Read the configuration; a server that works in the run's folder can be asked at a route instead."""
    from latentmem.cli.early import check_stopped
    from latentmem.config import load_serving_config

    config = load_serving_config(options.config, options.overrides)
    check_stopped(config, f"ask it: POST {route}")
    return config


def _forget(options: argparse.Namespace) -> None:
    from latentmem.errors import BankError
    from latentmem.files import write_atomic

    config = _config(options, "/forget")
    with serving_packages():
        from latentmem.recipes.rights import forget
        from latentmem.serving.rights.forget import Wish

    wish = Wish(
        tenant=options.tenant,
        session=options.session,
        domain=options.domain,
        task_id=options.task_id,
        success=None if options.success is None else options.success == "yes",
        before=options.before,
        everything=options.everything,
        derived=options.derived,
    )
    found = forget(config, wish, dry_run=options.dry_run)
    if options.receipt is not None:
        write_atomic(options.receipt, json.dumps(found.as_json(), ensure_ascii=False, indent=1) + "\n")
    what = f"{found.count} trajectories and {found.num_sessions} sessions"
    if found.is_dry_run:
        print(f"{what} would be forgotten; nothing was deleted")
    else:
        print(f"{what} are forgotten; {found.num_scrubbed} calls of others lost what they were told of them")
    for each in found.tenants if options.tenant is None else ():
        whose = f"tenant {each.tenant}" if each.tenant else "no tenant"
        print(f"  of {whose}: {each.count} trajectories and {each.num_sessions} sessions")
    if found.derived and not options.derived:
        print(f"{len(found.derived)} trajectories were played with a memory made of them; --derived forgets these too")
    if found.proof is None:
        return
    if not found.proof.holds:
        raise BankError(f"something is left: {'; '.join(found.proof.problems[:3]) or 'kept latents'}; run this again")
    print(f"nothing of it is recalled: {found.proof.num_searches} searches for it found none; audit {found.audit}")
    if not found.is_erased:
        print("another process hindered the files from being written anew: some bytes may be left; run this again")


def _replay(options: argparse.Namespace) -> None:
    config = _config(options, f"/sessions/{options.session}/replay")
    with serving_packages():
        from latentmem.recipes.rights import replay_session

    calls, missing = replay_session(config, options.tenant, options.session, options.limit)
    for call in calls:
        print(f"{call.call}  {call.role}  {call.memory} of {len(call.sources)} trajectories")
        print(f"  with memory     {call.with_memory.num_tokens:4} tokens  {call.with_memory.text!r}")
        print(f"  without memory  {call.without_memory.num_tokens:4} tokens  {call.without_memory.text!r}")
    if missing is not None:
        print(missing)
    if missing is None or calls:
        changed = sum(call.first_difference is not None for call in calls)
        print(f"{len(calls)} calls had a memory; it changed {changed} responses")
