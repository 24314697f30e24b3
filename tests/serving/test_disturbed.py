"""A server that is killed, or whose disk is full, at each COMMIT: nothing acknowledged is lost, nothing is twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import disturbed
import pytest

SCRIPT = Path(disturbed.__file__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is there after a run that nothing disturbed, and how many points it reached."""
    points = []
    with (
        disturbed.watched(points.append),
        disturbed.server(tmp_path_factory.mktemp("whole")) as (parts, address),
    ):
        disturbed.play(address, lambda *_: None)
        return disturbed.state_of(parts), len(points)


def play_and_die(folder, point):
    """Play in a process that kills itself at a point; returns what it acknowledged, and whether it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def acknowledge(*told):
            os.write(writing, json.dumps(told).encode() + b"\n")

        try:
            die = lambda number: number == point and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            with disturbed.watched(die), disturbed.server(folder) as (_, address):
                disturbed.play(address, acknowledge)
        finally:
            os._exit(1)  # whatever happens, the child is never a second pytest
    os.close(writing)
    with os.fdopen(reading) as told:
        acknowledged = [json.loads(line) for line in told]
    return acknowledged, os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def die_at(points, folder, whole):
    for point in points:
        run = folder / str(point)
        run.mkdir()
        acknowledged, was_killed = play_and_die(run, point)
        assert was_killed
        with disturbed.server(run) as (parts, address):
            disturbed.check(parts, acknowledged)
            disturbed.play(address, lambda *_: None)
            assert disturbed.state_of(parts) == whole, f"killed at point {point}"
            disturbed.check(parts, acknowledged)
        shutil.rmtree(run)


def test_a_server_killed_at_commits_loses_nothing_acknowledged_and_stores_each_episode_once(tmp_path, whole):
    state, num_points = whole
    assert sorted(origin.session for *_, origin in state["bank"].values()) == ["cut", "unjudged", "whole"]
    die_at(range(5, num_points, 7), tmp_path, state)


@pytest.mark.slow
def test_a_server_may_be_killed_before_and_after_each_commit(tmp_path, whole):
    state, num_points = whole
    die_at(range(num_points), tmp_path, state)


def fill_at(stride, folder):
    """Fill a disk of its own before every so many COMMITs; returns what is printed. Skips where none can be mounted."""
    options = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run(["unshare", *options, "true"], capture_output=True).returncode:
        pytest.skip("no full disk can be made here: neither root nor user namespaces")
    mount = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" "$3" "$1" "$4"'
    words = ["unshare", *options, "sh", "-c", mount, "sh", folder, sys.executable, SCRIPT, stride]
    played = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert played.returncode == 0, played.stderr
    return json.loads(played.stdout)


def test_a_full_disk_is_told_with_507_and_loses_nothing_acknowledged(tmp_path):
    assert fill_at(9, tmp_path)["told"] >= 3


@pytest.mark.slow
def test_the_disk_may_be_full_at_each_commit(tmp_path):
    found = fill_at(1, tmp_path)
    assert found["told"] >= found["filled"] - 5 > 30  # four before the server listens; a call's loss is told to nobody
