import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentmem.config import SandboxSection
from latentmem.environments.sandbox import sandbox as sandbox_module
from latentmem.environments.sandbox import seccomp
from latentmem.environments.sandbox.sandbox import Sandbox, parse_result
from latentmem.errors import SandboxError

PATIENCE_SECONDS = 60.0
"""For programs that end by themselves, or by another limit, however busy the machine is."""


class Cell:
    """A sandbox at a given level, and the checks that must hold after every run in it."""

    def __init__(self, level, scratch):
        self.level, self.scratch = level, scratch
        self.sandbox_at_defaults()

    def sandbox_at_defaults(self, **limits):
        limits = {"timeout_seconds": PATIENCE_SECONDS, **limits}
        sandbox = Sandbox(SandboxSection(level="none" if self.level == "none" else "auto", **limits))
        if sandbox.level != self.level:
            pytest.skip(f"{self.level} is not available here")
        return sandbox

    def run(self, code, *arguments, stdin="", result_file=None, files=None, **limits):
        sandbox = self.sandbox_at_defaults(**limits)
        marker = uuid.uuid4().hex
        command = ["python", "-c", textwrap.dedent(code), *map(str, arguments), marker]
        result = sandbox.run(files or {}, command, stdin=stdin, result_file=result_file)
        assert processes_with(marker) == []
        assert list(self.scratch.iterdir()) == []
        assert result.level == self.level
        return result


def processes_with(marker):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(params=["bubblewrap", "landlock"])
def cell(request, scratch, monkeypatch, tmp_path):
    if request.param == "landlock":
        monkeypatch.setenv("PATH", str(tmp_path))  # no bwrap there
    return Cell(request.param, scratch)


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("tell nobody")
    path.chmod(0o666)
    return path


# --- ordinary programs ---------------------------------------------------------------------------------------


def test_a_normal_program_gives_code_output_and_result(cell):
    result = cell.run(
        """
        import json, sys, time
        from helper.double import double
        print(double(int(input())))
        print("to stderr", file=sys.stderr)
        json.dump({"passed": [True, 0.5], "name": "ü"}, open("result.json", "w"))
        time.sleep(0.25)
        sys.exit(3)
        """,
        stdin="21\n",
        files={"helper/double.py": "def double(x):\n    return 2 * x\n"},
        result_file="result.json",
    )
    assert (result.status, result.exit_code, result.stdout, result.stderr) == ("exited", 3, "42\n", "to stderr\n")
    assert result.result == {"passed": [True, 0.5], "name": "ü"}
    assert result.cause == ""
    assert result.seconds >= 0.25  # it slept that long


def test_a_long_standard_input_arrives_whole_and_ends(cell):
    text = "abcdefghij" * 200_000
    result = cell.run("import sys; print(len(sys.stdin.read()))", stdin=text)
    assert result.stdout == "2000000\n"


def test_text_beyond_ascii_passes_through_arguments_input_and_output(cell):
    result = cell.run("import sys; print(sys.argv[1], input())", "\u00fc\u6f22", stdin="\U0001f600\n")
    assert result.stdout == "\u00fc\u6f22 \U0001f600\n"


def test_both_outputs_are_kept_when_they_end_with_the_program(cell):
    result = cell.run("import os; os.write(1, b'a' * 60000); os.write(2, b'b' * 60000)")
    assert (result.status, result.stdout, result.stderr) == ("exited", "a" * 60000, "b" * 60000)


def test_numpy_fits_under_the_default_memory_limit(cell):
    result = cell.run("import numpy; print(int((numpy.ones((200, 200)) @ numpy.ones((200, 200))).sum()))")
    assert (result.status, result.stdout) == ("exited", "8000000\n"), result.stderr


