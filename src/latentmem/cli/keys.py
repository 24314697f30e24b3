"""`latentmem keys` and `latentmem audit`: who may use a server, and what happened to what was recorded."""

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.cli.arguments import CONFIG_HELP, count, positive, takes_overrides

if TYPE_CHECKING:
    from latentmem.cli.arguments import Commands
    from latentmem.config import Config
    from latentmem.serving.operators.keys import Keys


def add_commands(commands: "Commands") -> None:
    """Add the commands `keys` and `audit` and their subcommands."""
    keys = commands.add_parser("keys", help="make, list and revoke the API keys of `latentmem serve`")
    kinds = keys.add_subparsers(required=True, metavar="WHAT")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = kinds.add_parser(name, help=text)
        parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
        return parser

    create = command("create", "make a key; its secret is printed once")
    create.add_argument("--tenant", default="", metavar="NAME", help="whose it is (default: the operator's own)")
    create.add_argument("--scopes", default="infer,read,write", metavar="LIST", help="some of infer,read,write,admin")
    create.add_argument("--expires", type=positive, metavar="DAYS", help="after so many days (default never)")
    create.add_argument("--requests-per-minute", type=count, metavar="N")
    create.add_argument("--tokens-per-minute", type=count, metavar="N")
    create.add_argument("--parallel", type=count, metavar="N", help="requests at the same time")
    create.add_argument("--shares", action="store_true", help="its judged episodes go to the pool that all recall")
    takes_overrides(create)
    create.set_defaults(run=_create)
    shown = command("list", "all keys, without their secrets")
    takes_overrides(shown)
    shown.set_defaults(run=_list)
    revoke = command("revoke", "end a key at once, also in servers that run")
    revoke.add_argument("id", metavar="ID", help="the key's id, as `keys list` shows it; never its secret")
    takes_overrides(revoke)
    revoke.set_defaults(run=_revoke)

    audit = commands.add_parser("audit", help="check the audit log of `latentmem serve`")
    kinds = audit.add_subparsers(required=True, metavar="WHAT")
    verify = kinds.add_parser("verify", help="find lines that were altered, removed or put in")
    verify.add_argument("file", type=Path, metavar="FILE", help="as RUN/serve/audit.jsonl")
    verify.add_argument("--last", metavar="HASH", help="the hash of a line that was noted earlier and has to be there")
    verify.set_defaults(run=_verify)


def _config(options: argparse.Namespace) -> "Config":
    from latentmem.config import load_serving_config

    return load_serving_config(options.config, options.overrides)


def _keys(config: "Config") -> "Keys":
    from latentmem.folders import keys_of
    from latentmem.serving.operators.keys import Keys

    return Keys(keys_of(config))


def _create(options: argparse.Namespace) -> None:
    from latentmem.folders import audit_of
    from latentmem.serving.operators.audit import AuditLog

    config = _config(options)
    scopes = [scope.strip() for scope in options.scopes.split(",") if scope.strip()]
    with closing(_keys(config)) as keys, closing(AuditLog(audit_of(config))) as audit:
        key, secret = keys.create(
            options.tenant,
            scopes,
            days=options.expires,
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
            parallel=options.parallel,
            shares=options.shares,
        )
        audit.append(
            "key created",
            {"key": key.id, "tenant": key.tenant, "scopes": [*sorted(key.scopes)], "shares": key.shares},
            durable=True,
        )
    whose = f"tenant {key.tenant}" if key.tenant else "the operator"
    print(f"key {key.id} of {whose}; its secret is shown only here:", file=sys.stderr)
    print(secret)


def _list(options: argparse.Namespace) -> None:
    import time

    from latentmem.serving.operators.keys import shown

    with closing(_keys(_config(options))) as keys:
        for key in keys.all():
            print(shown(key, time.time()))


def _revoke(options: argparse.Namespace) -> None:
    from latentmem.folders import audit_of
    from latentmem.serving.operators.audit import AuditLog

    config = _config(options)
    with closing(_keys(config)) as keys, closing(AuditLog(audit_of(config))) as audit:
        key = keys.revoke(options.id)
        audit.append("key revoked", {"key": key.id, "tenant": key.tenant}, durable=True)
    print(f"key {key.id} is revoked")


def _verify(options: argparse.Namespace) -> None:
    from latentmem.errors import AuditError
    from latentmem.serving.operators.audit import verify

    found = verify(options.file, options.last)
    if found.problem is not None:
        raise AuditError(f"{options.file}: {found.problem}; the {found.num_lines} lines before it are whole")
    print(f"{options.file}: {found.num_lines} lines, nothing altered or removed; the last hash is {found.last}")
