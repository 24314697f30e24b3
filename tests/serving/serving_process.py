"""`latentmem serve` as a process of its own, over a tiny model."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


class Server:
    """A running server."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    @property
    def address(self) -> str:
        """Its address without `/v1`."""
        return self.url.removesuffix("/v1")

    @property
    def said(self) -> str:
        """What it wrote to standard error."""
        return self.log.read_text()


@contextmanager
def server(folder: Path, model_dir: Path, **serve: Any) -> Iterator[Server]:
    """Start a server whose run is in a folder, and kill it in the end if it still runs."""
    section = {"port": 0, "log": "none", "defaults": {"max_response_tokens": 8}} | serve
    values = {
        "run": str(folder / "run"),
        "model": {"name": str(model_dir)},
        "bank": {"embedder": "hashing"},
        "serve": section,
    }
    (folder / "c.yaml").write_text(yaml.dump(values))
    log = folder / "stderr.txt"
    with log.open("a") as errors:
        words = [sys.executable, "-m", "latentmem.cli", "serve", str(folder / "c.yaml")]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("serve: "), log.read_text()
        yield Server(process, line.rpartition(" at ")[2].strip(), log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
