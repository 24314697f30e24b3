"""The process of a server: it is killed under load, restarted and ended, and loses nothing that it acknowledged."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from openai import OpenAI
from serving_process import server

from latentmem import cli
from latentmem.bank import ExperienceBank
from latentmem.models.embedder import HashingEmbedder
from latentmem.serving.sessions.session import State
from latentmem.serving.sessions.store import SessionStore


class Acknowledged:
    """What clients were told."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls, self.events, self.episodes = [], [], {}

    def __len__(self):
        return len(self.episodes)


def play(served, acknowledged, stop):
    """Play episodes until the server is gone, and note all that it acknowledged."""
    try:
        with httpx2.Client(base_url=served.address, timeout=60) as http:
            while not stop.is_set():
                opened = http.post("/sessions", json={}).raise_for_status().json()
                sid = opened["id"]
                messages = [{"role": "user", "content": f"What is {len(acknowledged)} + 7?"}]
                for _ in range(2):
                    body = {"model": str(served.model), "messages": messages, "max_tokens": 4}
                    answer = http.post(f"/sessions/{sid}/v1/chat/completions", json=body).raise_for_status().json()
                    with acknowledged.lock:
                        acknowledged.calls.append((sid, answer["id"]))
                    messages = [*messages, answer["choices"][0]["message"], {"role": "user", "content": "And now?"}]
                event = {"event_type": "reward", "data": {"value": 1.0}}
                http.post(f"/sessions/{sid}/events", json=event).raise_for_status()
                with acknowledged.lock:
                    acknowledged.events.append(sid)
                ended = http.post(f"/sessions/{sid}/complete", json={}).raise_for_status().json()
                with acknowledged.lock:
                    acknowledged.episodes[sid] = ended["trajectory"]
    except httpx2.HTTPError:
        return


def check(folder, acknowledged):
    """Everything acknowledged is on disk, and the bank is whole."""
    store = SessionStore(folder / "run" / "serve" / "sessions.sqlite")
    for sid, call in acknowledged.calls:
        session = store.get("", sid)
        assert session is not None
        answers = [kept.id for kept in store.calls(session) if kept.answer is not None]
        assert call in answers
    for sid in acknowledged.events:
        assert store.events(store.get("", sid)) == [{"event_type": "reward", "data": {"value": 1.0}}]
    with ExperienceBank(folder / "run" / "bank.sqlite", HashingEmbedder(), embedder="hashing") as bank:
        for sid, trajectory in acknowledged.episodes.items():
            assert store.get("", sid).state is State.SUCCEEDED
            (stored,) = bank.get([trajectory])
            assert stored.origin.session == sid
            assert len(stored.messages) == 2
            assert len({message.served.lineage for message in stored.messages}) == 1
        sessions = [trajectory.origin.session for trajectory in bank]
        assert len(set(sessions)) == len(sessions)
        assert not bank.verify().problems
    store.close()


def test_a_server_that_is_killed_under_load_loses_nothing_that_it_acknowledged(tmp_path, tiny_model_dir):
    acknowledged = Acknowledged()
    before = 0
    for round_ in range(2):
        with server(tmp_path, tiny_model_dir) as served, ThreadPoolExecutor(6) as pool:
            served.model = tiny_model_dir
            stop = threading.Event()
            playing = [pool.submit(play, served, acknowledged, stop) for _ in range(6)]
            deadline = time.monotonic() + 120
            while len(acknowledged) < before + 12 and time.monotonic() < deadline:
                time.sleep(0.02)
            served.process.send_signal(signal.SIGKILL)
            served.process.wait()
            stop.set()
            for each in playing:
                each.result(60)
        assert len(acknowledged) >= before + 12, f"round {round_}"
        before = len(acknowledged)
        check(tmp_path, acknowledged)


