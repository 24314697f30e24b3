"""The process between the library and a model-written program: it confines, starts, watches and ends the program.

It is a fresh small interpreter (`python -I -S`), because nothing heavier than `exec` is safe in a fork of a program
with threads, and because a process of its own can be the subreaper of everything the program starts and can be killed
without harm. It is started thousands of times, so it imports little: json, signal and typing alone would take longer
than all it does, which is why the request comes in `marshal` form (from the library, whom it trusts).

It reads the request from standard input, and takes the end of that input as the death of the library; it writes one
line and the program's outputs to standard output. At level `landlock` it enters a Landlock domain itself, and the
program a second one inside it. So the program cannot signal the launcher, and `kill(-1)` of the launcher reaches
exactly the program's processes, however often they forked or changed their session: an ending that a fork bomb cannot
outrun.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

POLL_SECONDS = 0.02
MAX_FOLDER_ENTRIES = 1000
"""Files and folders that a program may have at once."""
MAX_OPEN_FILES = 128
REAP_SECONDS = 10.0
MIN_LANDLOCK_ABI = 3
"""Before 3 (Linux 6.2) a program could empty files that it may only read."""

_SIGKILL, _SIGPIPE, _SIGXFSZ = 9, 13, 25

_libc = ctypes.CDLL(None, use_errno=True)

# --- Landlock: which files, and whom it may signal -----------------------------------------------------------

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_READ = _EXECUTE | _READ_FILE | _READ_DIR


def landlock_abi() -> int:
    """Version of the kernel's Landlock interface; 0 where there is none."""
    return max(0, int(_libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def landlock(readable: list[str], devices: list[str], folder: str) -> None:
    """Restrict this process and its children: `readable` paths read-only, `devices` to read and write, `folder` freely.

    TCP and abstract sockets, and signals to processes outside, are refused too, as far as the kernel's ABI goes.
    """
    abi = landlock_abi()
    all_rights = (1 << (16 if abi >= 5 else 15)) - 1
    handled = struct.pack("=QQQ", all_rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _checked("landlock_create_ruleset", 444, handled, ctypes.c_size_t(size), ctypes.c_uint32(0))
    in_folder = all_rights & ~(_MAKE_CHAR | _MAKE_SOCK | _MAKE_BLOCK | _IOCTL_DEV)
    rules = [(path, _READ) for path in readable] + [(path, _READ_FILE | _WRITE_FILE) for path in devices]
    for path, rights in [*rules, (folder, in_folder)]:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue  # what is not there, or closed to this user anyway, need not be allowed
        if not os.path.isdir(path):
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights, beneath)
        _checked("landlock_add_rule", 445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(beneath)
    _checked("landlock_restrict_self", 446, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


# --- seccomp: which system calls -----------------------------------------------------------------------------

_DENIED = {
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
"""mseal, Linux 6.10. What is newer was not looked at, so programs are told that this kernel has not got it."""
_NEW_NAMESPACES = 0x7E020000

_MACHINE = os.uname().machine
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _EQUAL, _ABOVE, _AND, _RETURN = 0x20, 0x15, 0x25, 0x54, 0x06
_ALLOW, _ERRNO, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000, 1, 38
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16


def seccomp_program(guard_owner: bool, guard_signals_of: int | None) -> bytes:
    """A BPF filter for this machine's architecture; what it refuses fails with an error, the program goes on.

    Args:
        guard_owner: the program runs as the user who owns files outside; modes, owners and times stay as they are.
            Landlock does not cover these. chmod and utime claim success, so that copying a file still works.
        guard_signals_of: this process may signal only itself and its own group, for kernels whose Landlock does not.
    """
    arch, audit_arch = _ARCHITECTURES[_MACHINE]
    code = [(_LOAD, 0, 0, _ARCH_OFFSET), (_EQUAL, 1, 0, audit_arch), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    # Numbers of the x32 ABI are above, too.
    code += [(_LOAD, 0, 0, _NR_OFFSET), (_ABOVE, 0, 1, _LAST_KNOWN_SYSCALL), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]

    def refuse(numbers: tuple[int, int | None], errno: int = _EPERM) -> None:
        number = numbers[arch]
        if number is not None:
            code.extend([(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno)])

    def refuse_unless(numbers: tuple[int, int], *checks: tuple[int, int, tuple[int, ...]]) -> None:
        """Each check: position of the argument, mask, and the values it may have; its low 32 bits count."""
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


def _install(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
    _prctl("PR_SET_SECCOMP", 22, 2, ctypes.addressof(fprog))


# --- users, capabilities and limits --------------------------------------------------------------------------


def _unused_user() -> int | None:
    """An id that nobody has, so that the program owns nothing and its processes are counted apart; None if not root."""
    if os.geteuid() != 0:
        return None
    wanted = 0x60000000 + os.getpid()
    with open("/proc/self/uid_map") as uid_map:
        ranges = [tuple(map(int, line.split())) for line in uid_map]
    mapped = any(first <= wanted < first + count for first, _, count in ranges)
    may_change = all(_capabilities()[0] >> capability & 1 for capability in (0, 6, 7))  # CHOWN, SETGID, SETUID
    return wanted if mapped and may_change else None


def _become(user: int | None, needed: list[str]) -> None:
    """Take the user id and give up all capabilities.

    One stays where a needed path lies in a private folder, as root's interpreter often does: reading past permissions,
    which Landlock narrows to what is readable anyway.
    """
    if user is not None:
        _prctl("PR_SET_KEEPCAPS", 8, 1)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    read_past = 1 << 2  # CAP_DAC_READ_SEARCH
    # access(2) answers for the user id alone, whatever the capabilities.
    kept = 0 if all(os.access(path, os.R_OK | os.X_OK) for path in needed) else read_past & _capabilities()[1]
    header = struct.pack("=Ii", 0x20080522, 0)
    if _libc.capset(header, struct.pack("=6I", kept, kept, kept, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    if kept:
        _prctl("PR_CAP_AMBIENT_RAISE", 47, 2, 2)


def _capabilities() -> tuple[int, int]:
    """The effective and the permitted ones of this process, as bits."""
    with open("/proc/self/status") as status:
        sets = dict(line.split(":\t", 1) for line in status)
    return int(sets["CapEff"], 16), int(sets["CapPrm"], 16)


def _count_tasks(user: int) -> int:
    """Processes and threads of a user on this machine."""
    count = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += os.stat(f"{entry.path}/task").st_nlink - 2
        except FileNotFoundError:
            continue  # ended meanwhile
    return count


def _set_limits(max_seconds: float, max_memory: int, max_tasks: int, max_file: int) -> None:
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


def _prctl(name: str, option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(ctypes.c_int(option), *padded) != 0:
        raise OSError(ctypes.get_errno(), name)


def _checked(name: str, number: int, *arguments: Any) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


# --- starting ------------------------------------------------------------------------------------------------


class _Program:
    """A started program, seen from the launcher: its pipes, its process and all that descend from it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.level: str = request["level"]
        self.stdin = _readable_copy(request["stdin"].encode("utf-8", "surrogatepass"))
        self.stdout, self._stdout_end = os.pipe()
        self.stderr, self._stderr_end = os.pipe()
        self.setup, self._setup_end = os.pipe()
        self.bubblewrap_report, self._bubblewrap_report_end = os.pipe()
        self.exit_status: int | None = None

        os.stat(f"/proc/self/task/{os.getpid()}/children")  # a kernel without it would leave the watcher blind
        _prctl("PR_SET_CHILD_SUBREAPER", 36, 1)
        # Should the machine run short of memory all the same, the kernel ends the program and not its caller.
        with open("/proc/self/oom_score_adj", "w") as adjustment:
            adjustment.write("1000")
        # The kernel limits the processes of every user but root, so root's programs run as a user of their own at
        # either level. The watcher alone is no limit: a fork bomb outruns it.
        self.user = _unused_user() if self.level != "none" else None
        self.max_tasks = 4 * request["max_processes"]  # threads count, too
        if self.user is None:
            if self.level != "none" and os.getuid() == 0:
                raise OSError("root cannot take an unused user id here, and the kernel limits no processes of root")
            self.max_tasks = 16 * request["max_processes"] + _count_tasks(os.getuid())  # of all that the user runs
        else:
            self._give_folder_away(self.user)
        self.kills_at_once = False
        if self.level == "landlock":
            self._enter_outer_domain()

        self.pid = os.fork()
        if self.pid == 0:
            self._become_program()
        for end in (self._stdout_end, self._stderr_end, self._setup_end, self._bubblewrap_report_end, self.stdin):
            os.close(end)
        self.pidfd = os.pidfd_open(self.pid)
        os.set_blocking(self.stdout, False)
        os.set_blocking(self.stderr, False)
        self.setup_error = _read_all(self.setup).decode("utf-8", "replace")  # ends when the program is executed

    def _give_folder_away(self, user: int) -> None:
        for parent, folders, names in os.walk(self.request["folder"]):
            for path in (parent, *(os.path.join(parent, name) for name in folders + names)):
                os.chown(path, user, user, follow_symlinks=False)

    def _enter_outer_domain(self) -> None:
        abi = landlock_abi()
        if abi < MIN_LANDLOCK_ABI:
            raise OSError(f"Landlock is at version {abi} of its interface; {MIN_LANDLOCK_ABI} is needed (Linux 6.2)")
        if _MACHINE not in _ARCHITECTURES:
            raise OSError(f"no seccomp filter for {_MACHINE}; known: {', '.join(_ARCHITECTURES)}")
        _prctl("PR_SET_NO_NEW_PRIVS", 38, 1)
        landlock([*self.request["readable"], "/proc"], self.request["devices"], self.request["folder"])
        # kill(-1) must reach the program and nobody else: ask the kernel, do not believe the version number.
        try:
            os.kill(os.getppid(), 0)
        except PermissionError:
            self.kills_at_once = abi >= 6

    def _become_program(self) -> NoReturn:
        """In the forked child: confine it and execute the program, or say why not."""
        try:
            os.setsid()
            os.chdir(self.request["working_folder"])
            for target, end in enumerate((self.stdin, self._stdout_end, self._stderr_end)):
                os.dup2(end, target)
            for number in (_SIGPIPE, _SIGXFSZ):
                _libc.signal(number, None)  # back to the default: the interpreter ignores them, and that is inherited
            argv: list[str] = self.request["argv"]
            _set_limits(
                self.request["timeout_seconds"], self.request["max_memory"], self.max_tasks, self.request["max_file"]
            )
            if self.level == "landlock":
                _become(self.user, [argv[0], os.path.dirname(os.__file__), self.request["folder"]])
                landlock(self.request["readable"], self.request["devices"], self.request["folder"])
                own_user = self.user is not None
                _install(seccomp_program(not own_user, None if own_user or self.kills_at_once else os.getpid()))
            elif self.level == "bubblewrap":
                argv = self._bubblewrapped(argv)
                if self.user is not None:  # without any capability, or bubblewrap refuses to run
                    os.setgroups([])
                    os.setresgid(self.user, self.user, self.user)
                    os.setresuid(self.user, self.user, self.user)
            os.execve(argv[0], argv, self.request["environment"])  # noqa: S606 - no shell is wanted
        except (OSError, ValueError) as error:
            os.write(self._setup_end, str(error).encode("utf-8", "replace"))
        finally:
            os._exit(127)

    def _bubblewrapped(self, argv: list[str]) -> list[str]:
        rules = _readable_copy(seccomp_program(guard_owner=False, guard_signals_of=None))
        for descriptor in (rules, self._bubblewrap_report_end):
            os.set_inheritable(descriptor, True)
        command = [self.request["bubblewrap"], "--unshare-all", "--die-with-parent", "--new-session"]
        command += ["--cap-drop", "ALL", "--uid", "65534", "--gid", "65534"]
        for path in self.request["readable"]:
            command += ["--ro-bind-try", path, path]
        for path in self.request["devices"]:
            command += ["--dev-bind-try", path, path]
        command += ["--bind", self.request["folder"], self.request["folder"], "--remount-ro", "/"]
        command += ["--chdir", self.request["working_folder"], "--seccomp", str(rules)]
        return [*command, "--json-status-fd", str(self._bubblewrap_report_end), "--", *argv]

    # --- watching --------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """All processes that descend from the launcher, those of other sessions and orphans included."""
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

    def excess(self) -> str | None:
        """Which limit the program's processes are over together, in words; None if none."""
        limits = self.request
        processes = self.processes()
        # bubblewrap adds two processes of its own: the monitor outside and the first one inside.
        num_processes = len(processes) - (2 if self.level == "bubblewrap" else 0)
        if num_processes > limits["max_processes"]:
            return f"{num_processes} processes; the limit is {limits['max_processes']}"
        if sum(map(_resident, processes)) > limits["max_memory"]:
            # Memory shared between processes was counted in each; count it once before judging.
            memory = sum(map(_proportional, processes))
            if memory > limits["max_memory"]:
                return f"{memory >> 20} MB of memory in all processes; the limit is {limits['max_memory'] >> 20}"
        used, entries = _folder_use(limits["folder"], MAX_FOLDER_ENTRIES)
        if entries > MAX_FOLDER_ENTRIES:
            return f"more than {MAX_FOLDER_ENTRIES} files, or folders that cannot be listed"
        used += _deleted_but_open(processes, os.stat(limits["folder"]).st_dev)
        if used > limits["max_file"]:
            return f"{used >> 20} MB of files; the limit is {limits['max_file'] >> 20}"
        return None

    def reap(self) -> bool:
        """Collect ended processes; whether any is left. Orphans become the launcher's: no child means no descendant."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.pid:
                self.exit_status = status

    def kill(self) -> bool:
        """End everything the program started; whether that succeeded."""
        deadline = time.monotonic() + REAP_SECONDS
        while self.reap():
            if time.monotonic() > deadline:
                return False
            for pid in [-1] if self.kills_at_once else self.processes():
                try:
                    os.kill(pid, _SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.0005)
        return True


def _readable_copy(content: bytes) -> int:
    """A descriptor to read `content` from, of any length, that nobody can write through."""
    memory = os.memfd_create("latentmem")
    with open(memory, "wb") as file:
        file.write(content)
        file.flush()
        return os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)


def _read_all(descriptor: int) -> bytes:
    chunks = []
    while chunk := os.read(descriptor, 1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


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
    """Bytes on disk and entries in a folder; `max_entries` + 1 stands for any more, and for what cannot be read."""
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


def _deleted_but_open(processes: list[int], device: int) -> int:
    """Bytes on disk of files that have no name any more and live on in a process that has them open."""
    sizes: dict[int, int] = {}
    for pid in processes:
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                state = os.stat(f"/proc/{pid}/fd/{descriptor}")
                if state.st_nlink == 0 and state.st_dev == device:
                    sizes[state.st_ino] = state.st_blocks * 512
        except OSError:
            continue  # ended meanwhile, or hides its descriptors; each of its files is bounded by RLIMIT_FSIZE
    return sum(sizes.values())


# --- the loop ------------------------------------------------------------------------------------------------


def launch(request: dict[str, Any]) -> bytes:
    """Run the program of a request to its end, natural or not, and say what became of it."""
    started = time.monotonic()
    program = _Program(request)
    outputs = {program.stdout: bytearray(), program.stderr: bytearray()}
    max_output: int = request["max_output"]
    poller = select.poll()
    for descriptor in (*outputs, program.pidfd):
        poller.register(descriptor, select.POLLIN)
    poller.register(0, 0)  # hang-up alone: the library has died

    def read(descriptor: int) -> bool:
        """Take what is there, up to the limit; whether more may come."""
        output = outputs[descriptor]
        while len(output) <= max_output:
            try:
                chunk = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            output += chunk
        return True

    status, cause = "", ""
    deadline = started + request["timeout_seconds"]
    next_check = started + POLL_SECONDS
    while not status:
        now = time.monotonic()
        if now >= deadline:
            status, cause = "timeout", f"ran longer than {request['timeout_seconds']:g} seconds"
            break
        if now >= next_check:
            program.reap()
            if excess := program.excess():
                status, cause = "killed", excess
                break
            checked = time.monotonic()
            next_check = checked + max(POLL_SECONDS, 5 * (checked - now))
        wait_seconds = max(0.0, min(next_check, deadline) - time.monotonic())
        for descriptor, _ in poller.poll(wait_seconds * 1000 + 1):
            if descriptor == 0:
                status, cause = "killed", "the caller ended"
            elif descriptor == program.pidfd:
                status = "exited"
            elif not read(descriptor):
                poller.unregister(descriptor)
        if any(len(output) > max_output for output in outputs.values()):
            status = "output_limit"
    if not program.kill():
        status, cause = "failed", "a process could not be killed"
    for descriptor in outputs:
        read(descriptor)
    if status in ("exited", "output_limit") and any(len(output) > max_output for output in outputs.values()):
        status, cause = "output_limit", f"printed more than {max_output >> 10} KiB"

    exit_code = None
    if status == "exited":
        assert program.exit_status is not None
        exit_code = os.waitstatus_to_exitcode(program.exit_status)
        if program.setup_error:
            status, cause, exit_code = "failed", program.setup_error, None
        elif request["level"] == "bubblewrap" and b'"exit-code"' not in _read_all(program.bubblewrap_report):
            status, cause, exit_code = "failed", outputs[program.stderr].decode("utf-8", "replace").strip(), None
        elif request["level"] == "bubblewrap" and exit_code > 128:
            exit_code = 128 - exit_code  # as bubblewrap and shells say that a signal ended it
        if exit_code is not None and exit_code < 0:
            status, cause, exit_code = "killed", f"ended by signal {-exit_code}", None
    stdout, stderr = (bytes(outputs[pipe][:max_output]) for pipe in (program.stdout, program.stderr))
    return _answer(status, cause, exit_code, stdout, stderr, time.monotonic() - started)


def _answer(
    status: str, cause: str, exit_code: int | None, stdout: bytes = b"", stderr: bytes = b"", seconds: float = 0.0
) -> bytes:
    """One line of status, exit code, seconds and three lengths; then cause, standard output and standard error."""
    reason = cause.encode("utf-8", "replace")
    code = "" if exit_code is None else str(exit_code)
    line = f"{status},{code},{seconds!r},{len(reason)},{len(stdout)},{len(stderr)}\n"
    return line.encode() + reason + stdout + stderr


def main() -> None:
    """Answer the one request on standard input."""
    with open(0, "rb", closefd=False) as requests:
        request = marshal.loads(requests.read(int(requests.readline())))  # noqa: S302 - written by sandbox.py
    try:
        answer = launch(request)
    except OSError as error:  # the confinement could not be set up; the program has not been started
        answer = _answer("failed", str(error), None)
    with open(1, "wb", closefd=False) as answers:
        answers.write(answer)
