"""The process between the library and a user's own program: it starts the program, and ends all that it left behind.

The program is trusted, so nothing confines it; it may fork, daemonise and hang. Whatever it starts has the keeper as
its ancestor, because the kernel gives orphans to the nearest subreaper. The keeper's standard input is held open by the
library: its end means that the time is up, or that the library has died, and then everything is killed. The keeper ends
with the program's exit status, once no process of it is left.

It is a fresh small interpreter for the reasons given in `launcher.py`.
"""

import os
import select
import signal
import sys
import time

from .kernel import libc, prctl
from .watch import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

REAP_SECONDS = 10.0

CANNOT_START = 127
"""The exit status if the program cannot be started; standard error says why."""


def main() -> None:
    """Run the command in the arguments."""
    prctl("PR_SET_CHILD_SUBREAPER", 36, 1)
    pid = os.fork()
    if pid == 0:
        _become(sys.argv[1:])
    program = os.pidfd_open(pid)
    ready, _, _ = select.select([0, program], [], [])
    ended = os.waitpid(pid, 0)[1] if program in ready else None
    _end_all()
    status = 128 + signal.SIGKILL if ended is None else os.waitstatus_to_exitcode(ended)
    os._exit(status if status >= 0 else 128 - status)


def _become(command: "list[str]") -> "NoReturn":
    try:
        os.setsid()
        prctl("PR_SET_PDEATHSIG", 1, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            libc.signal(int(number), None)  # back to the default: the interpreter ignores them, and that is inherited
        os.execvp(command[0], command)  # noqa: S606 - no shell is wanted
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode("utf-8", "replace"))
    finally:
        os._exit(CANNOT_START)


def _end_all() -> None:
    """Kill every descendant and wait until it is gone."""
    until = time.monotonic() + REAP_SECONDS
    while time.monotonic() < until:
        for pid in processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return  # nobody is left
        time.sleep(0.005)
