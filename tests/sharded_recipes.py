"""Run by test_sharded_recipes.py in one of several processes: commands of the command line, in test_recipes.py's world.

sharded_recipes.py DEEDS COMMAND... - each COMMAND is the words of one, in JSON. DEEDS is a JSON list of what goes
wrong: ["kill", RANK, N] kills that process at its N-th word to the others, ["lose", RANK, N] its launcher too, ["cut",
RANK, N, LINK] takes its host off the network, and ["stumble", N] makes train task N a mistake.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np

import latentmem.models.embedder
import test_recipes
from conftest import OddLength
from latentmem import processes, pulse, recipes
from latentmem.cli import main
from latentmem.environments.reasoning import ReasoningDomain
from latentmem.errors import DataError


def embed(texts):
    rows = [[byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:16]] for text in texts]
    return np.array(rows, dtype=np.float32)


def prepare(deeds: list) -> None:
    test_recipes.FakeEmbedder.embed = staticmethod(embed)
    latentmem.models.embedder.Embedder = test_recipes.FakeEmbedder
    recipes.evaluate.write_report = lambda runs: "no report"
    if any(deed[0] == "cut" for deed in deeds):
        pulse.BEAT_SECONDS, pulse.SILENCE_SECONDS = 0.5, 10.0
    mistaken = [deed[1] for deed in deeds if deed[0] == "stumble"]

    def start(self, task):
        if task in [self.tasks("train")[i] for i in mistaken]:
            raise DataError(f"task {task.key} stumbles")
        return OddLength()

    ReasoningDomain.start = start
    really, words = processes.Processes._gather, []

    def gather(self, part):
        words.append(part)
        for _, _, _, link in [deed for deed in deeds if deed[:3] == ["cut", self.rank, len(words)]]:
            subprocess.run(["ip", "link", "set", link, "down"], check=True)
        if ["lose", self.rank, len(words)] in deeds:
            os.kill(os.getppid(), signal.SIGKILL)
        if ["kill", self.rank, len(words)] in deeds or ["lose", self.rank, len(words)] in deeds:
            os.kill(os.getpid(), signal.SIGKILL)
        return really(self, part)

    processes.Processes._gather = gather


if __name__ == "__main__":
    prepare(json.loads(sys.argv[1]))
    for command in sys.argv[2:]:
        status = main(json.loads(command))
        if status:
            sys.exit(status)
