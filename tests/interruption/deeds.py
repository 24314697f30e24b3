"""`python -m latentmem.cli WORDS...` with something that goes wrong at a chosen moment of its writing.

    deeds.py DEED WORDS...

Nothing of the product is replaced: Python itself tells of files that are opened for writing, renamed and removed (audit
events), each connection of sqlite3 of the statements that it begins. Each is one line, such as "open
/run/metrics.jsonl" or "sql COMMIT". DEED is JSON: {"at": REGEX, "number": N} for the N-th such line, and what happens
then: "kill_after": SECONDS, in which the process goes on, so that it dies in the middle of something; or "fill": FILE,
which takes all the space that is left on its disk but "left" bytes. With "size": BYTES only a file of that size counts.
"""

import json
import os
import re
import runpy
import signal
import sqlite3
import sys
import threading
import time

PAGE = 4096
WRITING = os.O_WRONLY | os.O_RDWR
FILE_EVENTS = {"os.rename": "rename", "os.remove": "remove", "os.truncate": "truncate", "shutil.rmtree": "rmtree"}


class Deed:
    """Waits for its moment."""

    def __init__(self, at, number, kill_after=None, fill=None, left=0, size=None):
        self.at, self.left_to_pass = re.compile(at), number
        self.kill_after, self.fill, self.left, self.size = kill_after, fill, left, size

    def audit(self, event, arguments):
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & WRITING:
            self.happens("open", arguments[0])
        elif event in FILE_EVENTS:
            self.happens(FILE_EVENTS[event], str(arguments[0]))
        elif event == "sqlite3.connect":
            self.happens("connect", str(arguments[0]))

    def connect(self, *arguments, **options):
        database = sqlite3.Connection(*arguments, **options)
        database.set_trace_callback(lambda statement: self.happens("sql", " ".join(statement[:100].split())))
        return database

    def happens(self, verb, what):
        if self.left_to_pass and self.at.search(f"{verb} {what}") and self._has_the_size(what):
            self.left_to_pass -= 1
            if not self.left_to_pass:
                self.do()

    def _has_the_size(self, path):
        return self.size is None or (os.path.exists(path) and os.path.getsize(path) == self.size)

    def do(self):
        if self.fill is not None:
            fill_disk(self.fill, self.left)
        elif self.kill_after:
            threading.Thread(target=self._kill_later, daemon=True).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def _kill_later(self):
        time.sleep(self.kill_after)
        os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(ballast, left):
    """Take all space on the disk of the file `ballast` but `left` bytes, in whole pages."""
    handle = os.open(ballast, os.O_CREAT | os.O_WRONLY)
    disk = os.fstatvfs(handle)
    free = disk.f_bavail * disk.f_frsize - left
    if free > 0:
        os.posix_fallocate(handle, 0, free)
    os.close(handle)


def run(deed, words):
    """`python -m latentmem.cli WORDS...` in this process, with a deed or without (None)."""
    if deed is not None:
        waiting = Deed(**deed)
        sys.addaudithook(waiting.audit)
        sqlite3.connect = waiting.connect
    sys.argv[1:] = words
    runpy.run_module("latentmem.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), sys.argv[2:])
