"""The process between the library and a model-written program: it confines, starts, watches and ends the program.

It is a fresh small interpreter (`python -I -S`) for two reasons. Nothing heavier than `exec` is safe in a fork of a
program with threads. And a separate process can be the subreaper of everything the program starts, and can be killed
without harm. It is started thousands of times, so it imports little: json, signal and typing alone would take longer
than everything it does. That is why the request comes in `marshal` form (from the library, which it trusts). Its
modules lie beside it and import each other relatively: in this interpreter the package is called `sandbox`, and there
is no `latentmem`. All are imported at the start, because a Landlock domain may make their files unreadable.

It reads the request from standard input, and takes the end of that input as the death of the library. It writes one
line and the program's outputs to standard output. At level `landlock` it enters one Landlock domain, and the program
enters a second one inside it. So the program cannot signal the launcher, and the launcher's `kill(-1)` reaches exactly
the program's processes, however often they forked or changed their session. A fork bomb cannot outrun that.
"""

import fcntl
import marshal
import os
import select
import time

from .kernel import become, count_tasks, libc, mount_privately, prctl, set_limits, unused_user
from .landlock import MIN_LANDLOCK_ABI, landlock, landlock_abi
from .seccomp import ARCHITECTURES, MACHINE, install, seccomp_program
from .watch import excess, processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

POLL_SECONDS = 0.02
REAP_SECONDS = 10.0

_SIGKILL, _SIGPIPE, _SIGXFSZ = 9, 13, 25


class _Program:
    """A started program, seen from the launcher: its pipes, its process and all descendants of that process."""

    def __init__(self, request: "dict[str, Any]") -> None:
        self.request = request
        self.level: str = request["level"]
        # The program may wipe what it has read, so that what it starts cannot read it again.
        self.stdin = _readable_copy(request["stdin"].encode("utf-8", "surrogatepass"), os.O_RDWR)
        self.stdout, self._stdout_end = os.pipe()
        self.stderr, self._stderr_end = os.pipe()
        self.setup, self._setup_end = os.pipe()
        self.bubblewrap_report, self._bubblewrap_report_end = os.pipe()
        self.exit_status: int | None = None

        os.stat(f"/proc/self/task/{os.getpid()}/children")  # a kernel without it would leave the watcher blind
        prctl("PR_SET_CHILD_SUBREAPER", 36, 1)
        # Should the machine run short of memory all the same, the kernel ends the program and not its caller.
        with open("/proc/self/oom_score_adj", "w") as adjustment:
            adjustment.write("1000")
        # The kernel limits the processes of every user but root, so root's programs run as a user of their own at
        # either level. The watcher alone is no limit: a fork bomb outruns it.
        self.user = unused_user() if self.level != "none" else None
        self.max_tasks = 4 * request["max_processes"]  # threads count, too
        if self.user is None:
            if self.level != "none" and os.getuid() == 0:
                raise OSError("root cannot switch to an unused user id here, and root's processes are not limited")
            self.max_tasks = 16 * request["max_processes"] + count_tasks(os.getuid())  # of all that the user runs
        else:
            self._give_folder_away(self.user)
        self.kills_at_once = False
        if self.level == "landlock":
            # Before Landlock, which refuses mounts.
            mount_privately(request["places"], request["folder"], request["readable"])
            self._enter_outer_domain()

        self.pid = os.fork()
        if self.pid == 0:
            self._become_program()
        for descriptor in request["passed"]:
            os.close(descriptor)
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
        if MACHINE not in ARCHITECTURES:
            raise OSError(f"no seccomp filter for {MACHINE}; known: {', '.join(ARCHITECTURES)}")
        prctl("PR_SET_NO_NEW_PRIVS", 38, 1)
        landlock([*self.request["readable"], "/proc"], self.request["devices"], self._folders())
        # kill(-1) must reach the program and nobody else: ask the kernel, do not believe the version number.
        try:
            os.kill(os.getppid(), 0)
        except PermissionError:
            self.kills_at_once = abi >= 6

    def _folders(self) -> list[str]:
        return [self.request["folder"], *self.request["places"].values()]

    def _become_program(self) -> "NoReturn":
        """Confine the forked child and execute the program in it, or report why that failed."""
        try:
            os.setsid()
            os.chdir(self.request["working_folder"])
            for target, end in enumerate((self.stdin, self._stdout_end, self._stderr_end)):
                os.dup2(end, target)
            for descriptor in self.request["passed"]:
                os.set_inheritable(descriptor, True)
            for number in (_SIGPIPE, _SIGXFSZ):
                libc.signal(number, None)  # back to the default: the interpreter ignores them, and that is inherited
            argv: list[str] = self.request["argv"]
            set_limits(
                self.request["timeout_seconds"], self.request["max_memory"], self.max_tasks, self.request["max_file"]
            )
            if self.level == "landlock":
                become(self.user, [argv[0], os.path.dirname(os.__file__), self.request["folder"]])
                landlock(self.request["readable"], self.request["devices"], self._folders())
                own_user = self.user is not None
                install(seccomp_program(not own_user, None if own_user or self.kills_at_once else os.getpid()))
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
        for place, folder in self.request["places"].items():
            command += ["--bind", folder, place]
        for path in self.request["readable"]:
            command += ["--ro-bind-try", path, path]
        for path in self.request["devices"]:
            command += ["--dev-bind-try", path, path]
        command += ["--bind", self.request["folder"], self.request["folder"], "--remount-ro", "/"]
        command += ["--chdir", self.request["working_folder"], "--seccomp", str(rules)]
        return [*command, "--json-status-fd", str(self._bubblewrap_report_end), "--", *argv]

    def reap(self) -> bool:
        """Collect ended processes; return whether any is left. Orphans count: they become the launcher's children."""
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
        """End everything the program started; return whether that succeeded."""
        deadline = time.monotonic() + REAP_SECONDS
        while self.reap():
            if time.monotonic() > deadline:
                return False
            for pid in [-1] if self.kills_at_once else processes():
                try:
                    os.kill(pid, _SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.0005)
        return True


def _readable_copy(content: bytes, flags: int = os.O_RDONLY) -> int:
    """A descriptor to read `content` from, of any length; one to write through can only shorten it."""
    memory = os.memfd_create("latentmem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(memory, "wb") as file:
        file.write(content)
        file.flush()
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        return os.open(f"/proc/self/fd/{memory}", flags | os.O_CLOEXEC)


def _read_all(descriptor: int) -> bytes:
    chunks = []
    while chunk := os.read(descriptor, 1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def launch(request: "dict[str, Any]") -> bytes:
    """Run the program of a request until it ends or is ended, and return what became of it."""
    started = time.monotonic()
    program = _Program(request)
    outputs = {program.stdout: bytearray(), program.stderr: bytearray()}
    max_output: int = request["max_output"]
    poller = select.poll()
    for descriptor in (*outputs, program.pidfd):
        poller.register(descriptor, select.POLLIN)
    poller.register(0, 0)  # hang-up alone: the library has died

    def read(descriptor: int) -> bool:
        """Read what is there, up to the limit; return whether more may come."""
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
            if over := excess(request):
                status, cause = "killed", over
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
    """Encode one line of status, exit code, seconds and three lengths, then cause, standard output, standard error."""
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
