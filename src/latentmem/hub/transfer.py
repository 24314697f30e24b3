"""Transfer of files to and from the hub by its own client, one commit at a time; each failure becomes one line.

A push is one commit, so a repository never holds half of it. A pull reads one commit, whatever is pushed meanwhile, and
checks each file against the hub's checksum, if it gives one. Tokens are left to the client: `hf auth login`, or
HF_TOKEN.
"""

import errno
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from latentmem.errors import HubError

Kind = Literal["model", "dataset"]


class Snapshot(NamedTuple):
    """One commit of a repository."""

    repo: str
    kind: Kind
    commit: str
    digests: Mapping[str, str | None]
    """The commit's files, each with its SHA-256 if the hub gives one."""


def push(repo: str, kind: Kind, files: Mapping[str, Path | bytes], message: str, *, public: bool) -> str:
    """Add or replace files in one commit, make the repository if needed, and return the address of the commit.

    Args:
        repo: OWNER/NAME.
        kind: the kind of repository.
        files: by their names in the repository; its other files stay as they are.
        message: the commit's message.
        public: whether everybody may read a repository that is made now; an existing one stays as it is.

    Raises:
        HubError: the hub does not answer, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _explained(repo, kind):
        api = HfApi(library_name="latentmem")
        api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repo, operations, commit_message=message, repo_type=kind)
        return str(commit.commit_url)


def snapshot(repo: str, kind: Kind, revision: str | None) -> Snapshot:
    """Return what a repository holds at a branch, tag or commit; None is its main branch.

    Raises:
        HubError: there is no such repository or revision, or the hub does not answer, or refuses.
    """
    from huggingface_hub import HfApi

    with _explained(repo, kind):
        api = HfApi(library_name="latentmem")
        ask = api.model_info if kind == "model" else api.dataset_info
        found = ask(repo, revision=revision, files_metadata=True)
        digests = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in found.siblings or []}
        return Snapshot(repo, kind, str(found.sha), digests)


def fetch(found: Snapshot, name: str, folder: Path) -> Path:
    """Bring one file of a snapshot into a folder and return its path.

    Raises:
        HubError: the hub does not answer, or refuses, or sends a file with another checksum.
    """
    from huggingface_hub import hf_hub_download

    with _explained(found.repo, found.kind):
        path = Path(hf_hub_download(found.repo, name, repo_type=found.kind, revision=found.commit, local_dir=folder))
    expected = found.digests[name]
    if expected is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise HubError(f"{found.repo}: {name} arrived damaged (SHA-256 {digest[:12]}, not {expected[:12]}); repeat")
    return path


@contextmanager
def _explained(repo: str, kind: Kind) -> Iterator[None]:
    """Turn the client's errors into one line. Wrap only calls of the client, whose errors are of many kinds."""
    try:
        yield
    except Exception as error:
        causes = [*_causes(error)]
        if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
            raise
        raise HubError(_why(causes, repo, kind)) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _why(causes: list[BaseException], repo: str, kind: Kind) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    for cause in causes:
        if isinstance(cause, errors.HFValidationError):
            return f"{repo!r} is not the name of a repository; write OWNER/NAME"
        if isinstance(cause, errors.GatedRepoError):
            return f"{repo}: its owner grants access to those who ask at {hub}/{repo}; ask there, and log in"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return (
                f"{repo}: no such {kind} repository on {hub}, or one that you may not see; check its name, or log in "
                "with `hf auth login` or HF_TOKEN"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{repo}: no such revision on {hub}; give a branch, a tag or a commit"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return f"{repo}: HF_HUB_OFFLINE is set; unset it to reach {hub}"
        if isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
            if status in (401, 403):
                return (
                    f"{repo}: {hub} does not let you do this (status {status}); log in with `hf auth login` or "
                    "HF_TOKEN, with a token that may"
                )
            return f"{repo}: {hub} answers with status {status} ({_line(cause)}); try again later"
    return (
        f"{repo}: {hub} cannot be used ({type(causes[0]).__name__}: {_line(causes[-1])}); check the network and repeat"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
