"""A real server of vLLM, started by `latentmem engine start`: hidden facts with the embedded model, and its death.

It needs the environment `.vllm` at the root of the checkout; `make engine-test` makes it and runs this file.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from latentmem.config import Sampling
from latentmem.engines.vllm import VLLMEngine
from latentmem.models.agent import Prompt
from latentmem.models.language_model import LanguageModel

ROOT = Path(__file__).parents[2]
VENV = Path(os.environ.get("LATENTMEM_TEST_VLLM", ROOT / ".vllm"))
CONFIG = """
team: solo
model: {dtype: float32}
data: {kind: hidden_facts, train_entities: 8, dev_entities: 2, test_entities: 4, values: 2, phrasings: 1}
bank: {num_retrieved: 1, only_successes: false, embedder: hashing}
memory:
  {text: "{memory}", task: "", step: "", reply: "{observation}", solved: "", unsolved: "", entry: "{text}"}
composer: {num_latents: 4, template: "{task} {memory}"}
sampling: {temperature: 1.0, max_response_tokens: 3}
sft: {demonstrations: domain, num_steps: 12, trajectories_per_step: 4, learning_rate: 0.001, save_every: 12}
lmpo: {num_steps: 6, tasks_per_step: 2, group_size: 6, save_every: 1}
evaluate: {memories: [none, text, "latent:sft", "latent:lmpo"], num_bootstraps: 50}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VENV.is_dir(), reason=f"no vLLM at {VENV}; `make engine-test` installs it"),
]


@pytest.fixture
def config(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    values = yaml.safe_load(CONFIG) | {"run": str(tmp_path / "run")}
    values["model"]["engine"] = {"kind": "vllm", "urls": [url], "retries": 1}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(*words):
    return [sys.executable, "-m", "latentmem.cli", *map(str, words)]


def run(*words, status=0):
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=3000)
    print(f"$ latentmem {' '.join(map(str, words))}\n{done.stdout}{done.stderr}(status {done.returncode})", flush=True)
    assert done.returncode == status, done.stderr
    return done


@contextlib.contextmanager
def server_of(config):
    """A server, once it answers; it is killed at the end, with all processes that it started."""
    url = yaml.safe_load(config.read_text())["model"]["engine"]["urls"][0]
    log = config.with_name("server.log")
    words = command("engine", "start", config, "--venv", VENV, "--max-model-len", 1024)
    with log.open("ab") as out:
        server = subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 1500
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=5):
                break
            time.sleep(1)
        yield server
    finally:
        kill(server)


def kill(server):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def rows(config, phase):
    path = Path(yaml.safe_load(config.read_text())["run"]) / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [row for row in lines if row["phase"] == phase]


def test_a_run_with_a_real_server_that_is_killed_once(config):
    run("train", "sft", config, status=2)  # nothing is collected yet
    with server_of(config) as server:
        run("engine", "check", config)
        run("collect", config)
        run("train", "sft", config)
        training = subprocess.Popen(command("train", "lmpo", config), stderr=subprocess.PIPE, text=True)
        while not rows(config, "lmpo") and training.poll() is None:
            time.sleep(0.2)
        kill(server)
        said = training.communicate(timeout=600)[1]
        print(f"the server was killed, and the training said:\n{said}(status {training.returncode})")
        assert training.returncode == 2
        assert "no usable answer after 2 attempts" in said.splitlines()[-1]
        num_done = len(rows(config, "lmpo"))
        assert 0 < num_done < 6
    with server_of(config):
        run("train", "lmpo", config)
        run("evaluate", config)
    trained = rows(config, "lmpo")
    assert [row["step"] for row in trained] == [*range(1, 7)]
    ratios = [row["first_ratio_max"] for row in trained if "first_ratio_max" in row]
    print("rewards", [row["reward"] for row in trained], "first ratios", ratios)
    assert ratios
    assert ratios == pytest.approx([1] * len(ratios), abs=1e-3)
    for name in ("results.json", "report/report.html"):
        assert (Path(yaml.safe_load(config.read_text())["run"]) / name).exists(), name


def test_a_real_server_streams_and_is_told_when_nobody_waits(config):
    values = yaml.safe_load(config.read_text())
    url = values["model"]["engine"]["urls"][0]
    model = LanguageModel.from_pretrained("smollm2-135m", dtype="float32")
    engine = VLLMEngine(model, [url], timeout_seconds=600, retries=0)
    latents = model.model.get_input_embeddings().weight[1000:1004].detach().clone()
    prompts = [
        Prompt("a", "Be brief.", f"Count from {i} to twenty.", f"g{i}", i, given)
        for i, given in enumerate((latents, None, latents, None))
    ]
    how = Sampling(temperature=0, max_response_tokens=24)
    heard = [[] for _ in prompts]

    def listener(place, most=1000):
        return lambda tokens: heard[place].extend(tokens) or len(heard[place]) < most

    with server_of(config):
        whole = engine.respond(prompts, how)
        streamed = engine.respond([replace(p, on_tokens=listener(i)) for i, p in enumerate(prompts)], how)
        assert [one.token_ids for one in streamed] == [one.token_ids for one in whole]
        assert [tuple(tokens) for tokens in heard] == [one.token_ids for one in whole]
        for one, other in zip(streamed, whole, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-3)
        stop = model.decode(whole[0].token_ids[5:8])
        for one in (prompts[0], prompts[1]):
            changed = replace(one, stop=(stop, "\n\n\n"), limit=20)
            (theirs,), (ours,) = engine.respond([changed], how), model.sample([changed], how)
            assert (theirs.token_ids, theirs.text, theirs.finish) == (ours.token_ids, ours.text, ours.finish)
        heard[0].clear()
        long = Sampling(temperature=0.9, max_response_tokens=900)
        (left,) = engine.respond([replace(prompts[0], on_tokens=listener(0, most=3))], long)
        assert len(left.token_ids) <= len(heard[0]) == 3 or left.finish == "stop"
        end = time.monotonic() + 60
        while running(url) and time.monotonic() < end:
            time.sleep(0.2)
        assert not running(url)  # 900 tokens would take far longer


def running(url):
    """Number of requests that the server works on."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))
