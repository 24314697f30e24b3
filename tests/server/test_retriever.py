"""The server: the protocol, bad requests, and the command in a process of its own."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from latentmem.bank import ExperienceBank
from latentmem.config import Rows
from latentmem.environments import retriever_client
from latentmem.environments.qa import QADomain, normalise
from latentmem.environments.retriever_client import Passage, RetrieverClient
from latentmem.environments.search import SearchEnvironment

pytest.importorskip("bm25s")
pytest.importorskip("starlette")
from starlette.testclient import TestClient

from latentmem import cli
from latentmem.server import retriever
from latentmem.server.corpus import Corpus
from latentmem.server.passage_index import open_search
from latentmem.server.retriever import create_app, serve


@pytest.fixture
def client(corpus, tmp_path):
    with TestClient(create_app(corpus, open_search(corpus, "bm25", tmp_path / "index", "", None), "bm25")) as client:
        yield client


def test_an_answer_has_a_list_for_each_query_with_or_without_scores(client):
    queries = ["who repaired the locks of the canal", "zzz", "door"]
    scored = client.post("/retrieve", json={"queries": queries, "topk": 2, "return_scores": True})
    assert scored.status_code == 200
    first, nothing, doors = scored.json()["result"]
    assert first[0]["document"] == {
        "id": "p2",
        "contents": '"Ada Quill"\nAda Quill repaired the locks of the canal and wrote about doors.',
    }
    assert nothing == []
    assert [len(first), len(doors)] == [2, 2]
    assert first[0]["score"] > first[1]["score"] > 0
    bare = client.post("/retrieve", json={"queries": queries, "topk": 2})
    assert bare.json() == {"result": [[entry["document"] for entry in hits] for hits in (first, nothing, doors)]}


def test_topk_may_be_left_out_and_unknown_fields_do_not_matter(client):
    query = "the canal of Wend and the door of the mill since winter"
    for request in ({}, {"topk": None}, {"topk": 3, "model": "mine"}):
        answer = client.post("/retrieve", json={"queries": [query], **request})
        assert [len(hits) for hits in answer.json()["result"]] == [3]


def test_health_tells_what_is_served(client):
    assert client.get("/health").json() == {"status": "ok", "passages": 7, "method": "bm25"}


BAD = [
    ({}, "queries: Field required"),
    ({"queries": "text"}, "queries: Input should be a valid"),
    ({"queries": []}, "queries: List should have at least 1 item"),
    ({"queries": ["a", 5]}, "queries.1: Input should be a valid string"),
    ({"queries": ["a", None]}, "queries.1: Input should be a valid string"),
    ({"queries": ["a"], "topk": 0}, "topk: Input should be greater than or equal to 1"),
    ({"queries": ["a"], "topk": 101}, "topk: Input should be less than or equal to 100"),
    ({"queries": ["a"], "topk": "3"}, "topk: Input should be a valid integer"),
    ({"queries": ["a"], "topk": 2.5}, "topk: Input should be a valid integer"),
    ({"queries": ["a"], "topk": True}, "topk: Input should be a valid integer"),
    ({"queries": ["a"], "return_scores": "yes"}, "return_scores: Input should be a valid boolean"),
    ([], "the request: Input should be an object"),
    (b'{"queries": ["a"', "the request: Invalid JSON"),
    (b"", "the request: Invalid JSON"),
    (b"\xff", "the request: Invalid JSON"),
    (b'{"queries": ["\\ud800"]}', "the request: Invalid JSON"),
    (b"[" * 100_000, "the request: Invalid JSON"),
]


@pytest.mark.parametrize(("request_", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_request_is_told_in_one_line(client, request_, message):
    body = request_ if isinstance(request_, bytes) else json.dumps(request_).encode()
    answer = client.post("/retrieve", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)
    assert "\n" not in answer.json()["error"]


def test_a_request_that_is_too_long_is_not_read_to_its_end(client):
    answer = client.post("/retrieve", content=b'{"queries": ["' + b"a" * (8 << 20) + b'"]}')
    assert answer.status_code == 413
    assert answer.json() == {"error": "the request is longer than 8388608 bytes; send fewer queries at once"}


def test_all_queries_of_a_step_are_answered_at_once_and_blank_ones_find_nothing(client):
    queries = ["canal", "", "door", " \n"] * 1000
    answer = client.post("/retrieve", json={"queries": queries, "topk": 1}).json()["result"]
    assert len(answer) == 4000
    canal, _, door, _ = answer[:4]
    assert answer == [canal, [], door, []] * 1000
    assert (canal[0]["id"], door[0]["id"]) == ("p1", "p4")
    assert client.post("/retrieve", json={"queries": ["", " "]}).json() == {"result": [[], []]}


def test_of_a_long_query_the_beginning_is_searched_for(client):
    long, far = "canal " * 600, " " * 5000 + "canal"
    answer = client.post("/retrieve", json={"queries": [long, far], "topk": 1}).json()["result"]
    assert [len(hits) for hits in answer] == [1, 0]


def test_an_answer_that_gets_too_long_is_not_made(client, monkeypatch):
    monkeypatch.setattr(retriever, "MAX_ANSWER_BYTES", 2000)
    answer = client.post("/retrieve", json={"queries": ["canal"] * 500})
    assert answer.status_code == 413
    assert answer.json() == {"error": "the answer is longer than 2000 bytes; send fewer queries at once"}


def test_other_methods_and_paths_are_refused_as_json(client):
    assert (client.get("/retrieve").status_code, client.get("/retrieve").json()) == (
        405,
        {"error": "Method Not Allowed"},
    )
    assert (client.get("/").status_code, client.get("/").json()) == (404, {"error": "Not Found"})


def test_a_corpus_that_was_changed_is_no_longer_served(client, corpus):
    with corpus.path.open("a") as file:
        file.write("\n")
    answer = client.post("/retrieve", json={"queries": ["canal"]})
    assert answer.status_code == 503
    assert "was changed after it was read" in answer.json()["error"]


# The command


@pytest.fixture
def command(tmp_path):
    """Start `latentmem retriever serve`; the process, and the address once it answers."""
    started = []

    def command(*words):
        arguments = [sys.executable, "-m", "latentmem.cli", "retriever", "serve", *map(str, words), "--port", "0"]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        line = process.stdout.readline()
        return process, line, line.rpartition(" at ")[2].strip()

    yield command
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_cleanly(command, passages, signal_):
    process, line, url = command(passages)
    assert line.startswith("retriever: 7 passages by bm25 at http://127.0.0.1:")
    client = RetrieverClient(url, topk=1, timeout_seconds=60.0, retries=0)
    client.probe()
    assert client.retrieve("who plays dub techno?") == (
        Passage("Moss Lantern", "Moss Lantern is a duo that plays dub techno in Wend."),
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, b"{}", timeout=60)
    assert json.loads(refused.value.read())["error"] == "queries: Field required"
    refused.value.close()
    process.send_signal(signal_)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert (passages.parent / "passages.jsonl.index" / "bm25" / "sealed.json").is_file()


def test_while_it_indexes_nobody_is_answered(passages, tmp_path, monkeypatch, fake_embed):
    refused = []

    class Embedding:
        def __init__(self, name, batch_size):
            pass

        def __call__(self, texts):
            with socket.socket() as caller:
                caller.settimeout(20)
                refused.append(caller.connect_ex(("127.0.0.1", port)))
            raise KeyboardInterrupt

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(retriever, "Embedder", Embedding)
    with pytest.raises(KeyboardInterrupt):
        serve(passages, method="dense", port=port, announce=print)
    assert refused
    assert all(code != 0 for code in refused)


@pytest.fixture
def fails(capsys):
    def fails(*words):
        capsys.readouterr()
        assert cli.main(["retriever", "serve", *map(str, words)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latentmem: ")]
        return line.removeprefix("latentmem: ")

    return fails


def test_mistakes_are_one_line(fails, passages, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert fails(passages, "--port", port) == (
            f"port {port} of 127.0.0.1 is taken by another program; give another with --port"
        )
    assert not (tmp_path / "passages.jsonl.index").exists()  # told before hours of indexing
    assert fails(passages, "--port", 0, "--host", "no-such-host.invalid").startswith(
        "cannot listen on no-such-host.invalid, port 0 ("
    )
    assert fails(tmp_path / "pasages.jsonl", "--port", 0).endswith("no such file; did you mean 'passages.jsonl'?")
    assert "the index cannot be kept there" in fails(passages, "--port", 0, "--index", passages)
    with passages.open("a") as file:
        file.write("{}\n")
    line = fails(passages, "--port", 0)
    assert "1 of 8 rows are no passages (line 8: field 'id' is missing" in line
    assert line.endswith("or leave them out with --on-bad-row skip")


@pytest.mark.parametrize("port", ["-1", "65536", "x", "80.5"])
def test_a_port_that_is_none_is_refused(port, passages, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["retriever", "serve", str(passages), "--port", port])
    assert end.value.code == 2
    assert "is not a port from 0 to 65535" in capsys.readouterr().err


def test_skipped_rows_are_told(command, passages):
    with passages.open("a") as file:
        file.write("{}\n")
    process, line, _ = command(passages, "--on-bad-row", "skip")
    assert line.startswith("retriever: 7 passages")
    process.terminate()
    assert "1 rows are left out (line 8: field 'id' is missing" in process.communicate(timeout=60)[1]


# Clients that owe something


@pytest.fixture
def patient(tmp_path, passages):
    """Start the server with little patience and few descriptors; the process and its address."""
    started = []

    def patient(seconds, descriptors=256, *words):
        code = (
            "import resource, sys; from latentmem import listening; from latentmem.cli import main; "
            f"listening.MAX_WAIT_SECONDS = {seconds}; "
            f"resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors})); sys.exit(main())"
        )
        arguments = [sys.executable, "-c", code, "retriever", "serve", str(passages), "--port", "0", *words]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().rpartition(" at ")[2].strip()

    yield patient
    for process in started:
        process.kill()
        process.communicate()


def asks(url, queries=("canal",)):
    body = json.dumps({"queries": list(queries), "topk": 1}).encode()
    with urllib.request.urlopen(url, body, timeout=100) as answer:
        return len(json.load(answer)["result"])


HALF = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
OWED = {"nothing": b"", "half a head": b"POST /retr", "half a body": HALF}


def callers(url, num, *said):
    place = urlsplit(url)
    made = [socket.create_connection((place.hostname, place.port), timeout=100) for _ in range(num)]
    for number, caller in enumerate(made):
        caller.sendall(said[number % len(said)])
    return made


def ended(caller):
    """Wait until the server ends a connection."""
    with caller:
        try:
            while caller.recv(1000):
                pass
        except ConnectionResetError:
            pass
    return True


@pytest.mark.timeout(300)
@pytest.mark.parametrize("owed", OWED)
def test_a_client_that_owes_a_request_is_waited_for_so_long_and_no_longer(patient, owed):
    process, url = patient(0.5)
    (caller,) = callers(url, 1, OWED[owed])
    assert ended(caller)
    assert asks(url) == 1
    process.terminate()
    assert "Traceback" not in process.communicate(timeout=100)[1]


@pytest.mark.timeout(300)
def test_a_client_that_does_not_take_its_answer_is_no_burden_for_ever(patient, passages):
    with passages.open("a") as file:
        file.write(json.dumps({"id": 1, "contents": "flagstone " * 15_000}) + "\n")
    _, url = patient(0.5)
    body = json.dumps({"queries": ["flagstone"] * 200, "topk": 1}).encode()
    head = f"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    place = urlsplit(url)

    def is_held():  # by a process: a connection that the kernel alone still winds up has no inode
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        found = [line.split() for line in lines]
        ends = f":{place.port:04X}", f":{caller.getsockname()[1]:04X}"
        return any(row[1].endswith(ends[0]) and row[2].endswith(ends[1]) and row[9] != "0" for row in found)

    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.connect((place.hostname, place.port))
    caller.sendall(head + body)
    while not is_held():  # it is not accepted yet
        time.sleep(0.01)
    while is_held():
        time.sleep(0.1)
    assert ended(caller)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_running_out_of_descriptors_is_survived_and_told_once(patient):
    process, url = patient(1000.0, 64)
    held = callers(url, 200, *OWED.values())
    assert asks(url) == 1  # those that waited longest were ended for it
    for caller in held:
        caller.close()
    assert asks(url, ["canal"] * 600) == 600
    process.terminate()
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 0
    assert err.count("no more connections for a moment (Too many open files)") == 1
    assert "Traceback" not in err


@pytest.mark.timeout(300)
def test_an_end_does_not_wait_for_clients_that_owe_something(patient):
    process, url = patient(1000.0)
    held = callers(url, 6, *OWED.values())
    assert asks(url) == 1
    process.terminate()
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "ERROR" not in err
    assert all(ended(caller) for caller in held)


def test_an_address_that_others_reach_is_warned_of(command, passages):
    for host, warned in (("0.0.0.0", True), ("::", True), ("127.0.0.1", False), ("localhost", False)):
        process, _, _ = command(passages, "--host", host)
        process.terminate()
        err = process.communicate(timeout=100)[1]
        if "cannot listen" not in err:  # a machine may have no IPv6
            assert (f"WARNING {host} is open to anyone who can reach this machine" in err) == warned


def test_an_index_that_is_changed_in_place_is_no_longer_searched(client, tmp_path):
    with next((tmp_path / "index" / "bm25").glob("data.*.npy")).open("r+b") as file:
        file.truncate(10)
    answer = client.post("/retrieve", json={"queries": ["canal"]})
    assert answer.status_code == 503
    assert "was changed while it was read; start the retriever again" in answer.json()["error"]


def test_a_corpus_without_a_word_is_one_line(fails, passages):
    passages.write_text('{"id": 1, "contents": "?!"}\n{"id": 2, "contents": "..."}\n')
    assert "no passage holds a word, so BM25 can find none" in fails(passages, "--port", 0)


# From the configuration to the bank

HALVED = b'{"result": [[{"document": {"contents": "T\\na\\ud800b"}}]]}'
CONFIG = """
run: {folder}/run
max_turns: 2
model: {{name: {model}, device: cpu, dtype: float32}}
data:
  kind: qa
  schema: popqa
  train: {{path: {folder}/train.jsonl}}
  test: {{path: {folder}/test.jsonl}}
  search: {{url: '{url}', retries: 0}}
