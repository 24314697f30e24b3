"""Landlock rules: which files a process may touch and, on newer kernels, whom it may reach and signal."""

import ctypes
import os
import struct

from .kernel import checked, libc

MIN_LANDLOCK_ABI = 3
"""Before version 3 (Linux 6.2) a program could empty files that it may only read."""

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_READ = _EXECUTE | _READ_FILE | _READ_DIR


def landlock_abi() -> int:
    """Return the version of the kernel's Landlock interface; 0 if there is none."""
    return max(0, int(libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def landlock(readable: list[str], devices: list[str], folders: list[str]) -> None:
    """Restrict this process and its children: `readable` paths read-only, `devices` read and written, `folders` freely.

    In `folder` they may do everything but make devices and sockets. TCP, abstract sockets and signals to outside
    processes are refused too, as far as the kernel's ABI supports that.
    """
    abi = landlock_abi()
    all_rights = (1 << (16 if abi >= 5 else 15)) - 1
    handled = struct.pack("=QQQ", all_rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = checked("landlock_create_ruleset", 444, handled, ctypes.c_size_t(size), ctypes.c_uint32(0))
    in_folder = all_rights & ~(_MAKE_CHAR | _MAKE_SOCK | _MAKE_BLOCK | _IOCTL_DEV)
    rules = [(path, _READ) for path in readable] + [(path, _READ_FILE | _WRITE_FILE) for path in devices]
    for path, rights in [*rules, *((folder, in_folder) for folder in folders)]:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue  # what is not there, or closed to this user anyway, need not be allowed
        if not os.path.isdir(path):
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights, beneath)
        checked("landlock_add_rule", 445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(beneath)
    checked("landlock_restrict_self", 446, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)
