"""What the experience bank costs as it grows: insert rate, first search, search with filters, recall, memory, disk.

The trajectories are made up: two messages of 64 tokens each, as many bytes as real ones. The embedder is replaced by
seeded vectors (e = 384) with structure: domains, topics in them of very unequal size, noise, and four trajectories to a
task, which share its vector. Real embeddings may be easier or harder for the approximate search. Success is a coin,
domains are mixed row by row, which is the worst order for a search that reads what a filter lets pass.

`add` is measured on the first rows of each bank and again at its full size. What lies between goes through the records'
layer in large transactions, with one stored form of the same size for all: a million are there in minutes, not hours.
Exact and approximate searches take turns, query by query, so a machine that is busy slows both; wall clock and
processor time are reported. What the embedder takes is not in them.

    python benchmarks/bank.py [--out results.json] [--sizes 10000,100000,1000000] [--only-exact]
    python benchmarks/bank.py --quick       a smoke run, seconds

By default 10^4 and 10^5, half a minute of processor time. 10^6 takes 8 GB of disk and three minutes of processor time.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from latentmem.bank import ExperienceBank, Found
from latentmem.bank.matrix import read_matrix
from latentmem.bank.records import open_records
from latentmem.bank.stored_form import encode
from latentmem.bank.tables import Record, record_of
from latentmem.trajectory import Message, Recalled, Step, Task, Trajectory

WIDTH = 384
NUM_DOMAINS = 8
TOPICS_PER_DOMAIN = 256
PER_TASK = 4
RARE_EVERY = 100
"""One trajectory in a hundred is of the team that the rare filter asks for."""
K = 10
NUM_QUESTIONS = 40
ADDED = {16: 48, 256: 4}
"""Batches that are measured, by batch size."""
FILL_TRANSACTION = 20_000
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "success": {"success": True},
    "success+domain": {"success": True, "domain": "d0"},
    "other domain": {"success": True, "domain": "d1"},
    "rare": {"team": "rare"},
}
"""Queries are of domain d0 where a filter names one: `other domain` is at odds with them."""


# Made-up trajectories


class Space:
    """Vectors with structure: a text's vector depends on the text alone."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.domains = unit(rng.standard_normal((NUM_DOMAINS, WIDTH)))
        self.topics = unit(rng.standard_normal((NUM_DOMAINS, TOPICS_PER_DOMAIN, WIDTH)))
        share = 1 / np.arange(1, TOPICS_PER_DOMAIN + 1)
        self.shares = share / share.sum()

    def embed(self, texts: list[str]) -> np.ndarray:
        """[n, e] of texts such as "d3 17": a domain and a number."""
        return np.stack([self._vector(*map(int, text[1:].split())) for text in texts])

    def _vector(self, domain: int, number: int) -> np.ndarray:
        rng = np.random.default_rng((1, domain, number))
        topic = self.topics[domain, np.searchsorted(self.shares.cumsum(), rng.random())]
        noise = unit(rng.standard_normal(WIDTH))
        return unit(0.5 * self.domains[domain] + 0.6 * topic + 0.6 * noise).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def make(number: int, rng: np.random.Generator) -> Trajectory:
    """The trajectory with this number: of task number // PER_TASK."""
    task = number // PER_TASK
    domain = f"d{task % NUM_DOMAINS}"
    messages = tuple(
        Message(
            role=role,
            system="You solve small tasks with another agent. Answer with the last line.",
            user=f"Task {task} of {domain}: " + "what is asked here, in a sentence or two. " * 4,
            response=f"{number} " + " ".join(map(str, rng.integers(0, 1000, 60).tolist())),
            token_ids=tuple(rng.integers(0, 49_000, 64).tolist()),
            logps=tuple((-rng.random(64)).tolist()),
            finish="stop",
            temperature=0.7,
            num_prompt_tokens=120,
            recalled=Recalled(kind="none"),
        )
        for role in ("assistant", "user proxy")
    )
    success = bool(rng.random() < 0.5)
    return Trajectory(
        task=Task(id=str(task), domain=domain, text=f"{domain} {task}"),
        team="rare" if rng.integers(RARE_EVERY) == 0 else "autogen",
        model="smollm2-135m",
        steps=(Step(messages=messages, action="a", observation=""),),
        reward=float(success),
        success=success,
        seed=0,
    )