sampling: {{temperature: 1.0, max_response_tokens: 4}}
"""


@pytest.fixture
def configure(tmp_path, tiny_model_dir):
    def configure(url):
        for name, numbers in (("train", range(3)), ("test", range(3, 5))):
            rows = [
                {"id": i, "question": f"Who is {i}?", "possible_answers": '["Ada"]', "o_aliases": "[]"} for i in numbers
            ]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path, model=tiny_model_dir, url=url))
        return str(tmp_path / "c.yaml")

    return configure


@pytest.mark.usefixtures("no_embedding_model")
def test_collecting_plays_with_the_server(command, passages, configure, tmp_path):
    _, _, url = command(passages)
    assert cli.main(["collect", configure(url)]) == 0
    with ExperienceBank(tmp_path / "run" / "bank.sqlite") as bank:
        for trajectory in bank:
            assert len(trajectory.steps) == 2  # a random model neither searches nor answers
            assert trajectory.steps[0].observation.startswith("There was no search and no answer.")
            assert trajectory.error is None


@pytest.mark.usefixtures("no_embedding_model")
def test_a_dead_server_is_told_before_anything_is_made(configure, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert cli.main(["collect", configure(url)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"latentmem: {url}/retrieve: the search server gives no passages (ConnectionRefusedError")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_embedding_model")
def test_a_server_that_dies_meanwhile_is_counted_and_not_taken_for_nothing_found(
    command, passages, configure, tmp_path, monkeypatch, capsys
):
    process, _, url = command(passages)
    config = configure(url)

    step = SearchEnvironment.step

    def searching(self, action):
        if process.poll() is None:
            process.kill()
            process.wait()
        return step(self, "<search>canal</search>")

    monkeypatch.setattr(SearchEnvironment, "step", searching)
    assert cli.main(["collect", config]) == 1
    assert "collect: 0 of 3 episodes succeeded, 3 ended in an error, on 3 train tasks" in capsys.readouterr().out
    with ExperienceBank(tmp_path / "run" / "bank.sqlite") as bank:
        for trajectory in bank:
            assert trajectory.error.startswith(f"environment: RetrievalFailed: {url}: no passages after 1 attempts")
            assert len(trajectory.steps) == 1


@pytest.mark.usefixtures("no_embedding_model")
def test_half_a_surrogate_pair_in_a_passage_or_a_question_is_no_end_of_a_run(configure, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retriever_client, "ask", lambda *_: (200, HALVED))
    step = SearchEnvironment.step
    monkeypatch.setattr(SearchEnvironment, "step", lambda self, action: step(self, "<search>canal</search>"))
    config = configure("http://127.0.0.1:1")
    assert cli.main(["collect", config]) == 0
    with ExperienceBank(tmp_path / "run" / "bank.sqlite") as bank:
        assert {t.steps[0].observation for t in bank} == {"<information>\n[1] T\na\ufffdb\n</information>"}
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"id": 0, "question": "Who?", "possible_answers": r'["\ud800"]', "o_aliases": "[]"})
    )
    capsys.readouterr()
    assert cli.main(["collect", config, f"run={tmp_path / 'other'}"]) == 2
    assert "train.jsonl:1: field 'possible_answers': not valid UTF-8" in capsys.readouterr().err


def test_max_turns_has_to_allow_a_search_and_an_answer(configure, capsys):
    assert cli.main(["collect", configure("http://127.0.0.1:1"), "max_turns=1"]) == 2
    assert "max_turns is 1; data.search needs a turn to search and one to answer" in capsys.readouterr().err
    assert cli.main(["collect", configure("127.0.0.1:8000")]) == 2
    assert "data.search.url is '127.0.0.1:8000'; expected a web address" in capsys.readouterr().err


def test_the_passages_at_hand_answer_most_of_popqa(shared_dir, tmp_path):
    """A team that reads perfectly: it searches for the question and answers with what is accepted, if it was shown."""
    data = shared_dir / "data"
    questions = QADomain(
        schema="popqa",
        train=Rows(path=str(data / "popqa" / "train.jsonl")),
        test=Rows(path=str(data / "popqa" / "test.jsonl")),
    )
    with closing(Corpus(data / "wiki-corpus" / "corpus.jsonl")) as corpus:
        search = open_search(corpus, "bm25", tmp_path / "index", "", None)

        class Shelf:
            def retrieve(self, query):
                passages = [corpus[position].contents.partition("\n") for position, _ in search([query], 3)[0]]
                return tuple(Passage(title, text) for title, _, text in passages)

        rewards = []
        for task in questions.tasks("test"):
            world = SearchEnvironment(questions.start(task), Shelf(), "", 2000)
            shown = f" {normalise(world.step(f'<search>{task.text}</search>').observation)} "
            answer = next((a for a in task.data["answers"] if f" {normalise(a)} " in shown), "unknown")
            rewards.append(world.step(f"I read it. <answer>{answer}</answer>").reward)
    assert len(rewards) == 100
    assert 60 <= sum(rewards) <= 80