def test_pytest_runs_inside(cell):
    sandbox = cell.sandbox_at_defaults()
    files = {"test_it.py": "def test_good(tmp_path): (tmp_path / 'a').write_text('b')\ndef test_bad(): assert 1 == 2\n"}
    result = sandbox.run(files, ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"])
    assert (result.status, result.exit_code) == ("exited", 1), result.stderr
    assert "1 failed, 1 passed" in result.stdout


def test_threads_subprocesses_asyncio_and_temporary_files_work(cell):
    result = cell.run(
        """
        import asyncio, shutil, subprocess, sys, tempfile, threading
        thread = threading.Thread(target=print, args=("thread",), kwargs={"flush": True}); thread.start(); thread.join()
        subprocess.run([sys.executable, "-S", "-c", "print('child')"], check=True)
        sleeper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        sleeper.terminate(); print("terminated", sleeper.wait())
        async def hello():
            await asyncio.sleep(0)
            print("coroutine")
        asyncio.run(hello())
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("x"); file.flush()
            shutil.copy2(file.name, "copy")
        print(open("copy").read())
        """
    )
    assert result.stdout.split("\n") == ["thread", "child", "terminated -15", "coroutine", "x", ""], result.stderr


def test_the_environment_of_the_caller_is_not_visible(cell, monkeypatch):
    monkeypatch.setenv("LATENTMEM_TEST_TOKEN", "hunter2")
    result = cell.run("import os; print(dict(os.environ))")
    assert "PATH" in result.stdout
    assert "hunter2" not in result.stdout
    assert "LATENTMEM" not in result.stdout


def test_bytes_that_are_not_utf8_are_replaced_in_the_output(cell):
    result = cell.run(r"import os; os.write(1, b'a\xff\x00b')")
    assert result.stdout == "a\ufffd\x00b"


def test_a_program_ended_by_a_signal_counts_as_killed(cell):
    result = cell.run("import os; os.abort()")
    assert (result.status, result.exit_code, result.cause) == ("killed", None, "ended by signal 6")


def test_an_unknown_program_fails_without_running_anything(cell):
    result = cell.sandbox_at_defaults().run({}, ["no-such-program"])
    assert (result.status, result.exit_code) == ("failed", None)
    assert "no-such-program" in result.cause


def test_an_argument_that_no_program_can_have_fails_with_its_cause(cell):
    result = cell.run("pass", "a\0b")
    assert result.status == "failed"
    assert "null byte" in result.cause


def test_source_with_a_lone_surrogate_is_the_programs_error_not_ours(cell):
    result = cell.sandbox_at_defaults().run({"a.py": "x = '\ud800'"}, ["python", "a.py"])
    assert (result.status, result.exit_code) == ("exited", 1)
    assert "SyntaxError" in result.stderr


def test_threads_of_one_process_share_a_sandbox(cell):
    sandbox = cell.sandbox_at_defaults()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: sandbox.run({}, ["python", "-S", "-c", f"print({n})"]), range(12)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(12)]


# --- time, memory, processes, output -------------------------------------------------------------------------


def test_an_infinite_loop_ends_at_the_timeout(cell):
    result = cell.run("while True: pass", timeout_seconds=0.5)
    assert (result.status, result.exit_code) == ("timeout", None)
    assert "0.5 seconds" in result.cause


def test_closing_its_output_and_sleeping_ends_at_the_timeout(cell):
    code = "import os, time; print('said', flush=True); os.close(1); os.close(2); time.sleep(1000)"
    result = cell.run(code, timeout_seconds=2.0)
    assert (result.status, result.stdout) == ("timeout", "said\n")


def test_ignoring_every_signal_does_not_help(cell):
    code = """
        import signal
        for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True: pass
        """
    assert cell.run(code, timeout_seconds=0.7).status == "timeout"


def test_a_stopped_program_ends_at_the_timeout(cell):
    assert cell.run("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", timeout_seconds=0.7).status == "timeout"


@pytest.mark.parametrize("size", ["100 << 30", "1 << 30"])  # the second any kernel would grant, for nothing is touched
def test_an_allocation_of_too_much_is_a_memory_error(cell, size):
    result = cell.run(f"x = bytearray({size})")
    assert (result.status, result.exit_code) == ("exited", 1)
    assert "MemoryError" in result.stderr


def test_the_memory_of_all_processes_counts_together(cell):
    code = """
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                memory = bytearray(50 << 20)
                memory[::4096] = b"x" * (50 << 8)  # touches every page
                time.sleep(60)
        time.sleep(60)
        """
    result = cell.run(code, max_memory_mb=128)
    assert result.status == "killed"
    assert "memory in all processes" in result.cause


def test_memory_that_forked_processes_share_counts_once(cell):
    code = """
        import os, time
        memory = bytearray(os.urandom(1) * (60 << 20))
        for _ in range(4):
            if os.fork() == 0:
                time.sleep(0.4)
                os._exit(0)
        for _ in range(4):
            os.wait()
        print("done")
        """
    assert cell.run(code, max_memory_mb=160).stdout == "done\n"


def test_a_fork_bomb_is_killed(cell):
    code = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """
    result = cell.run(code)
    assert result.status == "killed"
    assert "processes; the limit is 16" in result.cause


def test_a_chain_of_forks_that_changes_its_session_each_time_is_caught(cell):
    code = """
        import os
        if os.fork():
            os._exit(0)
        while True:
            if os.fork():
                os._exit(0)
            os.setsid()
        """
    assert cell.run(code).status == "exited"  # the first process; the helper has checked that none is left


def test_a_daemon_does_not_outlive_the_run(cell):
    code = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        os.wait()
        print("left a daemon")
        """
    result = cell.run(code)
    assert (result.status, result.exit_code, result.stdout) == ("exited", 0, "left a daemon\n")