def fill(path: Path, space: Space, start: int, size: int) -> None:
    """Records `start` to `size`, each with the stored form of one and the same trajectory."""
    rng = np.random.default_rng(start)
    pattern = make(start, rng)
    stored_form = encode(pattern)
    records = open_records(path, create=False)
    for begin in range(start, size, FILL_TRANSACTION):
        rows: list[Record] = []
        for number in range(begin, min(begin + FILL_TRANSACTION, size)):
            if number % PER_TASK == 0 or number == begin:
                task = number // PER_TASK
                domain = f"d{task % NUM_DOMAINS}"
                asked = Task(id=str(task), domain=domain, text=f"{domain} {task}")
                (vector,) = space.embed([asked.text])
            success = bool(rng.random() < 0.5)
            row: Any = SimpleNamespace(  # what the records read of a trajectory, without its cost
                id=hashlib.sha256(str(number).encode()).hexdigest()[:32],
                task=asked,
                success=success,
                reward=float(success),
                team="rare" if rng.integers(RARE_EVERY) == 0 else "autogen",
                model=pattern.model,
                messages=pattern.messages,
                origin=None,
            )
            rows.append(record_of(row, vector, stored_form))
        with records.write() as transaction:
            assert transaction.insert(rows) == len(rows)
    records.close()


# Measuring


class Known:
    """An embedder that looks vectors up, so that what a real one takes is in no figure."""

    def __init__(self, space: Space, texts: list[str]) -> None:
        distinct = list(dict.fromkeys(texts))
        self._vectors = dict(zip(distinct, space.embed(distinct), strict=True))

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.stack([self._vectors[text] for text in texts])


def open_bank(path: Path, known: Known, index: str) -> ExperienceBank:
    return ExperienceBank(path, known, embedder="made up", index=index)  # type: ignore[arg-type]


def insert_rates(
    path: Path, space: Space, start: int, num_batches: dict[int, int]
) -> tuple[dict[str, dict[str, float]], int]:
    """Trajectories a second by `add`, and a second of processor time, by batch size; the next trajectory's number."""
    rates = {}
    rng = np.random.default_rng(start)
    for batch_size, count in num_batches.items():
        rows = [make(number, rng) for number in range(start, start + batch_size * count)]
        start += len(rows)
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        with open_bank(path, Known(space, [row.task.text for row in rows]), "exact") as bank:
            _, (wall, own) = timed(lambda bank=bank, batches=batches: [bank.add(batch) for batch in batches])
        rates[f"batches_of_{batch_size}"] = {"per_second": len(rows) / wall, "per_cpu_second": len(rows) / own}
    return rates, start


