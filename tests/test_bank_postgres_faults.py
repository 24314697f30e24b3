"""A bank on a PostgreSQL server through faults: a server killed again and again, and a network that is cut."""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentmem.bank import ExperienceBank
from latentmem.errors import BankError
from postgres_server import TestServer, running_server, sql
from test_bank import check_whole, child, embed, make

pytestmark = pytest.mark.slow

PATIENT_WRITER = """
path, tag = sys.argv[1:]
while True:
    try:
        bank = ExperienceBank(path, embed)
        break
    except BankError as error:
        print(f"! {error}", flush=True)
        time.sleep(0.1)
for batch in range(10**9):
    own = [make(f"{tag} {batch} {i}", response="long " * 200) for i in range(5)]
    while True:
        try:
            report = bank.add(own)
            break
        except BankError as error:
            print(f"! {error}", flush=True)
            time.sleep(0.1)
    print(batch, flush=True)
"""


class Writer:
    """A process that adds batches for ever, again where it failed, and what it said."""

    def __init__(self, url: str, tag: str) -> None:
        self.tag = tag
        self.acknowledged: set[tuple[str, int]] = set()
        self.errors: list[str] = []
        self._process = child(PATIENT_WRITER, url, tag)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("! "):
                self.errors.append(line[2:-1])
            elif line.endswith("\n"):
                self.acknowledged.add((self.tag, int(line)))

    def wait_for(self, reached: Callable[["Writer"], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not reached(self):
            assert time.monotonic() < end, (len(self.acknowledged), self.errors)
            time.sleep(0.02)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_a_server_that_is_killed_again_and_again_loses_nothing_acknowledged() -> None:
    rng = random.Random(0)
    with running_server() as server:
        url = server.url("bank")
        writers = [Writer(url, f"w{i}") for i in range(2)]
        try:
            for _ in range(8):
                for writer in writers:
                    before = len(writer.acknowledged)
                    writer.wait_for(lambda w, before=before: len(w.acknowledged) > before)  # type: ignore[misc]
                time.sleep(rng.random() * 0.3)
                server.crash()
                server.start()
            num_done = [len(writer.acknowledged) for writer in writers]
            for writer, num in zip(writers, num_done, strict=True):
                writer.wait_for(lambda w, num=num: len(w.acknowledged) > num)  # type: ignore[misc]
        finally:
            for writer in writers:
                writer.kill()
        errors = [error for writer in writers for error in writer.errors]
        print(f"{sum(len(w.acknowledged) for w in writers)} batches acknowledged, {len(errors)} errors")
        assert errors
        assert all(error.startswith(f"{url}: ") for error in errors)
        with ExperienceBank(url, embed) as bank:
            check_whole(bank, {batch for writer in writers for batch in writer.acknowledged})
            assert bank.verify().ok


@pytest.mark.usefixtures("cache")
def test_a_standby_server_can_be_read_and_says_that_it_can_only_be_read() -> None:
    with running_server() as server:
        with ExperienceBank(server.url("bank"), embed) as bank:
            bank.add([make(str(i)) for i in range(5)])
            expected = bank.search(make("asked").task, k=3)
        with server.standby() as port:
            url = server.url("bank").replace(f"port={server.port}", f"port={port}")
            for _ in range(200):
                try:
                    bank = ExperienceBank(url, embed)
                except BankError as error:
                    last = error
                    time.sleep(0.1)
                else:
                    break
            else:
                raise last
            with bank:
                assert bank.search(make("asked").task, k=3) == expected
                assert bank.verify().ok
                with pytest.raises(BankError, match="this server can only be read; give the one that it follows"):
                    bank.add(make("new"))


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


@pytest.fixture
def far_server(cache: None) -> Iterator[tuple[TestServer, str, Callable[[bool], None]]]:
    """A server in a network of its own, its address there, and what cuts the cable or joins it again."""
    if os.getuid() != 0:
        pytest.skip("only root makes networks")
    name, ours, theirs = "lmpg", "lmpg0", "lmpg1"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no networks can be made here: {error}")
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
        ip("link", "set", theirs, "netns", name)
        ip("addr", "add", "10.213.7.1/24", "dev", ours)
        ip("link", "set", ours, "up")
        inside = ("netns", "exec", name, "ip")
        ip(*inside, "addr", "add", "10.213.7.2/24", "dev", theirs)
        ip(*inside, "link", "set", theirs, "up")
        user = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
        with running_server(listen="10.213.7.2", prefix=("ip", "netns", "exec", name, *user)) as server:
            wait = "connect_timeout=3&tcp_user_timeout=3000&keepalives_idle=1&keepalives_interval=1&keepalives_count=3"
            url = f"postgresql://tester@10.213.7.2:{server.port}/postgres?{wait}&bank=bank"
            yield server, url, lambda up: ip(*inside, "link", "set", theirs, "up" if up else "down")
    finally:
        ip("netns", "del", name)  # the cable goes with it


def test_a_network_that_is_cut_loses_nothing_and_the_client_goes_on_when_it_is_back(far_server: Any) -> None:
    server, url, join = far_server
    writer = Writer(url, "w")
    try:
        for cut in range(3):
            before = len(writer.acknowledged)
            writer.wait_for(lambda w, before=before: len(w.acknowledged) > before + 5)  # type: ignore[misc]
            num_errors = len(writer.errors)
            join(False)
            began = time.monotonic()
            writer.wait_for(lambda w, num=num_errors: len(w.errors) > num)  # type: ignore[misc]
            print(f"cut {cut}: an error after {time.monotonic() - began:.1f} s: {writer.errors[num_errors][-160:]}")
            join(True)
        before = len(writer.acknowledged)
        writer.wait_for(lambda w: len(w.acknowledged) > before + 5)
    finally:
        writer.kill()
    with ExperienceBank(server.url("bank"), embed) as bank:
        check_whole(bank, writer.acknowledged)
        assert bank.verify().ok


def test_a_writer_that_vanishes_in_the_midst_is_given_up_by_the_server(far_server: Any) -> None:
    server, url, join = far_server
    with ExperienceBank(url, embed) as far, ExperienceBank(server.url("bank"), embed) as near:
        far.add(make("a"))

        def vanish() -> None:
            with far._records.write() as transaction:
                transaction.delete(transaction.meeting({"domain": "sums"}))
                join(False)
                began = time.monotonic()
                assert near.add(make("b")).num_added == 1  # waits for the lock until the server has noticed
                print(f"the lock was free after {time.monotonic() - began:.1f} s")

        with pytest.raises(BankError, match=r"the server does not answer|the connection was lost"):
            vanish()
        assert len(near) == 2
        join(True)
        assert len(far) == 2
    assert sql(server.url("bank"), "SELECT count(*) FROM trajectories") == [(2,)]