@pytest.mark.parametrize("descriptor", [1, 2])
def test_printing_without_end_is_cut_at_the_limit(cell, descriptor):
    result = cell.run(f"import os\nwhile True: os.write({descriptor}, b'x' * 4096)", max_output_kb=8)
    assert result.status == "output_limit"
    assert [result.stdout, result.stderr][descriptor - 1] == "x" * 8192
    assert result.cause == "printed more than 8 KiB"


def test_more_output_than_allowed_from_a_program_that_ends_is_cut_too(cell):
    result = cell.run("print('x' * 9000)", max_output_kb=8)
    assert (result.status, result.exit_code, len(result.stdout)) == ("output_limit", None, 8192)


# --- files ---------------------------------------------------------------------------------------------------


def test_nothing_outside_can_be_read(cell, secret):
    code = """
        import os, sys
        for path in [sys.argv[1], "/root", "/home", "/etc/shadow", "/etc/passwd", "/proc/1/environ", sys.argv[2],
                     os.path.dirname(sys.argv[1]), "/sys/kernel", "/dev/mem", "/dev/tty"]:
            try:
                print("read", path, os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(10))
            except OSError:
                pass
        """
    result = cell.run(code, secret, f"/proc/{os.getpid()}/environ")
    # The names of folders that lead to the interpreter are all there is to see in bubblewrap's empty tree.
    ways = {parent for prefix in (sys.prefix, sys.base_prefix) for parent in Path(prefix).parents}
    leading = {f"read {way} ['{step.name}']" for way in ways for step in ways if step.parent == way}
    seen = [line for line in result.stdout.splitlines() if cell.level == "landlock" or line not in leading]
    assert [line for line in seen if "scratch" not in line] == []
    assert "secret" not in result.stdout
    assert "tell" not in result.stdout
    assert result.exit_code == 0, result.stderr


def test_nothing_outside_can_be_written_removed_or_changed(cell, secret):
    code = """
        import os, sys
        path = sys.argv[1]
        os.symlink(path, "link")
        attempts = [
            lambda: open(path, "w"), lambda: open(path, "a"), lambda: open("link", "w"), lambda: open(path + "2", "w"),
            lambda: os.truncate(path, 0), lambda: os.remove(path), lambda: os.rename(path, "stolen"),
            lambda: os.link(path, "linked"), lambda: os.chmod(path, 0), lambda: os.utime(path, (0, 0)),
            lambda: os.rename("../tmp", path + "3"), lambda: os.mkdir(path + "4"), lambda: os.chown(path, 1, 1),
            lambda: open("/var/tmp/latentmem-escaped", "w"),
        ]
        for place in ("/tmp/latentmem-escaped", "/dev/shm/latentmem-escaped"):
            try:
                open(place, "w").close()  # in a folder of its own, if at all
            except OSError:
                pass
        for number, attempt in enumerate(attempts):
            try:
                attempt()
                print("succeeded", number)
            except OSError:
                pass
        """
    before = secret.stat()
    result = cell.run(code, secret)
    # Where program and caller are one user, chmod and utime claim success at level landlock and do nothing.
    claimed = "succeeded 8\nsucceeded 9\n" if cell.level == "landlock" and os.geteuid() != 0 else ""
    assert (result.stdout, result.exit_code) == (claimed, 0), result.stderr
    after = secret.stat()
    assert secret.read_text() == "tell nobody"
    assert [before.st_mode, before.st_mtime, before.st_uid] == [after.st_mode, after.st_mtime, after.st_uid]
    assert sorted(path.name for path in secret.parent.iterdir()) == ["scratch", "secret"]
    assert not os.path.exists("/tmp/latentmem-escaped")
    assert not os.path.exists("/dev/shm/latentmem-escaped")


def test_installed_packages_can_be_read_but_not_changed(cell):
    target = Path(sys.prefix, f"latentmem-test-{uuid.uuid4().hex}")
    target.write_text("unchanged")
    target.chmod(0o666)
    code = """
        import os, sys
        print(open(sys.argv[1]).read())
        for attempt in (lambda: open(sys.argv[1], "w"), lambda: os.open(sys.argv[1], os.O_RDONLY | os.O_TRUNC),
                        lambda: os.truncate(sys.argv[1], 0), lambda: os.remove(sys.argv[1])):
            try:
                attempt()
                print("succeeded")
            except OSError:
                pass
        """
    try:
        result = cell.run(code, target)
        assert (result.stdout, target.read_text()) == ("unchanged\n", "unchanged")
    finally:
        target.unlink()


