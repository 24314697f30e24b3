"""What `latentmem retriever serve` costs: index time, size on disk, and the time of a batch of 8 queries over HTTP.

The corpus is made here: the rows of `--corpus` first, then passages of words drawn from them (without it, from made-up
words) with the frequencies that they have there, from a seed. Every query is asked once, so nothing is answered from a
memory of earlier ones. Each method is served by the command itself, in a process of its own on 127.0.0.1; what the
server's processor was busy with a batch is told beside the wall clock, for on a machine that others use only that
stays the same.

Embedding is the slow part, so by default only `--embedded` passages are; their rate is measured, and the other rows of
the dense index are random directions, over which the exact search takes just as long. `--embedded 0` embeds all.

    python benchmarks/retriever.py [--passages 100000] [--corpus FILE] [--embedded 256] [--out results.json]
    python benchmarks/retriever.py --quick      a smoke run, seconds
"""

import argparse
import http.client
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from processes import cpu_seconds

from latentmem.models.embedder import Embedder
from latentmem.server.corpus import Corpus
from latentmem.server.passage_index import SHARD, open_search, words

BATCH = 8
TOPK = 3
WORDS_PER_PASSAGE = 100
METHODS = ("bm25", "dense", "both")


def made_up_words(rng: random.Random) -> list[str]:
    """Words with the frequencies of Zipf: the r-th most frequent 1 / r as often as the first."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    known = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(50_000)]
    return rng.choices(known, [1 / rank for rank in range(1, len(known) + 1)], k=400_000)


def write_corpus(path: Path, source: Path | None, num_passages: int, rng: random.Random) -> list[str]:
    """The corpus; the words it is made of, as often as they occur."""
    rows = source.read_bytes().strip().split(b"\n")[:num_passages] if source else []
    pool = [w for row in rows for w in words(json.loads(row)["contents"])] or made_up_words(rng)
    with path.open("wb") as file:
        file.writelines(row + b"\n" for row in rows)
        for number in range(len(rows), num_passages):
            title, text = rng.choices(pool, k=2), rng.choices(pool, k=WORDS_PER_PASSAGE)
            row = {"id": f"made-{number}", "contents": f'"{" ".join(title)}"\n{" ".join(text)}'}
            file.write(json.dumps(row).encode() + b"\n")
    return pool


def index(corpus: Path, folder: Path, method: str, num_embedded: int) -> dict[str, Any]:
    """Make an index; what it took."""
    passages = Corpus(corpus)
    embedder = Embedder() if method == "dense" else None
    rng, embedding, embedded = np.random.default_rng(0), 0.0, 0

    def embed(texts: list[str]) -> np.ndarray:
        nonlocal embedding, embedded
        assert embedder is not None
        if num_embedded and embedded >= num_embedded:
            rows = rng.standard_normal((len(texts), embedder.width)).astype(np.float32)
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)
        began = time.process_time()
        vectors = embedder(texts)
        embedding += time.process_time() - began
        embedded += len(texts)
        return vectors

    wall, cpu = time.perf_counter(), time.process_time()
    open_search(passages, method, folder, "all-minilm-l6-v2", embed)  # type: ignore[arg-type]
    found = {
        "index_seconds": time.perf_counter() - wall,
        "index_cpu_seconds": time.process_time() - cpu,
        "disk_mb": sum(path.stat().st_size for path in (folder / method).iterdir()) / 2**20,
    }
    if embedded:
        found |= {"embedded": embedded, "embedded_per_cpu_second": embedded / embedding}
        found["all_embedded_cpu_hours"] = len(passages) / found["embedded_per_cpu_second"] / 3600
    return found


def serve_and_ask(corpus: Path, folder: Path, method: str, batches: list[list[str]], warm_up: int) -> dict[str, Any]:
    """Times of the batches, those of the warm-up left out."""
    command = [sys.executable, "-m", "latentmem.cli", "retriever", "serve", str(corpus), "--index", str(folder)]
    began = time.perf_counter()
    with subprocess.Popen([*command, "--method", method, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().rsplit("http://", 1)[1].removesuffix("/retrieve\n")
            start_seconds = time.perf_counter() - began
            seconds, cpu = [], 0.0
            for number, queries in enumerate(batches):
                if number == warm_up:
                    cpu = cpu_seconds(server.pid)
                began = time.perf_counter()
                found = ask(address, queries)
                seconds.append(time.perf_counter() - began)
                assert [len(passages) for passages in found] == [TOPK] * len(queries)
            cpu = cpu_seconds(server.pid) - cpu
            status = Path(f"/proc/{server.pid}/status").read_text().splitlines()
            memory = next(line for line in status if line.startswith("VmHWM"))
        finally:
            server.terminate()
    assert server.returncode == 0
    timed = sorted(seconds[warm_up:])
    return {
        "start_seconds": start_seconds,
        "p50_ms": statistics.median(timed) * 1e3,
        "p95_ms": timed[int(0.95 * len(timed))] * 1e3,
        "cpu_ms": cpu / len(timed) * 1e3,
        "server_memory_mb": int(memory.split()[1]) / 1024,
    }


def ask(address: str, queries: list[str]) -> list[Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    body = json.dumps({"queries": queries, "topk": TOPK, "return_scores": True})
    connection.request("POST", "/retrieve", body, {"Content-Type": "application/json", "Connection": "close"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return list(answer["result"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--corpus", type=Path, help="rows that the corpus begins with")
    parser.add_argument("--embedded", type=int, default=SHARD, help="passages embedded for the dense index; 0 is all")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--quick", action="store_true", help="small sizes: only to see that it works")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--keep", type=Path, help="keep corpus and indexes in this folder, and go on with them")
    options = parser.parse_args()
    if options.quick:
        options.passages, options.batches = 600, 5
    folder = options.keep or Path(tempfile.mkdtemp(prefix="retriever-"))
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    corpus = folder / "corpus.jsonl"
    pool = write_corpus(corpus, options.corpus, options.passages, rng)
    warm_up = max(2, options.batches // 10)
    results: dict[str, Any] = {"passages": options.passages, "corpus_mb": corpus.stat().st_size / 2**20}
    results |= {"batch": BATCH, "topk": TOPK, "batches": options.batches}
    kinds = ["bm25"] * (options.method != ["dense"]) + ["dense"] * (options.method != ["bm25"])
    for kind in kinds:
        results[f"index_{kind}"] = index(corpus, folder / "index", kind, options.embedded)
        show(f"index_{kind}", results[f"index_{kind}"])
    for method in options.method:
        batches = [
            [f"what is the {' '.join(rng.choices(pool, k=2))} of {' '.join(rng.choices(pool, k=2))}?" for _ in range(8)]
            for _ in range(warm_up + options.batches)
        ]
        results[method] = serve_and_ask(corpus, folder / "index", method, batches, warm_up)
        show(method, results[method])
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if not options.keep:
        shutil.rmtree(folder)


def show(part: str, figures: dict[str, Any]) -> None:
    for key, value in figures.items():
        print(f"{part + '.' + key:<48}{value:>14.4g}", flush=True)


if __name__ == "__main__":
    main()
