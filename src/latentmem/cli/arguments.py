"""Kinds of arguments that several commands take: counts, ports, positive numbers, a configuration with overrides."""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentmem.bank_place import Place

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    """The object to which a module adds its commands."""

CONFIG_HELP = "a YAML file, or the name of a packaged configuration"


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def bank(text: str) -> "Place":
    """Parse where a bank is: the path of its SQLite file, or a server's URL."""
    from latentmem.bank_place import bank_place
    from latentmem.errors import BankError

    try:
        return bank_place(text)
    except BankError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def port(text: str) -> int:
    """Parse a port from 0 to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def positive(text: str) -> float:
    """Parse a positive finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def takes_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for a configuration and overrides of its keys."""
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    takes_overrides(parser)


def takes_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the argument for overrides alone."""
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override a key, as in lmpo.group_size=8"
    )
    overrides.required = False  # else argparse lists it among what is missing, which it is not


def takes_pushed(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for a repository to push to."""
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub; made, private, if there is none")
    parser.add_argument("--public", action="store_true", help="let all read a repository that is made now")


def takes_pulled(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for a repository to pull from."""
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--force", action="store_true", help="replace what is there")


@contextmanager
def serving_packages() -> Iterator[None]:
    """Import what serves in this block; a package that is missing is told in one line.

    Raises:
        ServingError: a package of the extra `serve` is not installed.
    """
    from latentmem.errors import ServingError

    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "latentmem":
            raise
        raise ServingError(f"serving needs the package {error.name}; pip install 'latentmem[serve]'") from None
