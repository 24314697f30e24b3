"""All errors that a user can mend, in one small tree; any other exception is our bug and keeps its traceback.

    LatentMemError            one line for the user; the command line prints it and exits with status 2
    |-- ConfigError           a configuration file, a key, a value, an option
    |-- DataError             a task row, a data file, a bank record
    |   `-- BadRowError       one row of a data set; the configuration may say to skip such rows
    |-- BankError             a bank that cannot be opened, read or written
    |-- ModelError            a language model, an embedder or their files
    |   `-- WindowError       one prompt does not fit the model's window
    |-- EngineError           a server that samples for the agents does not answer as it should
    |   `-- BusyError         there is no place for a prompt now; it may be asked again later
    |-- CheckpointError       saved weights that do not fit what they are loaded into
    |-- HubError              the Hugging Face hub does not answer, or refuses
    |-- KeysError             API keys that cannot be read, made or revoked
    |-- AuditError            an audit log that cannot be written, or does not agree with itself
    |-- RetrieverError        a search server that does not answer, or cannot be started
    |-- ServingError        a server of agent programs that cannot be started, or whose store cannot be used
    |-- SandboxError          model-written code cannot be contained on this machine
    |-- RunError              a run folder that cannot be continued or read
    |-- TrainingError         training cannot go on (no signal, repeated non-finite losses)
    `-- EpisodesError         all episodes of a command failed; exit status 1

A message says where, what was found, what was expected and what to do, on one line. It shows no password of a URL.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from latentmem.passwords import hidden


class LatentMemError(Exception):
    """Base of all errors that name a mistake of the user, or a state of the machine, in one line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(hidden(message))


class ConfigError(LatentMemError):
    """A configuration file, key, value or command-line option is wrong."""


class DataError(LatentMemError):
    """A task row, a data file or a bank record cannot be read as what it should be."""


class BadRowError(DataError):
    """One row of a data set cannot be used; `reason` names the kind of mistake, and skipped rows are counted by it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BankError(LatentMemError):
    """The experience bank cannot be opened, read or written."""


class ModelError(LatentMemError):
    """A language model or an embedder cannot be loaded or used as asked."""


class WindowError(ModelError):
    """A prompt with its latents and its response does not fit the model's window; others may."""


class EngineError(LatentMemError):
    """A server that samples for the agents does not answer, or answers something else than was asked."""


class BusyError(EngineError):
    """Too many prompts wait already; the same prompt may be asked again later."""


class CheckpointError(LatentMemError):
    """Saved weights do not fit what they are loaded into."""


class HubError(LatentMemError):
    """The Hugging Face hub does not answer, or refuses what is asked of it."""


class KeysError(LatentMemError):
    """The API keys of a server cannot be read, made or revoked."""


class AuditError(LatentMemError):
    """The audit log cannot be written or read, or was tampered with."""


class RetrieverError(LatentMemError):
    """A search server does not answer as it should, or cannot be started."""


class ServingError(LatentMemError):
    """A server of agent programs cannot be started, or its store cannot be used."""


class SandboxError(LatentMemError):
    """Model-written code cannot be contained on this machine."""


class RunError(LatentMemError):
    """A run folder cannot be continued or read."""


class TrainingError(LatentMemError):
    """Training cannot go on; the last good checkpoint is kept."""


class EpisodesError(LatentMemError):
    """All episodes of a command failed. It has done its work and keeps it, but what follows would learn nothing."""


def suggest(found: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known name, or all known names.

    >>> suggest("autogem", ["autogen", "camel"])
    "did you mean 'autogen'?"
    >>> suggest("x", ["autogen", "camel"])
    'known: autogen, camel'
    """
    names = sorted(known)
    near = get_close_matches(found, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
