"""Runs interruption.py, whose table of kills and disks is shown while it comes; its seed is in it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("interruption.py")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("interruption")


def interruption(work, capfd, *options):
    with capfd.disabled():
        print(flush=True)
        command = [sys.executable, str(SCRIPT), *options, "--work", str(work)]
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)


def test_killed_at_twenty_random_moments_and_while_saving_a_run_ends_the_same_bit_for_bit(work, capfd):
    done = interruption(work, capfd, "kills")
    assert done.returncode == 0, done.stderr


def test_a_disk_that_fills_up_loses_nothing_and_says_so_in_one_line(work, capfd):
    done = interruption(work, capfd, "full-disks", "--warm")
    if "no full disk can be made here" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
