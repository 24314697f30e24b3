"""Kernel calls of the launcher: which user a program runs as, and how much it may have of each resource.

Python has no functions for these calls, so they go through the C library; a call that fails raises OSError.
"""

import ctypes
import os
import resource
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

MAX_OPEN_FILES = 128

libc = ctypes.CDLL(None, use_errno=True)


def prctl(name: str, option: int, *arguments: int) -> None:
    """Set an attribute of this process; errors show `name`."""
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(ctypes.c_int(option), *padded) != 0:
        raise OSError(ctypes.get_errno(), name)


def checked(name: str, number: int, *arguments: "Any") -> int:
    """Make the system call of this number; errors show `name`."""
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def mount_privately(places: dict[str, str], folder: str, readable: "Iterable[str]") -> None:
    """Put folders in the place of others, for this process and what it starts.

    `folder` stays where it is, and so do the `readable` folders; those of them that lie in such a place become
    read-only, since Landlock lets the program write to all that lies there.

    Does nothing where this process may not mount.
    """
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        return
    recursive, private, bind, again, read_only = 0x4000, 1 << 18, 0x1000, 0x20, 1
    _mount(None, "/", recursive | private)
    # Held open, since one place may cover the way to the next folder.
    folders = [path for path in (folder, *readable, *places.values()) if os.path.isdir(path)]
    held = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in folders}
    for place, instead in places.items():
        _mount(f"/proc/self/fd/{held[instead]}", place, bind)
    usual = os.umask(0o022)  # the way to what is kept is open to the program's user
    for path in (folder, *readable):
        if path in held and not os.path.isdir(path):
            os.makedirs(path)
            _mount(f"/proc/self/fd/{held[path]}", path, bind)
            if path != folder:
                as_before = os.statvfs(path).f_flag & 0b1110  # no set-uid, no devices, no programs
                _mount(None, path, as_before | again | bind | read_only)
    os.umask(usual)
    for descriptor in held.values():
        os.close(descriptor)


def _mount(source: str | None, target: str, flags: int) -> None:
    begun = None if source is None else source.encode()
    if libc.mount(begun, target.encode(), None, ctypes.c_ulong(flags), None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


def unused_user() -> int | None:
    """Return a user id that nobody has, so that the program owns nothing and is counted apart.

    Return None if this process cannot take one: it is not root, or lacks the mapping or the capabilities.
    """
    if os.geteuid() != 0:
        return None
    wanted = 0x60000000 + os.getpid()
    with open("/proc/self/uid_map") as uid_map:
        ranges = [tuple(map(int, line.split())) for line in uid_map]
    mapped = any(first <= wanted < first + count for first, _, count in ranges)
    may_change = all(_capabilities()[0] >> capability & 1 for capability in (0, 6, 7))  # CHOWN, SETGID, SETUID
    return wanted if mapped and may_change else None


def become(user: int | None, needed: list[str]) -> None:
    """Take the user id and give up all capabilities, except one where it is needed.

    If a needed path lies in a private folder, as root's interpreter often does, the process keeps the capability to
    read past permissions. Landlock narrows that to what is readable anyway.
    """
    if user is not None:
        prctl("PR_SET_KEEPCAPS", 8, 1)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    read_past = 1 << 2  # CAP_DAC_READ_SEARCH
    # access(2) answers for the user id alone, whatever the capabilities.
    kept = 0 if all(os.access(path, os.R_OK | os.X_OK) for path in needed) else read_past & _capabilities()[1]
    header = struct.pack("=Ii", 0x20080522, 0)
    if libc.capset(header, struct.pack("=6I", kept, kept, kept, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    if kept:
        prctl("PR_CAP_AMBIENT_RAISE", 47, 2, 2)


def _capabilities() -> tuple[int, int]:
    """Return the effective and the permitted capabilities of this process, as bits."""
    with open("/proc/self/status") as status:
        sets = dict(line.split(":\t", 1) for line in status)
    return int(sets["CapEff"], 16), int(sets["CapPrm"], 16)


def count_tasks(user: int) -> int:
    """Count the processes and threads of a user on this machine."""
    count = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += os.stat(f"{entry.path}/task").st_nlink - 2
        except FileNotFoundError:
            continue  # ended meanwhile
    return count


def set_limits(max_seconds: float, max_memory: int, max_tasks: int, max_file: int) -> None:
    """Set limits for this process and all it starts: seconds, bytes of address space, tasks, bytes of each file."""
    wanted = [
        (resource.RLIMIT_AS, max_memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(max_seconds) + 2),  # the wall clock comes first, unless this watcher is gone
        (resource.RLIMIT_FSIZE, max_file),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_NPROC, max_tasks),
    ]
    for what, value in wanted:
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))
