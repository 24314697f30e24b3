"""Turn the words of a command line into one call. Loads no torch before a command needs it.

A user's mistake is reported as one line on standard error, with exit status 2. So is an error in a user's own code;
`-v` shows its traceback. A command that did its work and whose episodes all failed says so and ends with status 1. Any
other exception is our bug and keeps its traceback.
"""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

from latentmem import own
from latentmem.cli import bank, checkpoint, engine, experiment, keys, retriever, rights, serve
from latentmem.errors import EpisodesError, LatentMemError
from latentmem.passwords import hidden

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = parsed(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # it warns of what is raised too
    for noisy in ("httpx", "httpx2", "matplotlib", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        options.run(options)
        sys.stdout.flush()  # here, and not at the interpreter's end, a closed pipe can still be handled
    except LatentMemError as error:
        print(f"latentmem: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1 if isinstance(error, EpisodesError) else 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        _give_up(sys.stdout)
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        with suppress(OSError):  # standard error may be a log on the full disk
            print(f"latentmem: {where}{error.strerror}; free some and run the same command again", file=sys.stderr)
        _give_up(sys.stdout, sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("latentmem: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if (blamed := own.blame(error)) is None:
            raise
        logger.info("the traceback of what follows", exc_info=error)
        print(f"latentmem: {' '.join(hidden(blamed).splitlines())}", file=sys.stderr)
        return 2
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Take a command apart; overrides may stand before, between and after the options."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints show no password, of whatever word they quote."""

    def error(self, message: str) -> NoReturn:
        super().error(hidden(message))


def _give_up(*streams: TextIO) -> None:
    """Redirect the streams to the null device; flushing them at the interpreter's end would fail."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands, without importing what a command needs."""
    parser = _Parser(prog="latentmem", description="A learnable latent memory for teams of LLM agents.")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is going on")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for family in (experiment, serve, keys, rights, bank, checkpoint, retriever, engine):
        family.add_commands(commands)
    return parser
