"""What the launcher sees of a running program: its processes, their memory and its files, compared with the limits."""

import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_FOLDER_ENTRIES = 1000
"""Most files and folders that a program may have at once."""


def processes() -> list[int]:
    """Return all processes that descend from the launcher, including orphans and those of other sessions."""
    found: list[int] = []
    parents = [os.getpid()]
    while parents:
        parent = parents.pop()
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as children:
                    new = [int(child) for child in children.read().split()]
                found += new
                parents += new
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile; its children are the launcher's now, and seen next time
    return found


def excess(limits: "dict[str, Any]") -> str | None:
    """Return in words which limit of a request the program's processes exceed together; None if none."""
    running = processes()
    # bubblewrap adds two processes of its own: the monitor outside and the first one inside.
    num_processes = len(running) - (2 if limits["level"] == "bubblewrap" else 0)
    if num_processes > limits["max_processes"]:
        return f"{num_processes} processes; the limit is {limits['max_processes']}"
    if sum(map(_resident, running)) > limits["max_memory"]:
        # Memory shared between processes was counted in each; count it once before judging.
        memory = sum(map(_proportional, running))
        if memory > limits["max_memory"]:
            return f"{memory >> 20} MB of memory in all processes; the limit is {limits['max_memory'] >> 20}"
    used, entries = _folder_use(limits["folder"], MAX_FOLDER_ENTRIES)
    if entries > MAX_FOLDER_ENTRIES:
        return f"more than {MAX_FOLDER_ENTRIES} files, or folders that cannot be listed"
    used += _deleted_but_open(running, os.stat(limits["folder"]).st_dev)
    if used > limits["max_file"]:
        return f"{used >> 20} MB of files; the limit is {limits['max_file'] >> 20}"
    return None


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _proportional(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            return next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
    except PermissionError:
        return _resident(pid)  # a process may hide its mappings from its own user
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _folder_use(folder: str, max_entries: int) -> tuple[int, int]:
    """Return bytes on disk and entries of a folder; `max_entries` + 1 means more, or that it cannot be read."""
    used = entries = 0
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as listing:
                for entry in listing:
                    entries += 1
                    if entries > max_entries:
                        return used, entries
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        else:
                            used += entry.stat(follow_symlinks=False).st_blocks * 512
                    except FileNotFoundError:
                        continue
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:  # permissions taken away, or a path too long to name: no way to tell what is inside
            return used, max_entries + 1
    return used, entries


def _deleted_but_open(running: list[int], device: int) -> int:
    """Return bytes on disk of files that have no name any more but that a process still has open."""
    sizes: dict[int, int] = {}
    for pid in running:
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                state = os.stat(f"/proc/{pid}/fd/{descriptor}")
                if state.st_nlink == 0 and state.st_dev == device:
                    sizes[state.st_ino] = state.st_blocks * 512
        except OSError:
            continue  # ended meanwhile, or hides its descriptors; each of its files is bounded by RLIMIT_FSIZE
    return sum(sizes.values())