def test_one_file_cannot_grow_past_the_limit(cell):
    result = cell.run("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 16))", max_file_mb=2)
    # Whether the program meets the limit of one file first, or the watcher that of all, is a matter of milliseconds.
    assert "File too large" in result.stderr or "MB of files; the limit is 2" in result.cause
    assert result.exit_code != 0


def test_many_files_cannot_fill_the_disk(cell):
    code = """
        import time
        for n in range(20):
            open(f"file{n}", "wb").write(bytes(1 << 20))
        time.sleep(60)
        """
    result = cell.run(code, max_file_mb=4)
    assert result.status == "killed"
    assert "MB of files; the limit is 4" in result.cause


def test_deleted_files_that_stay_open_count_too(cell):
    code = """
        import os, time
        kept = []
        for n in range(20):
            kept.append(open("file", "wb", buffering=0))
            kept[-1].write(bytes(1 << 20))
            os.remove("file")
        time.sleep(60)
        """
    result = cell.run(code, max_file_mb=4)
    assert result.status == "killed"
    assert "MB of files; the limit is 4" in result.cause


def test_a_million_files_are_stopped(cell):
    result = cell.run("for n in range(1_000_000): open(str(n), 'w').close()")
    assert result.status == "killed"
    assert "more than 1000 files" in result.cause


def test_folders_nested_deeper_than_any_path_are_measured_and_deleted(cell):
    result = cell.run("import os, time\nfor _ in range(1500): os.mkdir('abcdef'); os.chdir('abcdef')\ntime.sleep(60)")
    assert result.status == "killed"
    assert "files" in result.cause


def test_no_name_or_nesting_makes_a_run_raise_or_leave_its_folder(cell):
    code = """
        import os
        above = os.path.dirname(os.environ["HOME"])
        for i in range(1, 9):
            os.makedirs(f"{above}/moved-{i}/moved-1")
            open(f"{above}/moved-{i}/big", "w").write("x" * 1000)
            os.makedirs(f"a{i}/b/c")
        os.makedirs(b"\\xff\\xfe/\\n/ ")
        os.symlink("..", "a1/up")
        os.symlink("/", "root")
        os.mkfifo("a2/fifo")
        for _ in range(120): os.mkdir("d" * 200); os.chdir("d" * 200)
        os.chmod(".", 0)
        os.chmod(os.environ["HOME"], 0)
        """
    assert cell.run(code).status in ("exited", "killed")


def test_programs_have_a_temporary_folder_of_their_own_and_can_share_work_among_processes(cell):
    if cell.level == "landlock" and os.geteuid() != 0:
        pytest.skip("only root may mount here")
    code = """
        import multiprocessing, os
        def square(x): return x * x
        if __name__ == "__main__":
            open("/tmp/mine", "w").close()
            assert "mine" in os.listdir(os.environ["TMPDIR"])
            with multiprocessing.Pool(2) as pool: print(pool.map(square, [1, 2, 3]))
            print(multiprocessing.Value("i", 4).value)
        """
    result = cell.run(code)
    assert (result.stdout, result.exit_code) == ("[1, 4, 9]\n4\n", 0), result.stderr
    assert not os.path.exists("/tmp/mine")


