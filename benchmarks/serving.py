"""What `latentmem serve` costs: the engine asked directly against the server before it, by 16 clients, alternately.

The server is asked without memory, with text memory and with latents, the latter two of the same retrieved episodes.
Each client then asks on in its chat: prompts and latents that the server has kept are not read or composed again.

Directly: one call of `model.respond` with all prompts of a round, which is the best case for a batch; once as it is,
once with a listener to each response. Served: as many clients at the same time, each with a connection and a session of
its own; each streams one response. Seeds and limits are the same; prompts are new each time and equally long. Time to
the first token, tokens a second and tokens a second of CPU (the server's without the clients') are medians over the
rounds.

    python benchmarks/serving.py [--rounds 7] [--clients 16] [--tokens 64] [--memories none text latent] [--out FILE]
    python benchmarks/serving.py --url http://127.0.0.1:8001    the engine is that server of vLLM
    python benchmarks/serving.py --quick                        a smoke run, a minute
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import yaml
from processes import cpu_seconds

from latentmem.bank import ExperienceBank
from latentmem.config import Sampling
from latentmem.engines.vllm import VLLMEngine
from latentmem.models.agent import AgentModel, Prompt
from latentmem.models.embedder import HashingEmbedder
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Conversation, Message, Recalled, Step, Task, Trajectory

SYSTEM = "You are a careful assistant in a team that keeps a lighthouse."
WORDS = ["lamp", "tower", "river", "gold", "mill", "stone", "wind", "salt"]
GO_ON = "Tell more of the last of these."
TEMPERATURE = 0.8
EPISODES = 50
LATENT = "latent:untrained"


@dataclass(frozen=True)
class Measured:
    """What one round took."""

    first: float
    """Median time to the first token, in seconds."""
    seconds: float
    cpu_seconds: float
    num_tokens: int


def users_of(number: int, clients: int, length: int) -> list[str]:
    """Return the user messages of a round, of some `length` words; none comes twice."""
    generator = torch.Generator().manual_seed(number)
    picks = torch.randint(0, len(WORDS), (clients, length), generator=generator).tolist()
    return [f"{number}.{i}: tell more of {' '.join(WORDS[p] for p in row)}." for i, row in enumerate(picks)]


def episode_of(text: str) -> Trajectory:
    """Return an episode of an agent that said something long."""
    said = f"It was like this: {text} " * 2
    message = Message(
        role="keeper",
        system=SYSTEM,
        user=text,
        response=said,
        token_ids=(1,),
        logps=(0.0,),
        finish="stop",
        temperature=1.0,
        num_prompt_tokens=1,
        recalled=Recalled(kind="none"),
    )
    return Trajectory(
        task=Task(id=None, domain="served", text=text),
        team="t",
        model="m",
        steps=(Step(messages=(message,), action=said, observation=""),),
        reward=1.0,
        success=True,
        seed=0,
    )


def chat_of(user: str) -> tuple[dict[str, Any], ...]:
    """Return the messages of a chat."""
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": user})


def directly(
    model: AgentModel,
    users: Sequence[str],
    seeds: Sequence[int],
    how: Sampling,
    pid: int,
    heard: bool,
) -> Measured:
    """Ask the engine for all responses in one call."""
    firsts: list[float] = []

    def listener() -> Callable[[Sequence[int]], bool]:
        told: list[int] = []

        def listen(tokens: Sequence[int]) -> bool:
            if not told:
                firsts.append(time.perf_counter() - began)
            told.extend(tokens)
            return True

        return listen

    prompts = [
        Prompt("a", SYSTEM, user, user, seed, conversation=Conversation(messages=chat_of(user)))
        for user, seed in zip(users, seeds, strict=True)
    ]
    if heard:
        prompts = [replace(prompt, on_tokens=listener()) for prompt in prompts]
    before, began = cpu_seconds(os.getpid()) + (cpu_seconds(pid) if pid else 0.0), time.perf_counter()
    said = model.respond(prompts, how)
    seconds = time.perf_counter() - began
    cpu = cpu_seconds(os.getpid()) + (cpu_seconds(pid) if pid else 0.0) - before
    return Measured(statistics.median(firsts or [seconds]), seconds, cpu, sum(len(one.token_ids) for one in said))


def served(
    url: str, name: str, memory: str, users: Sequence[str], seeds: Sequence[int], how: Sampling, pids: Sequence[int]
) -> tuple[Measured, Measured]:
    """Let one client for each message ask the server, all at the same time; then each asks on in its chat."""
    chats = [list(chat_of(user)) for user in users]
    first = served_turn(url, name, memory, chats, seeds, how, pids)
    for chat in chats:
        chat.append({"role": "user", "content": GO_ON})
    return first, served_turn(url, name, memory, chats, seeds, how, pids)


def served_turn(
    url: str,
    name: str,
    memory: str,
    chats: Sequence[list[dict[str, Any]]],
    seeds: Sequence[int],
    how: Sampling,
    pids: Sequence[int],
) -> Measured:
    """Let one client for each chat ask the server, all at the same time; the answers are put behind the chats."""
    place = urlsplit(url)
    ready = threading.Barrier(len(chats) + 1)
    began = 0.0

    def ask(chat: list[dict[str, Any]], seed: int) -> tuple[float, int]:
        request = {
            "model": name,
            "messages": chat,
            "temperature": how.temperature,
            "max_tokens": how.max_response_tokens,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "latentmem": {"memory": memory, "session": f"{memory} {chat[1]['content'][:9]}", "role": "keeper"},
        }
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)
        connection.connect()
        ready.wait()
        connection.request(
            "POST", f"{place.path}/chat/completions", json.dumps(request), {"Content-Type": "application/json"}
        )
        first, num_tokens, text = 0.0, 0, ""
        with connection.getresponse() as response:
            assert response.status == 200, response.read()
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                said = json.loads(line[6:])
                text += "".join(choice["delta"].get("content") or "" for choice in said["choices"])
                if not first and text:
                    first = time.perf_counter() - began
                if said.get("usage"):
                    num_tokens = said["usage"]["completion_tokens"]
        connection.close()
        chat.append({"role": "assistant", "content": text})
        return first or time.perf_counter() - began, num_tokens

    with ThreadPoolExecutor(len(chats)) as pool:
        asked = [pool.submit(ask, chat, seed) for chat, seed in zip(chats, seeds, strict=True)]
        ready.wait()
        before, began = sum(map(cpu_seconds, pids)), time.perf_counter()
        found = [one.result() for one in asked]
        seconds = time.perf_counter() - began
    cpu = sum(map(cpu_seconds, pids)) - before
    return Measured(statistics.median(first for first, _ in found), seconds, cpu, sum(num for _, num in found))


@contextmanager
def server(model: str, engine_url: str | None, clients: int, limit: int, length: int) -> Iterator[tuple[str, int]]:
    """Start the server over a bank of episodes; yield its address and its process."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run").mkdir()
        with ExperienceBank(Path(folder, "run", "bank.sqlite"), HashingEmbedder()) as bank:
            bank.add([episode_of(text) for text in users_of(99, EPISODES, length)])
        engine = {"kind": "local"} if engine_url is None else {"kind": "vllm", "urls": [engine_url]}
        values = {
            "run": f"{folder}/run",
            "model": {"name": model, "dtype": "float32", "engine": engine},
            "bank": {"embedder": "hashing"},
            "serve": {
                "memory": LATENT,
                "choose_memory": True,
                "port": 0,
                "log": "none",
                "parallel": clients,
                "defaults": {"max_response_tokens": limit},
            },
        }
        path = Path(folder) / "serve.yaml"
        path.write_text(yaml.safe_dump(values))
        words = [sys.executable, "-m", "latentmem.cli", "serve", str(path)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line.startswith("serve: "), f"the server does not start: {line!r}"
                yield line.rpartition(" at ")[2].strip(), process.pid
            finally:
                process.terminate()
                process.wait()


def told(name: str, rounds: Sequence[Measured]) -> dict[str, Any]:
    """Return the medians of one way to ask."""
    return {
        "way": name,
        "first_ms": 1000 * statistics.median(one.first for one in rounds),
        "tokens_per_second": statistics.median(one.num_tokens / one.seconds for one in rounds),
        "tokens_per_cpu_second": statistics.median(one.num_tokens / one.cpu_seconds for one in rounds),
        "num_tokens": sum(one.num_tokens for one in rounds),
    }


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--memories", nargs="+", choices=["none", "text", "latent"], default=["none", "text", "latent"])
    parser.add_argument("--url", help="a server of vLLM")
    parser.add_argument("--engine-pid", type=int, default=0, help="its process, so that its CPU time counts")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.clients, options.tokens, options.words = 2, 4, 8, 10
    how = Sampling(temperature=TEMPERATURE, max_response_tokens=options.tokens)
    model = LanguageModel.from_pretrained(options.model, dtype="float32")
    engine: AgentModel = model if options.url is None else VLLMEngine(model, [options.url], options.clients)
    served_ways = {f"served, {name}": LATENT if name == "latent" else name for name in options.memories}
    found: dict[str, list[Measured]] = {}
    with server(options.model, options.url, options.clients, options.tokens, options.words) as (url, pid):
        pids = [pid, *([options.engine_pid] if options.engine_pid else [])]
        for number in range(-1, options.rounds):
            seeds = [1000 * (number + 1) + i for i in range(options.clients)]

            def fresh(way: int, number: int = number) -> list[str]:
                # Each way has prompts of its own: an engine that keeps what it read would read them once.
                return users_of(1 + number + 1000 * way, options.clients, options.words)

            alone = partial(directly, engine, seeds=seeds, how=how, pid=options.engine_pid)
            ways: dict[str, Callable[[], tuple[Measured, ...]]] = {
                "directly": lambda alone=alone, fresh=fresh: (alone(users=fresh(0), heard=False),),
                "directly, heard": lambda alone=alone, fresh=fresh: (alone(users=fresh(1), heard=True),),
            }
            for way, (name, memory) in enumerate(served_ways.items(), 2):
                ways[name] = partial(served, url, options.model, memory, fresh(way), seeds, how, pids)
            names = list(ways)
            for place in range(len(names)):
                name = names[(place + number) % len(names)]  # none is always first
                for turn, measured in enumerate(ways[name]()):
                    if number >= 0:
                        found.setdefault(f"{name}, next turn" if turn else name, []).append(measured)
    rows = [told(name, found[name]) for name in sorted(found)]
    threads = torch.get_num_threads()
    print(f"{options.clients} clients, {options.tokens} tokens, {threads} threads, medians of {options.rounds}")
    print(f"{'':25} {'first token':>12} {'tokens/s':>9} {'tokens/CPU s':>13} {'lost':>7} {'of CPU':>7}")
    for row in rows:
        rounds = found[row["way"]]
        row["lost"] = 1 - statistics.median(_ratios(rounds, found["directly"], lambda one: one.seconds))
        row["lost_cpu"] = 1 - statistics.median(_ratios(rounds, found["directly"], lambda one: one.cpu_seconds))
        figures = f"{row['first_ms']:9.0f} ms {row['tokens_per_second']:9.1f} {row['tokens_per_cpu_second']:13.1f}"
        print(f"{row['way']:25} {figures} {row['lost']:7.1%} {row['lost_cpu']:7.1%}")
    if options.out is not None:
        options.out.write_text(json.dumps({"rows": rows, "options": vars(options) | {"out": None}}, indent=1) + "\n")


def _ratios(served: Sequence[Measured], alone: Sequence[Measured], cost: Callable[[Measured], float]) -> list[float]:
    """Return, round by round, the served rate as a share of the direct one."""
    return [
        (one.num_tokens / cost(one)) / (other.num_tokens / cost(other))
        for one, other in zip(served, alone, strict=True)
    ]


if __name__ == "__main__":
    main()
