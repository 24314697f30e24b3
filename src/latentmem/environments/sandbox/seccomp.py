"""Build the seccomp filter, which decides the system calls a program may make, for each architecture."""

import ctypes
import os
import struct

from .kernel import prctl

_DENIED: dict[str, tuple[int, int | None]] = {
    # name: (x86_64, aarch64)
    # Sockets; a connected pair from socketpair is left, which asyncio wakes itself with.
    "socket": (41, 198),
    "connect": (42, 203),
    "accept": (43, 202),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept4": (288, 242),
    "sendmsg": (46, 211),  # could hold any number of deleted files open inside a socket
    "sendmmsg": (307, 269),
    # Other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    # Memory that neither RLIMIT_AS nor the folder's size bounds
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # Would tell of others' files; Landlock does not cover it
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
    # Mounts, namespaces, file handles
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # The kernel itself, and parts of it known for their holes
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "syslog": (103, 116),
    "acct": (163, 89),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "lookup_dcookie": (212, 18),
}
_CHANGES_MODE_OR_TIMES = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
}
_CHANGES_OWNER_OR_ATTRIBUTES = {
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
_SIGNALS_BY_THREAD = {"tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)}
_CLONE, _CLONE3, _PRLIMIT64, _SETPRIORITY = (56, 220), (435, 435), (302, 261), (141, 140)
_SCHED_SETAFFINITY, _SOCKETPAIR, _KILL, _TGKILL = (203, 122), (53, 199), (62, 129), (234, 131)
_PRCTL, _PR_SET_DUMPABLE = (157, 167), 4
_LAST_KNOWN_SYSCALL = 462
"""mseal, Linux 6.10. Newer calls were not examined, so programs are told that this kernel does not have them."""
_NEW_NAMESPACES = 0x7E020000

MACHINE = os.uname().machine
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _EQUAL, _ABOVE, _AND, _RETURN = 0x20, 0x15, 0x25, 0x54, 0x06
_ALLOW, _ERRNO, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000, 1, 38
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16


def seccomp_program(guard_owner: bool, guard_signals_of: int | None) -> bytes:
    """Build a BPF filter for this machine's architecture; a refused call fails with an error, and the program goes on.

    Args:
        guard_owner: whether the program runs as the user who owns files outside; then it cannot change modes, owners
            and times, which Landlock does not cover. chmod and utime claim success, so that copying a file still works.
        guard_signals_of: this process may signal only itself and its own group; for kernels whose Landlock lacks this.
    """
    arch, audit_arch = ARCHITECTURES[MACHINE]
    code = [(_LOAD, 0, 0, _ARCH_OFFSET), (_EQUAL, 1, 0, audit_arch), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    # Numbers of the x32 ABI are above, too.
    code += [(_LOAD, 0, 0, _NR_OFFSET), (_ABOVE, 0, 1, _LAST_KNOWN_SYSCALL), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]

    def refuse(numbers: tuple[int, int | None], errno: int = _EPERM) -> None:
        number = numbers[arch]
        if number is not None:
            code.extend([(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno)])

    def refuse_unless(numbers: tuple[int, int], *checks: tuple[int, int, tuple[int, ...]]) -> None:
        """Add checks: each has an argument's position, a mask and the allowed values; the low 32 bits count."""
        body: list[tuple[int, int, int, int]] = []
        for position, mask, allowed in checks:
            body += [(_LOAD, 0, 0, _ARGS_OFFSET + 8 * position), (_AND, 0, 0, mask)]
            body += [(_EQUAL, len(allowed) - i, 0, value) for i, value in enumerate(allowed)]
            body.append((_RETURN, 0, 0, _ERRNO | _EPERM))
        code.append((_EQUAL, 0, len(body), numbers[arch]))
        code.extend(body)
        code.append((_LOAD, 0, 0, _NR_OFFSET))

    def refuse_when(numbers: tuple[int, int], position: int, value: int) -> None:
        code.append((_EQUAL, 0, 4, numbers[arch]))
        code.extend([(_LOAD, 0, 0, _ARGS_OFFSET + 8 * position), (_EQUAL, 0, 1, value)])
        code.extend([(_RETURN, 0, 0, _ERRNO | _EPERM), (_LOAD, 0, 0, _NR_OFFSET)])

    whole = 0xFFFFFFFF
    refuse(_CLONE3, _ENOSYS)  # its flags lie in memory, out of a filter's sight; the C library falls back to clone
    refuse_unless(_CLONE, (0, _NEW_NAMESPACES, (0,)))
    refuse_unless(_PRLIMIT64, (0, whole, (0,)))
    refuse_unless(_SETPRIORITY, (0, whole, (0,)), (1, whole, (0,)))
    refuse_unless(_SCHED_SETAFFINITY, (0, whole, (0,)))
    refuse_unless(_SOCKETPAIR, (0, whole, (1,)), (1, 0xF, (1,)))  # AF_UNIX and SOCK_STREAM
    refuse_when(_PRCTL, 0, _PR_SET_DUMPABLE)  # would hide the process's open files from the watcher
    for numbers in _DENIED.values():
        refuse(numbers)
    if guard_owner:
        for numbers in _CHANGES_MODE_OR_TIMES.values():
            refuse(numbers, 0)
        for numbers in _CHANGES_OWNER_OR_ATTRIBUTES.values():
            refuse(numbers)
    if guard_signals_of is not None:
        for thread_numbers in _SIGNALS_BY_THREAD.values():
            refuse(thread_numbers)
        refuse_unless(_KILL, (0, whole, (0, guard_signals_of)))
        refuse_unless(_TGKILL, (0, whole, (guard_signals_of,)))
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def install(program: bytes) -> None:
    """Put this process, and all it will start, under a filter permanently."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
    prctl("PR_SET_SECCOMP", 22, 2, ctypes.addressof(fprog))