def test_files_outside_cannot_be_watched(cell):
    code = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.inotify_init(), libc.inotify_init1(0), libc.inotify_add_watch(0, b"/usr", 2))
        """
    assert cell.run(code).stdout == "-1 -1 -1\n"


def test_a_program_can_wipe_its_input_but_write_no_more_into_it(cell):
    code = """
        import os, sys
        text = sys.stdin.read()
        try: os.pwrite(0, b"x" * 10, len(text))
        except OSError: print("refused")
        os.ftruncate(0, 0); os.lseek(0, 0, 0)
        print(len(text), os.read(0, 100))
        """
    assert cell.run(code, stdin="secret").stdout == "refused\n6 b''\n"


def test_folders_that_are_closed_to_everybody_are_deleted(cell):
    code = "import os; os.makedirs('a/b/c'); open('a/b/f', 'w'); os.chmod('a/b', 0); os.chmod('a', 0); os.chmod('.', 0)"
    assert cell.run(code).status in ("exited", "killed")


def test_all_files_lie_in_a_fresh_folder(cell):
    code = "import os; print(os.listdir('.')); open('left', 'w').close()"
    assert [cell.run(code).stdout, cell.run(code).stdout] == ["[]\n", "[]\n"]


# --- other processes and the network -------------------------------------------------------------------------


def test_no_process_outside_can_be_killed_or_hindered(cell):
    bystander = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    code = """
        import os, resource, signal, sys
        for pid in (int(sys.argv[1]), int(sys.argv[2]), os.getppid()):
            for attempt in (
                lambda: os.kill(pid, signal.SIGKILL), lambda: os.killpg(pid, signal.SIGKILL),
                lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)),
                lambda: os.setpriority(os.PRIO_PROCESS, pid, 19), lambda: os.sched_setaffinity(pid, {0}),
                lambda: os.pidfd_open(pid),
            ):
                try:
                    attempt()
                except OSError:
                    pass
        for attempt in (lambda: os.kill(-1, signal.SIGKILL), lambda: os.setpriority(os.PRIO_USER, 0, 19)):
            try:
                attempt()
            except OSError:
                pass
        print("done")
        """
    limits, nice = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    try:
        result = cell.run(code, os.getpid(), bystander.pid)
        assert (result.status, result.stdout) == ("exited", "done\n"), result
        assert bystander.poll() is None
        assert (os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)) == (limits, nice)
    finally:
        bystander.kill()
        bystander.wait()


def test_no_socket_can_be_opened(cell, secret):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0)
    path = str(secret.parent / "socket")
    local = socket.socket(socket.AF_UNIX)
    local.bind(path)
    local.listen()
    local.settimeout(0)
    code = """
        import socket, sys
        attempts = {
            "tcp": lambda: socket.create_connection(("127.0.0.1", int(sys.argv[1]))),
            "tcp6": lambda: socket.create_connection(("::1", int(sys.argv[1]))),
            "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
            "unix": lambda: socket.socket(socket.AF_UNIX).connect(sys.argv[2]),
            "abstract": lambda: socket.socket(socket.AF_UNIX).connect("\\0name"),
            "listen": lambda: socket.create_server(("127.0.0.1", 0)),
            "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
            "netlink": lambda: socket.socket(16, socket.SOCK_RAW, 0),
            "datagram pair": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
        }
        for name, attempt in attempts.items():
            try:
                attempt()
                print("succeeded:", name)
            except PermissionError:
                pass
        """
    try:
        result = cell.run(code, listener.getsockname()[1], path)
        assert (result.stdout, result.exit_code) == ("", 0), result.stderr
        for server in (listener, local):
            with pytest.raises(BlockingIOError):
                server.accept()
    finally:
        listener.close()
        local.close()


def test_dangerous_system_calls_are_refused(cell):
    code = """
        import ctypes, errno, os
        libc = ctypes.CDLL(None, use_errno=True)
        calls = {
            "unshare": (0x10000000,), "mount": (b"none", b".", b"tmpfs", 0, None), "ptrace": (0, 0, 0, 0),
            "memfd_create": (b"x", 0), "shmget": (0, 4096, 0o1600), "process_vm_readv": (1, None, 0, None, 0, 0),
            "personality": (0,), "setns": (0, 0), "chroot": (b".",), "perf_event_open": None, "bpf": None,
        }
        for name, arguments in calls.items():
            if arguments is None:
                result = libc.syscall({"perf_event_open": 298, "bpf": 321}[name], None, 0, 0, 0, 0)
            else:
                result = getattr(libc, name)(*arguments)
            if result != -1 or ctypes.get_errno() != errno.EPERM:
                print(name, result, ctypes.get_errno())
        """
    if os.uname().machine != "x86_64":
        pytest.skip("two of these calls are made by their x86_64 numbers")
    assert cell.run(code).stdout == ""


def test_the_programs_end_when_the_caller_is_killed(cell):
    marker = uuid.uuid4().hex
    script = textwrap.dedent("""
        import sys
        from latentmem.config import SandboxSection
        from latentmem.environments.sandbox.sandbox import Sandbox
        sandbox = Sandbox(SandboxSection(timeout_seconds=60.0))
        code = "import os, time; os.fork(); os.setsid() if os.getpid() != os.getpgid(0) else 0; time.sleep(60)"
        sandbox.run({}, ["python", "-S", "-c", code, sys.argv[1]])
        """)
    caller = subprocess.Popen([sys.executable, "-c", script, marker], env={**os.environ, "TMPDIR": str(cell.scratch)})
    wait_until(lambda: len(processes_with(marker)) > 2)
    caller.kill()
    caller.wait()
    wait_until(lambda: processes_with(marker) == [])


def wait_until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen within 20 seconds")


# --- the result file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        "open('r', 'w').write('[' + '1,' * 40000 + '1]')",
        "open('r', 'w').write('[' * 30000 + ']' * 30000)",
        "os.symlink('/etc/hostname', 'r')",
        "os.symlink('real', 'r'); open('real', 'w').write('1')",
        "os.mkdir('r')",
        "os.mkfifo('r')",
        "os.rename('../work', '../x'); os.symlink('/etc', '../work')",
        "pass",
    ],
)
def test_a_result_that_is_not_small_plain_json_is_none(cell, write):
    result = cell.run(f"import os\n{write}", result_file="r")
    assert result.status == "exited"
    assert result.result is None


def test_a_result_file_in_a_moved_working_folder_is_not_sought_behind_a_link(cell, secret):
    (secret.parent / "r").write_text("1")
    result = cell.run(
        "import os, sys; os.rename('../work', '../x'); os.symlink(os.path.dirname(sys.argv[1]), '../work')",
        secret,
        result_file="r",
    )
    (secret.parent / "r").unlink()
    assert result.result is None


def test_the_result_of_a_killed_program_is_read_as_far_as_it_is_json(cell):
    code = "import os; open('r', 'w').write('[1]'); os.abort()"
    result = cell.run(code, result_file="r")
    assert (result.status, result.result) == ("killed", [1])


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"null", None),
        (b'{"a": [1, 2.5, "x", true, null]}', {"a": [1, 2.5, "x", True, None]}),
        (b"", None),
        (b"{", None),
        (b'"\xff"', None),
        (b"[NaN]", None),
        (b"[-Infinity]", None),
        (b"[1e999]", None),
        (b'["\\ud800"]', None),
        (b"9" * 5000, None),
        (b"\xef\xbb\xbf1", None),
        (b"[" * 64 + b"]" * 64, "deep"),
        (b"[" * 65 + b"]" * 65, None),
        (b"[" * 60000, None),
    ],
)
def test_only_strict_json_of_bounded_depth_is_a_result(content, value):
    found = parse_result(content)
    assert (json.dumps(found) == content.decode()) if value == "deep" else (found == value)


# --- levels --------------------------------------------------------------------------------------------------


def test_level_none_is_reported_and_still_limited(scratch):
    cell = Cell("none", scratch)
    assert cell.run("print(1)").stdout == "1\n"
    assert cell.run("while True: pass", timeout_seconds=0.5).status == "timeout"
    assert "MemoryError" in cell.run("x = bytearray(100 << 30)").stderr


def test_a_daemon_of_level_none_does_not_outlive_the_run_either(scratch):
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)"
    assert Cell("none", scratch).run(code).status == "exited"


def test_no_confinement_is_an_error_of_one_line_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sandbox_module, "_why_not", lambda level, bubblewrap: f"{level} is broken")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/bwrap")
    with pytest.raises(SandboxError) as error:
        Sandbox(SandboxSection())
    assert "bubblewrap: bubblewrap is broken; Landlock: landlock is broken." in str(error.value)
    assert "set sandbox.level to none" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bubblewrap_that_does_not_contain_is_not_used(tmp_path, scratch, monkeypatch):
    fake = tmp_path / "bwrap"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sandbox_module._why_not("bubblewrap", str(fake)) != ""


def test_the_launcher_imports_nothing_of_the_library_and_little_else():
    code = "import sys; sys.path.append(sys.argv[1]); import sandbox.launcher; print(*sys.modules)"
    folder = str(Path(sandbox_module.__file__).parents[1])
    command = [sys.executable, "-I", "-S", "-c", code, folder]
    loaded = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, check=True).stdout.split()
    rooms = {name for name in loaded if name.partition(".")[0] == "sandbox"}
    own = ("kernel", "landlock", "launcher", "seccomp", "watch")
    assert rooms == {"sandbox", *(f"sandbox.{room}" for room in own)}
    slow = {"json", "latentmem", "pydantic", "re", "signal", "site", "subprocess", "tempfile", "typing"}
    assert not slow & {name.partition(".")[0] for name in loaded}


def test_an_old_landlock_is_refused_and_the_program_does_not_start(cell, monkeypatch, tmp_path):
    if cell.level != "landlock":
        pytest.skip("about Landlock")
    code = "import sys, sandbox.launcher as l; l.landlock_abi = lambda: 2; l.main()"
    monkeypatch.setattr(sandbox_module, "_START_LAUNCHER", f"import sys; sys.path.append(sys.argv[1]); {code}")
    result = cell.run("print('started')")
    assert (result.status, result.stdout) == ("failed", "")
    assert "Landlock is at version 2 of its interface; 3 is needed" in result.cause


@pytest.mark.parametrize("broken", ["install", "become", "set_limits"])
def test_a_set_up_that_fails_in_the_middle_does_not_start_the_program(cell, monkeypatch, broken):
    if cell.level != "landlock":
        pytest.skip("about Landlock")
    code = f"import sandbox.launcher as l\ndef fail(*_): raise OSError('broken')\nl.{broken} = fail; l.main()"
    monkeypatch.setattr(sandbox_module, "_START_LAUNCHER", f"import sys; sys.path.append(sys.argv[1])\n{code}")
    result = cell.run("print('started')")
    assert (result.status, result.stdout, result.cause) == ("failed", "", "broken")


def test_the_owners_files_are_safe_when_the_caller_is_not_root(scratch, tmp_path):
    """Without root the program runs as the caller's own user, whom file permissions do not stop."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv to become somebody else")
    home = tmp_path / "home"
    home.mkdir()
    owned = home / "owned"
    owned.write_text("mine")
    for path in (home, owned):
        os.chown(path, 54321, 54321)
    os.chmod(scratch, 0o777)
    attack = textwrap.dedent("""
        import os, resource, shutil, signal, sys
        path, parent = sys.argv[1], os.getppid()
        for attempt in (
            lambda: os.chmod(path, 0), lambda: os.utime(path, (0, 0)), lambda: open(path), lambda: open(path, "w"),
            lambda: os.setxattr(path, "user.x", b"y"), lambda: os.chmod(os.path.dirname(path), 0),
            lambda: os.kill(parent, signal.SIGKILL), lambda: os.kill(int(sys.argv[2]), signal.SIGKILL),
            lambda: resource.prlimit(int(sys.argv[2]), resource.RLIMIT_CPU, (0, 0)),
            lambda: os.setpriority(os.PRIO_USER, 0, 19), lambda: os.kill(-1, signal.SIGKILL),
        ):
            try:
                attempt()
            except OSError:
                pass
        open("a", "w").write("x")
        shutil.copy2("a", "b")
        if os.fork() == 0:
            while True:
                if os.fork():
                    os._exit(0)
                os.setsid()
        print("done", os.getuid())
        """)
    script = textwrap.dedent("""
        import json, os, sys
        from latentmem.config import SandboxSection
        from latentmem.environments.sandbox.sandbox import Sandbox
        sandbox = Sandbox(SandboxSection())
        result = sandbox.run({}, ["python", "-c", sys.argv[1], sys.argv[2], str(os.getpid())])
        print(json.dumps([sandbox.level, result.status, result.stdout, result.stderr, os.getpriority(2, 54321)]))
        """)
    identity = ["--reuid", "54321", "--regid", "54321", "--clear-groups"]
    # The interpreter may lie in root's own folder; the capability to read there is all that is left of root.
    identity += ["--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search"]
    command = [shutil.which("setpriv"), *identity, sys.executable, "-c", script, attack, str(owned)]
    environment = {**os.environ, "PATH": "/nowhere", "TMPDIR": str(scratch)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    priority = os.getpriority(os.PRIO_PROCESS, 0)  # inherited, and not made worse by the program
    assert json.loads(done.stdout) == ["landlock", "exited", "done 54321\n", "", priority]
    assert (owned.read_text(), owned.stat().st_mode & 0o777) == ("mine", 0o644)
    assert (owned.stat().st_mtime, home.stat().st_mode & 0o777) != (0, 0)
    assert list(scratch.iterdir()) == []


# --- the seccomp filter, by an interpreter of our own --------------------------------------------------------


def verdict(program, audit_arch, number, *arguments):
    """What a filter of classic BPF returns for a system call: "allow", or the error number."""
    data = number.to_bytes(4, "little") + audit_arch.to_bytes(4, "little") + bytes(8)
    data += b"".join(argument.to_bytes(8, "little") for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6])
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, k = (
            int.from_bytes(program[8 * at : 8 * at + 2], "little"),
            program[8 * at + 2],
            program[8 * at + 3],
            int.from_bytes(program[8 * at + 4 : 8 * at + 8], "little"),
        )
        at += 1
        if code == 0x20:  # load a word of the data
            accumulator = int.from_bytes(data[k : k + 4], "little")
        elif code == 0x54:  # and
            accumulator &= k
        elif code == 0x15:  # jump if equal
            at += if_true if accumulator == k else if_false
        elif code == 0x25:  # jump if greater
            at += if_true if accumulator > k else if_false
        else:
            assert code == 0x06  # return
            return "allow" if k == 0x7FFF0000 else k & 0xFFFF


