"""A checkpoint in a model repository: one file of tensors, and the JSON and the card made from it."""

import json
import shutil
import tempfile
from pathlib import Path

from latentmem.errors import CheckpointError
from latentmem.hub.cards import Origin, checkpoint_card
from latentmem.hub.transfer import Snapshot, fetch, push, snapshot
from latentmem.memory.checkpoints import NAMES, Kind, kind_of, read_checkpoint, weights_file, write_checkpoint


def push_checkpoint(folder: Path, repo: str, origin: Origin | None = None, *, public: bool = False) -> str:
    """Send a checkpoint with a card and return the address of the commit.

    Args:
        folder: the folder of a composer, or of a LoRA of agents.
        repo: OWNER/NAME; made if there is none.
        origin: the run that the checkpoint comes from.
        public: whether everybody may read a repository that is made now.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        HubError: the hub does not answer, or refuses.
    """
    kind = kind_of(folder)
    read_checkpoint(folder, kind)
    with tempfile.TemporaryDirectory() as place:  # a training may replace the checkpoint while it is sent
        weights = weights_file(Path(place), kind)
        shutil.copyfile(weights_file(folder, kind), weights)
        settings, _ = read_checkpoint(Path(place), kind)
        files: dict[str, Path | bytes] = {
            weights.name: weights,
            weights.with_suffix(".json").name: (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode(),
            "README.md": checkpoint_card(repo, kind, settings, origin).encode("utf-8", "replace"),
        }
        return push(repo, "model", files, f"{NAMES[kind].capitalize()} of LatentMem", public=public)


def pull_checkpoint(repo: str, folder: Path, revision: str | None = None, *, force: bool = False) -> Kind:
    """Bring a checkpoint into a folder, all of it or nothing, and return its kind.

    Only the tensors and the JSON in their header are read.

    Args:
        repo: OWNER/NAME.
        folder: made if there is none; without `force` it must be empty.
        revision: branch, tag or commit; None is the main branch.
        force: whether to replace a checkpoint of the same kind in `folder`.

    Raises:
        CheckpointError: `folder` is in use; or the hub's file is not a checkpoint, or is damaged.
        HubError: the hub does not answer, or refuses, or has no such repository.
    """
    if not force and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already; name another folder, or replace what it holds with --force")
    found = snapshot(repo, "model", revision)
    kind = _kind_in(found)
    if weights_file(folder, kind_of(folder)).exists() and kind_of(folder) != kind:
        raise CheckpointError(
            f"{folder}: holds a {NAMES[kind_of(folder)]}, but {repo} holds a {NAMES[kind]}; name another folder"
        )
    with tempfile.TemporaryDirectory() as place:
        fetch(found, weights_file(Path(), kind).name, Path(place))
        try:
            settings, tensors = read_checkpoint(Path(place), kind)
        except CheckpointError as error:
            raise CheckpointError(f"{repo}: {str(error).removeprefix(f'{place}/')}") from None
    write_checkpoint(folder, settings, tensors, kind)
    return kind


def _kind_in(found: Snapshot) -> Kind:
    kinds: tuple[Kind, ...] = ("composer", "agents")
    held = [kind for kind in kinds if weights_file(Path(), kind).name in found.digests]
    if len(held) != 1:
        files = " nor ".join(weights_file(Path(), kind).name for kind in kinds)
        what = "holds both a composer and a LoRA of agents" if held else f"holds no checkpoint of ours, neither {files}"
        raise CheckpointError(f"{found.repo}: {what}; name the repository of one that `checkpoint push` sent")
    return held[0]