def test_a_session_goes_on_after_a_kill_and_no_second_server_does(tmp_path, tiny_model_dir, capsys):
    chat = {"model": str(tiny_model_dir), "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
    key = {"Idempotency-Key": "k"}
    with server(tmp_path, tiny_model_dir) as served:
        opened = httpx2.post(f"{served.address}/sessions", json={"id": "s"}).json()
        first = httpx2.post(f"{served.address}/sessions/s/v1/chat/completions", json=chat, headers=key).json()
        served.process.kill()
    with server(tmp_path, tiny_model_dir) as served:
        again = httpx2.post(f"{served.address}/sessions/s/v1/chat/completions", json=chat, headers=key).json()
        assert (again["id"], again["choices"]) == (first["id"], first["choices"])
        messages = [*chat["messages"], first["choices"][0]["message"], {"role": "user", "content": "And 3 + 3?"}]
        with OpenAI(base_url=f"{served.url}", api_key=opened["token"], max_retries=0) as client:  # the old token holds
            client.chat.completions.create(model=str(tiny_model_dir), messages=messages)
        line = fails(capsys, tmp_path / "c.yaml")
        assert line.endswith("is working in this run folder; wait until it ends, or name another folder")
        traces = httpx2.get(f"{served.address}/sessions/s/traces").json()["traces"]
        assert [trace["lineage"] for trace in traces] == ["0", "0"]
        assert httpx2.post(f"{served.address}/sessions/s/complete", json={"reward": 1}).json()["state"] == "succeeded"


def stream(served, model, sid, tokens):
    """Begin a stream and yield its lines."""
    chat = {"model": str(model), "messages": [{"role": "user", "content": "Count."}], "stream": True}
    chat |= {"max_tokens": tokens}
    with httpx2.stream("POST", f"{served.address}/sessions/{sid}/v1/chat/completions", json=chat, timeout=60) as answer:
        yield answer.status_code
        yield from answer.iter_lines()


LONG = {"defaults": {"max_response_tokens": 1500}}


def test_sigterm_lets_requests_in_flight_end_and_refuses_new_ones(tmp_path, tiny_model_dir):
    with server(tmp_path, tiny_model_dir, **LONG) as served:
        lines = stream(served, tiny_model_dir, "s", 1200)
        assert next(lines) == 200
        next(lines)
        with httpx2.Client(base_url=served.address) as http:
            assert http.get("/healthz").status_code == 200
            served.process.send_signal(signal.SIGTERM)
            while (health := http.get("/healthz")).status_code == 200:
                time.sleep(0.01)
            chat = {"model": str(tiny_model_dir), "messages": [{"role": "user", "content": "x"}]}
            refused = http.post("/v1/chat/completions", json=chat)
        assert (health.status_code, refused.status_code) == (503, 503)
        assert int(refused.headers["retry-after"]) >= 1
        told = [line for line in lines if line]
        assert told[-1] == "data: [DONE]"
        assert served.process.wait(60) == 0
        assert served.said == f"serve: getting {tiny_model_dir} ready; the address follows once requests are taken\n"
    store = SessionStore(tmp_path / "run" / "serve" / "sessions.sqlite")
    (call,) = store.calls(store.get("", "s"))
    assert call.answer is not None
    store.close()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path, tiny_model_dir):
    with server(tmp_path, tiny_model_dir, **LONG) as served:
        chat = {"model": str(tiny_model_dir), "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        done = httpx2.post(f"{served.address}/sessions/a/v1/chat/completions", json=chat).json()
        lines = stream(served, tiny_model_dir, "s", 1500)
        assert next(lines) == 200
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        while httpx2.get(f"{served.address}/healthz").status_code == 200:
            time.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 128 + signal.SIGTERM
        with pytest.raises(httpx2.HTTPError):
            list(lines)
    store = SessionStore(tmp_path / "run" / "serve" / "sessions.sqlite")
    assert store.answered_call("", "a", done["id"]).id == done["id"]
    (call,) = store.calls(store.get("", "s"))
    assert (call.answer, call.lost) == (None, "the server ended")
    store.close()


# Mistakes


def fails(capsys, *words):
    """The one line of a command that ends with status 2."""
    assert cli.main(["serve", *map(str, words)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line.removeprefix("latentmem: ").strip()


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"run": str(tmp_path / "run"), "model": {"name": str(tiny_model_dir)}}))
    return path


def test_what_cannot_be_served_is_told_in_one_line(config, capsys, tmp_path):
    assert fails(capsys, config, "--host", "0.0.0.0").startswith("serve.host is '0.0.0.0', which others can reach")
    assert "which is no address here" in fails(capsys, config, "--host", "no-such-host.invalid")
    assert "serve.memory is 'latnt'; expected none, text, or latent:" in fails(capsys, config, "serve.memory=latnt")
    assert "is no regular expression" in fails(capsys, config, "serve.roles=[{name: a, profile: b, pattern: '('}]")
    line = fails(capsys, config, "serve.memory=latent:lmpo", "serve.port=0")
    assert line.endswith("no checkpoint of lmpo here; run `latentmem train lmpo` with this configuration first")
    line = fails(capsys, config, "serve.memory=latent:lmop", "serve.port=0")
    assert line.startswith("lmop: no composer here, there is no such folder; ")
    assert line.endswith("did you mean 'lmpo'?")
    line = fails(capsys, config, "serve.memory=latent:nosuch", "serve.port=0")
    assert line.endswith("known: lmpo, sft, untrained, warmup")


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(config, capsys, monkeypatch):
    import socket

    from latentmem.recipes import parts

    monkeypatch.setattr(parts, "load_model", lambda *_: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert fails(capsys, config, "--port", port) == (
            f"port {port} of 127.0.0.1 is taken by another program; give another with --port"
        )
