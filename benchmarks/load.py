"""A server under load: 64 clients for a minute, slow readers and vanishing clients among them; then kill -9.

Each client plays episodes without a pause: it opens a session, asks twice (once with a stream), tells a reward and
completes. Slow readers take a stream a few bytes a second; vanishing clients close their connection before the answer.
Printed are the latencies of the steady clients, the memory of the server every ten seconds, and after the kill how many
acknowledged episodes are missing from the bank.

    python benchmarks/load.py [--seconds 60] [--clients 64] [--memory latent:untrained] [--out FILE]
"""

import argparse
import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from latentmem.bank import ExperienceBank
from latentmem.models.embedder import HashingEmbedder

SYSTEM = "You keep a lighthouse and answer in a few words."


class Crowd:
    """What all clients have seen."""

    def __init__(self, host: str, port: int) -> None:
        self.place = (host, port)
        self.lock = threading.Lock()
        self.latencies: dict[str, list[float]] = {"open": [], "ask": [], "stream": [], "complete": []}
        self.statuses: Counter[int] = Counter()
        self.acknowledged: list[str] = []
        self.over = threading.Event()

    def note(self, what: str, seconds: float, status: int) -> None:
        with self.lock:
            self.statuses[status] += 1
            if status == 200 or status == 201:
                self.latencies[what].append(seconds)

    def post(self, connection: http.client.HTTPConnection, what: str, path: str, body: dict[str, Any]) -> Any:
        began = time.perf_counter()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
        self.note(what, time.perf_counter() - began, response.status)
        if response.status == 429 or response.status == 503:
            time.sleep(min(float(response.headers.get("Retry-After", 1)), 2.0))
        return (response.status, data)


def ask_of(session: str, user: str, tokens: int, stream: bool) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    return {
        "model": "m",
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 1.0,
        "stream": stream,
        "latentmem": {"session": session},
    }


def steady(crowd: Crowd, number: int, tokens: int) -> None:
    """Play episodes until the crowd is called off or the server is gone."""
    connection = http.client.HTTPConnection(*crowd.place, timeout=300)
    i = 0
    with contextlib.suppress(OSError, http.client.HTTPException):
        while not crowd.over.is_set():
            session = f"s-{number}-{i}"
            i += 1
            task = f"Client {number} asks for the colour of lamp {i % 7}."
            if crowd.post(connection, "open", "/sessions", {"id": session, "task": task})[0] not in (200, 201):
                continue
            done = crowd.post(connection, "ask", "/v1/chat/completions", ask_of(session, task, tokens, False))[0]
            again = f"{task} Look again."
            done_too = crowd.post(connection, "stream", "/v1/chat/completions", ask_of(session, again, tokens, True))[0]
            if (done, done_too) != (200, 200):
                continue
            end = {"reward": 1.0, "answer": f"red {number} {i}"}
            if crowd.post(connection, "complete", f"/sessions/{session}/complete", end)[0] == 200:
                with crowd.lock:
                    crowd.acknowledged.append(session)


def slow(crowd: Crowd, number: int) -> None:
    """Read streams a few bytes a second."""
    while not crowd.over.is_set():
        with contextlib.suppress(OSError), socket.create_connection(crowd.place, timeout=300) as taken:
            taken.sendall(_raw(ask_of(f"slow-{number}-{time.time_ns()}", "Tell a long story.", 32, True)))
            while not crowd.over.is_set() and taken.recv(16):
                time.sleep(0.5)


def vanishing(crowd: Crowd, number: int) -> None:
    """Ask and go away."""
    while not crowd.over.is_set():
        with contextlib.suppress(OSError), socket.create_connection(crowd.place, timeout=300) as taken:
            taken.sendall(_raw(ask_of(f"gone-{number}-{time.time_ns()}", "Tell a long story.", 32, number % 2 == 0)))
            time.sleep(0.3)
        time.sleep(0.5)


def _raw(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + data


def resident(pid: int) -> float:
    """Return the memory of a process that is its own, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--memory", default="latent:untrained")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "run": f"{folder}/run",
            "model": {"name": options.model, "dtype": "float32"},
            "bank": {"embedder": "hashing"},
            "serve": {"memory": options.memory, "port": 0, "log": "none", "parallel": 64},
        }
        path = Path(folder) / "serve.yaml"
        path.write_text(yaml.safe_dump(values))
        words = [sys.executable, "-m", "latentmem.cli", "serve", str(path)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serve: "), line
            host, _, port = line.rpartition("//")[2].partition("/")[0].partition(":")
            crowd = Crowd(host, int(port))
            jobs = [(steady, (crowd, i, options.tokens)) for i in range(options.clients)]
            jobs += [(slow, (crowd, i)) for i in range(4)] + [(vanishing, (crowd, i)) for i in range(4)]
            threads = [threading.Thread(target=work, args=given, daemon=True) for work, given in jobs]
            memory = [(0.0, resident(process.pid))]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            while (passed := time.perf_counter() - began) < options.seconds:
                time.sleep(min(10.0, options.seconds - passed + 0.01))
                memory.append((time.perf_counter() - began, resident(process.pid)))
            process.kill()  # under full load
            process.wait()
            crowd.over.set()
            for thread in threads:
                thread.join(30)
        with ExperienceBank(Path(folder, "run", "bank.sqlite"), HashingEmbedder()) as bank:
            kept = {trajectory.origin.session for trajectory in bank if trajectory.origin is not None}
    missing = [session for session in crowd.acknowledged if session not in kept]
    print(f"{options.clients} steady clients, 4 slow readers, 4 vanishing, {options.seconds:.0f} s, {options.memory}")
    print(f"answers by status: {dict(sorted(crowd.statuses.items()))}")
    for what, seconds in crowd.latencies.items():
        ranked = sorted(seconds)
        p99 = ranked[int(0.99 * (len(ranked) - 1))]
        print(f"{what:9} n {len(ranked):5}, p50 {statistics.median(ranked):6.2f} s, p99 {p99:6.2f} s")
    print("memory of the server: " + ", ".join(f"{mib:.0f} MiB at {at:.0f} s" for at, mib in memory))
    print(f"killed with -9: {len(crowd.acknowledged)} episodes acknowledged, {len(missing)} missing from the bank")
    if options.out is not None:
        found = {"latencies": crowd.latencies, "memory": memory, "acknowledged": len(crowd.acknowledged)}
        options.out.write_text(json.dumps(found | {"missing": missing}, indent=1) + "\n")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
