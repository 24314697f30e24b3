"""A PostgreSQL server of the tests' own: in a temporary folder, on a socket there, with fsync on."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from latentmem.bank_place import read_url


def programs() -> Path:
    """The folder of initdb and postgres; skips where there is none."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'latentmem[postgres]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    known = found[-1] if found else shutil.which("initdb")
    if known is None:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    return Path(known).parent


class TestServer:
    """One server; as root it runs as the user postgres, since it refuses root."""

    __test__ = False

    def __init__(self, folder: Path, listen: str = "") -> None:
        self.bin, self.folder, self.port, self.listen = programs(), folder, 5432, listen
        self.data, self.num_banks = folder / "data", 0
        self.user = None
        if os.getuid() == 0:
            try:
                self.user = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("root may run no PostgreSQL server, and there is no user postgres")
            os.chown(folder, self.user.pw_uid, self.user.pw_gid)
        self.process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", self.data, "-U", "tester", "-E", "UTF8", "--no-locale", "--auth=trust", "--no-sync")
        with (self.data / "pg_hba.conf").open("a") as file:
            file.write("host all all 10.213.7.0/24 trust\n")

    def _as(self) -> dict[str, object]:
        return {} if self.user is None else {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self.bin / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, **self._as())  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr

    def start(self, *prefix: str) -> None:
        """Start it, by the commands of `prefix` if there are any; those must become another user themselves."""
        settings = {
            "unix_socket_directories": self.folder,
            "port": self.port,
            "listen_addresses": self.listen,
            "shared_buffers": "16MB",
            "max_connections": 40,
            "fsync": "on",
            "logging_collector": "off",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [*prefix, str(self.bin / "postgres"), "-D", str(self.data), *options]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                **({} if prefix else self._as()),
            )  # type: ignore[call-overload]
        self.wait()

    def wait(self) -> None:
        import psycopg

        for _ in range(600):
            try:
                psycopg.connect(self.url(), connect_timeout=5).close()
            except psycopg.OperationalError:
                assert self.process is None or self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.05)
            else:
                return
        raise AssertionError((self.folder / "log").read_text())

    def url(self, bank: str = "") -> str:
        """The address of a bank here; without a name, libpq's own address."""
        url = f"postgresql://tester@/postgres?host={quote(str(self.folder), safe='')}&port={self.port}"
        return f"{url}&bank={bank}" if bank else url

    def new_bank(self) -> str:
        """The address of a bank that is not there yet."""
        self.num_banks += 1
        return self.url(f"bank{self.num_banks}")

    def crash(self) -> None:
        """Kill every process of the server, as a power cut would."""
        assert self.process is not None
        tasks = Path(f"/proc/{self.process.pid}/task")
        children = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
        for pid in [self.process.pid, *children]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in children):
            time.sleep(0.01)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    @contextmanager
    def standby(self) -> Iterator[str]:
        """Run a second server, which follows this one and can only be read, and yield its port."""
        with (self.data / "pg_hba.conf").open("a") as file:
            file.write("local replication all trust\n")
        self._run("pg_ctl", "reload", "-D", self.data)
        copy, port = self.folder / "standby", self.port + 1
        self._run("pg_basebackup", "-h", self.folder, "-U", "tester", "-D", copy, "-R", "-X", "stream", "-c", "fast")
        options = [f"port={port}", f"unix_socket_directories={self.folder}", "listen_addresses="]
        command = [str(self.bin / "postgres"), "-D", str(copy), *(w for option in options for w in ("-c", option))]
        with (self.folder / "standby-log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._as())  # type: ignore[call-overload]
        try:
            yield str(port)
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(60)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)  # at once; nobody needs its files any more
            self.process.wait(60)


def sql(url: str, statement: str, *values: object) -> list[Any]:
    """Run a statement on a bank, past all that the bank does."""
    import psycopg

    bank = read_url(url)
    with psycopg.connect(bank.url, autocommit=True) as db:
        db.execute(f'SET search_path TO "{bank.name}"'.encode())
        cursor = db.execute(statement.encode(), values or None)
        return cursor.fetchall() if cursor.description else []


@contextmanager
def running_server(listen: str = "", prefix: Sequence[str] = ()) -> Iterator[TestServer]:
    """A server, started, and stopped at the end. Its folder's name is short: a socket's path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp", ignore_cleanup_errors=True) as folder:
        server = TestServer(Path(folder), listen)
        server.start(*prefix)
        try:
            yield server
        finally:
            server.stop()