def questions(num_rows: int, count: int) -> list[Task]:
    """Tasks of domain d0: every other one is in the bank, where it must not be found, the others are new."""
    in_bank = np.random.default_rng(2).choice(num_rows // PER_TASK // NUM_DOMAINS, count) * NUM_DOMAINS
    numbers = [int(n) if i % 2 else num_rows + NUM_DOMAINS * i for i, n in enumerate(in_bank)]
    return [Task(id=str(number), domain="d0", text=f"d0 {number}") for number in numbers]


def memory_mib() -> dict[str, float]:
    """Peak resident memory, pages of mapped files included, and what is the process's own now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = {name: re.search(rf"{name}:\s+(\d+) kB", status) for name in ("VmHWM", "RssAnon")}
    return {name: int(match[1]) / 1024 for name, match in found.items() if match is not None}


def first_search(path: Path, num_rows: int, index: str) -> None:
    """In a process of its own: open, search once, print what that took."""
    (task,) = questions(num_rows, 1)
    known = Known(Space(), [task.text])
    before, own = time.perf_counter(), time.process_time()
    with open_bank(path, known, index) as bank:
        bank.search(task, k=K)
    seconds = {"seconds": time.perf_counter() - before, "cpu_seconds": time.process_time() - own}
    print(json.dumps(seconds | memory_mib()))


def in_process_of_its_own(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return report


def milliseconds(pairs: list[tuple[float, float]]) -> dict[str, float]:
    wall, own = (sorted(1000 * seconds for seconds in kind) for kind in zip(*pairs, strict=True))
    return {
        "p50_ms": statistics.median(wall),
        "p95_ms": wall[math.ceil(0.95 * len(wall)) - 1],
        "cpu_p50_ms": statistics.median(own),
    }


def timed(call: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    before, own = time.perf_counter(), time.process_time()
    result = call()
    return result, (time.perf_counter() - before, time.process_time() - own)


def overlap(exact: list[Found], approximate: list[Found]) -> float:
    """The share of the right similarities that were found; among equal ones any trajectory is right."""
    right, found = (Counter(hit.similarity for hit in hits) for hits in (exact, approximate))
    return (right & found).total() / len(exact)


def mapped_rows(path: Path) -> np.ndarray:
    """The matrix [N, e] in a bank's index file."""
    records = open_records(path, create=False)
    with records.read() as transaction:
        stored = read_matrix(path.with_name(f"{path.name}.index"), transaction.meta().generation)
    records.close()
    assert stored is not None
    return stored.vectors


def measure_search(path: Path, num_rows: int, indexes: list[str], count: int) -> dict[str, Any]:
    """Each filter's searches, exact and approximate in turns, and how fast memory can be read, in turns with them."""
    tasks = questions(num_rows, count)
    known = Known(Space(), [task.text for task in tasks])
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        banks = {index: stack.enter_context(open_bank(path, known, index)) for index in indexes}
        for bank in banks.values():
            bank.search(tasks[0], k=K)
        flat, reads = mapped_rows(path).reshape(-1), []
        for name, filters in FILTERS.items():
            taken: dict[str, list[tuple[float, float]]] = {index: [] for index in banks}
            recalls = []
            for task in tasks:
                found = {}
                for index, bank in banks.items():
                    rows, seconds = timed(partial(bank.search, task, k=K, **filters))
                    taken[index].append(seconds)
                    found[index] = rows
                if not filters:
                    reads.append(timed(lambda: np.dot(flat, flat))[1])
                if len(found) == 2:
                    exact, approximate = found.values()
                    recalls.append(overlap(exact, approximate))
            figures[name] = {index: milliseconds(seconds) for index, seconds in taken.items()}
            if recalls:
                figures[name]["recall"] = {"mean": statistics.mean(recalls), "least": min(recalls)}
        many = [timed(lambda: banks["exact"].search_many(tasks[:64], k=K))[1] for _ in range(3)]
        figures["search_many"] = milliseconds(many) | {"num_tasks": len(tasks[:64])}
    read = milliseconds(reads)
    figures["reading"] = read | {
        "gb_per_second": flat.nbytes / read["cpu_p50_ms"] / 1e6,
        "exact_over_reading": figures["none"]["exact"]["cpu_p50_ms"] / read["cpu_p50_ms"],
    }
    return figures


# The whole


def measure(folder: Path, num_rows: int, indexes: list[str], count: int, added: dict[int, int]) -> dict[str, Any]:
    """All figures of one size."""
    path, space = folder / "bank.sqlite", Space()
    figures: dict[str, Any] = {"insert_at_start": {}, "insert_at_size": {}, "first_search": {}}
    figures["insert_at_start"], reached = insert_rates(path, space, 0, added)
    at_size = sum(batch_size * count for batch_size, count in added.items())
    figures["fill_seconds"] = timed(lambda: fill(path, space, reached, num_rows - at_size))[1][0]
    figures["insert_at_size"], _ = insert_rates(path, space, num_rows - at_size, added)
    for index in indexes:
        for state in ("to_be_built", "present"):
            figures["first_search"][f"{index}_{state}"] = in_process_of_its_own(path, num_rows, index)
    figures["search"] = measure_search(path, num_rows, indexes, count)
    sizes = {file.name.removeprefix("bank.sqlite") or "records": file.stat().st_size for file in folder.iterdir()}
    figures["bytes_per_trajectory"] = {name: size / num_rows for name, size in sizes.items()}
    return figures


def show(path: str, figures: dict[str, Any]) -> None:
    for key, value in figures.items():
        if isinstance(value, dict):
            show(f"{path}.{key}", value)
        else:
            print(f"{path + '.' + key:<64}{value:>12.4g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--sizes", help="numbers of trajectories, with commas between them; 10000,100000")
    parser.add_argument("--folder", type=Path, help="where the banks are made, and removed again; a temporary folder")
    parser.add_argument("--only-exact", action="store_true", help="for where faiss is not installed")
    parser.add_argument("--quick", action="store_true", help="one small size, few searches: only to see that it works")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, num_rows, index = options.child
        first_search(Path(path), int(num_rows), index)
        return
    sizes = [int(size) for size in (options.sizes or ("25000" if options.quick else "10000,100000")).split(",")]
    indexes = ["exact"] if options.only_exact else ["exact", "approximate"]
    results: dict[str, Any] = {"threads": os.environ.get("OMP_NUM_THREADS", "all"), "numpy": np.__version__, "k": K}
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            count, added = (4, {16: 2, 256: 1}) if options.quick else (NUM_QUESTIONS, ADDED)
            results[str(size)] = measure(Path(folder), size, indexes, count, added)
        show(str(size), results[str(size)])
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