@pytest.mark.parametrize(("machine", "column", "audit_arch"), [("x86_64", 0, 0xC000003E), ("aarch64", 1, 0xC00000B7)])
def test_the_filter_refuses_what_it_should_on_both_architectures(monkeypatch, machine, column, audit_arch):
    monkeypatch.setattr(seccomp, "MACHINE", machine)
    plain = seccomp.seccomp_program(guard_owner=False, guard_signals_of=None)
    guarded = seccomp.seccomp_program(guard_owner=True, guard_signals_of=77)
    numbers = {  # from the kernel's tables, apart from the launcher's own
        "read": (0, 63),
        "openat": (257, 56),
        "execve": (59, 221),
        "socket": (41, 198),
        "socketpair": (53, 199),
        "clone": (56, 220),
        "clone3": (435, 435),
        "prctl": (157, 167),
        "prlimit64": (302, 261),
        "setpriority": (141, 140),
        "kill": (62, 129),
        "tgkill": (234, 131),
        "fchmodat": (268, 53),
        "fchownat": (260, 54),
        "io_uring_setup": (425, 425),
        "keyctl": (250, 219),
    }
    expected = [
        ("read", (), "allow", "allow"),
        ("openat", (), "allow", "allow"),
        ("execve", (), "allow", "allow"),
        ("socket", (1, 1), 1, 1),
        ("socketpair", (1, 1), "allow", "allow"),
        ("socketpair", (1, 1 | 0o2000000), "allow", "allow"),  # SOCK_CLOEXEC
        ("socketpair", (1, 2), 1, 1),
        ("socketpair", (2, 1), 1, 1),
        ("clone", (0x01200011,), "allow", "allow"),  # fork
        ("clone", (0x003D0F00,), "allow", "allow"),  # a thread
        ("clone", (0x10000011,), 1, 1),  # a new user namespace
        ("clone3", (), 38, 38),
        ("prctl", (4, 0), 1, 1),  # PR_SET_DUMPABLE
        ("prctl", (15, 0), "allow", "allow"),  # PR_SET_NAME
        ("prlimit64", (0, 7), "allow", "allow"),
        ("prlimit64", (77, 7), 1, 1),
        ("setpriority", (0, 0, 5), "allow", "allow"),
        ("setpriority", (2, 0, 5), 1, 1),
        ("setpriority", (0, 9, 5), 1, 1),
        ("kill", (5,), "allow", 1),
        ("kill", (77,), "allow", "allow"),
        ("kill", (0,), "allow", "allow"),
        ("kill", (0xFFFFFFFF,), "allow", 1),
        ("tgkill", (77, 78), "allow", "allow"),
        ("tgkill", (5, 5), "allow", 1),
        ("fchmodat", (), "allow", 0),
        ("fchownat", (), "allow", 1),
        ("io_uring_setup", (), 1, 1),
        ("keyctl", (), 1, 1),
    ]
    for name, arguments, in_plain, in_guarded in expected:
        number = numbers[name][column]
        found = (verdict(plain, audit_arch, number, *arguments), verdict(guarded, audit_arch, number, *arguments))
        assert found == (in_plain, in_guarded), (name, arguments)
    assert verdict(plain, 0x40000003, 4) == 1  # a call in the 32-bit ABI
    assert verdict(plain, audit_arch, 0x40000000 + 1) == 38  # x32
    assert verdict(plain, audit_arch, 463) == 38  # newer than what was looked at


def test_the_numbers_of_both_architectures_agree_with_the_kernels_headers():
    headers = {0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), 1: Path("/usr/include/asm-generic/unistd.h")}
    if not all(path.exists() for path in headers.values()):
        pytest.skip("the kernel's headers are not installed")
    tables = (
        seccomp._DENIED,
        seccomp._CHANGES_MODE_OR_TIMES,
        seccomp._CHANGES_OWNER_OR_ATTRIBUTES,
        seccomp._SIGNALS_BY_THREAD,
    )
    for column, path in headers.items():
        words = [line.split() for line in path.read_text().splitlines() if line.startswith("#define __NR")]
        known = {entry[1].split("_", 3)[-1] if "3264" in entry[1] else entry[1][5:]: entry[2] for entry in words}
        known = {name.lstrip("_"): number for name, number in known.items()}
        for table in tables:
            for name, numbers in table.items():
                if name in known and numbers[column] is not None:
                    assert int(known[name]) == numbers[column], name
