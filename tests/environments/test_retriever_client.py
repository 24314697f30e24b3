"""The client against a server that fails, hangs and talks nonsense, as told by a script."""

import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from latentmem.environments import retriever_client
from latentmem.environments.retriever_client import Counts, Passage, RetrievalFailed, RetrieverClient
from latentmem.environments.search import quoted
from latentmem.errors import RetrieverError

FOUND = {"result": [[{"document": {"id": "7", "contents": '"Moss Lantern"\nA band.\nOf two.'}, "score": 1.5}]]}
PASSAGE = Passage("Moss Lantern", "A band.\nOf two.")


class Script:
    """Answers each request by the next line of the script, and well from then on."""

    def __init__(self, lines):
        self.lines = list(lines)
        self.requests = []
        self.over = threading.Event()

    def next(self, path, body):
        self.requests.append((path, json.loads(body)))
        return self.lines.pop(0) if self.lines else FOUND


@pytest.fixture
def serve():
    """Start a server with a script; what it was asked is in `requests`, its address in `url`."""
    servers = []

    def serve(*lines):
        script = Script(lines)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                line = script.next(self.path, self.rfile.read(int(self.headers["Content-Length"])))
                if line == "hang":
                    script.over.wait(60)
                    return
                if line == "close":
                    return
                status, body = line if isinstance(line, tuple) else (200, line)
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                promised = len(body)
                if status == "drip":
                    status, promised = 200, 1000
                if status == "half":
                    status, body = 200, body[: len(body) // 2]
                self.send_response(status)
                self.send_header("Content-Length", str(promised))
                self.end_headers()
                self.wfile.write(body)
                while promised == 1000 and not script.over.wait(0.02):
                    self.wfile.write(b" ")

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):  # a client that gave up
                pass

        server = Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread, script))
        script.url = f"http://127.0.0.1:{server.server_port}"
        return script

    yield serve
    for server, thread, script in servers:
        script.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """Nobody waits; how long they would have."""
    taken = []
    monkeypatch.setattr(retriever_client.time, "sleep", taken.append)
    return taken


def client(url, **options):
    return RetrieverClient(url, **({"topk": 3, "timeout_seconds": 20.0, "retries": 3} | options))


def test_the_request_and_the_answer_are_those_of_the_protocol(serve):
    server = serve()
    assert client(server.url).retrieve("who plays") == (PASSAGE,)
    assert server.requests == [("/retrieve", {"queries": ["who plays"], "topk": 3, "return_scores": True})]


def test_a_path_of_the_address_is_kept(serve):
    server = serve()
    client(f"{server.url}/v1/find").retrieve("x")
    client(f"{server.url}/").retrieve("x")
    assert [path for path, _ in server.requests] == ["/v1/find", "/retrieve"]


def test_documents_with_title_and_text_are_read_too(serve):
    server = serve({"result": [[{"document": {"id": 1, "title": "T", "text": "x"}, "score": 1.0}]]})
    assert client(server.url).retrieve("q") == (Passage("T", "x"),)


LONG = "Stones were carried up the hill all year. " * 9

DOCUMENTS = [
    # a document of the server, and the passage
    ({"contents": LONG + "The mill stood in May."}, Passage("", LONG + "The mill stood in May.")),
    ({"contents": "The mill stood in May."}, Passage("", "The mill stood in May.")),
    ({"contents": "The mill stood in May.\n \n"}, Passage("", "The mill stood in May.")),
    ({"contents": "\nThe mill\nstood in May."}, Passage("", "The mill\nstood in May.")),
    ({"contents": "Mill\nIt stood in May."}, Passage("Mill", "It stood in May.")),
    ({"contents": f"{LONG}\nIt stood in May."}, Passage("", f"{LONG}\nIt stood in May.")),
    ({"contents": f'"{LONG}"\nIt stood in May.'}, Passage(LONG, "It stood in May.")),
    ({"title": None, "text": "It stood."}, Passage("", "It stood.")),
    ({"text": "It stood."}, Passage("", "It stood.")),
]


@pytest.mark.parametrize(("document", "passage"), DOCUMENTS)
def test_only_a_short_first_line_above_others_is_a_title(serve, document, passage):
    server = serve({"result": [[{"document": document}]]})
    assert client(server.url).retrieve("q") == (passage,)
    if passage.title == "":
        assert passage.text in quoted((passage,), 1000)  # nothing of it is cut as a title


def test_half_a_surrogate_pair_is_no_text_and_comes_in_as_the_sign_for_that(serve):
    server = serve(b'{"result": [[{"document": {"contents": "T\\udc00\\na\\ud800b \\ud83d\\ude00"}}]]}')
    assert client(server.url).retrieve("q") == (Passage("T\ufffd", "a\ufffdb \U0001f600"),)


def test_finding_nothing_is_an_answer(serve):
    server = serve({"result": [[]]})
    mine = client(server.url)
    assert mine.retrieve("q") == ()
    assert mine.counts == Counts(requests=1)


def test_no_more_passages_than_asked_for(serve):
    server = serve({"result": [FOUND["result"][0] * 5]})
    assert len(client(server.url, topk=2).retrieve("q")) == 2


NONSENSE = [
    (500, {"error": "oh"}),
    (503, b""),
    (429, b""),
    b"<html>not me</html>",
    ("half", FOUND),
    "close",
    {"results": []},
    {"result": []},
    {"result": [[], []]},
    {"result": [[{"id": "7", "contents": "no document around it"}]]},
    {"result": [[{"document": {"contents": 7}}]]},
    {"result": [[{"document": {"title": "only"}}]]},
    {"result": [[{"document": {"title": [], "text": "x"}}]]},
    [],
    b"\xff\xfe",
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", NONSENSE, ids=[repr(line)[:40] for line in NONSENSE])
def test_nonsense_is_asked_again_and_never_taken_for_nothing_found(serve, pauses, line):
    server = serve(line, line)
    mine = client(server.url)
    assert mine.retrieve("q") == (PASSAGE,)
    assert mine.counts == Counts(requests=3, retries=2)
    with pytest.raises(RetrievalFailed):
        client(serve(*[line] * 4).url).retrieve("q")


def test_pauses_double_and_the_last_cause_is_told(serve, pauses, caplog):
    server = serve((500, b""), (500, b""), (500, b""), (502, {"error": "behind me\nnobody"}))
    mine = client(server.url)
    with pytest.raises(RetrievalFailed) as failed:
        mine.retrieve("q")
    assert pauses == [0.5, 1.0, 2.0]
    assert str(failed.value) == (
        f'{server.url}/retrieve: no passages after 4 attempts: status 502: {{"error": "behind me\\nnobody"}}'
    )
    assert mine.counts == Counts(requests=4, retries=3, failures=1)
    assert "search failed (1 times so far)" in caplog.text
    assert mine.retrieve("q") == (PASSAGE,)  # a failure is not remembered


def test_a_refused_request_is_not_repeated(serve, pauses):
    server = serve((400, {"error": "topk: too many"}))
    with pytest.raises(RetrievalFailed, match=r"after 1 attempts: status 400: .*topk: too many"):
        client(server.url).retrieve("q")
    assert len(server.requests) == 1
    assert pauses == []


@pytest.mark.parametrize("line", ["hang", ("drip", b" ")])
def test_a_server_that_hangs_or_drips_is_left_after_the_timeout(serve, pauses, line):
    server = serve(line, line)
    mine = client(server.url, timeout_seconds=0.2, retries=1)
    with pytest.raises(RetrievalFailed, match=r"after 2 attempts: no whole answer within 0\.2 s"):
        mine.retrieve("q")
    assert mine.counts == Counts(requests=2, retries=1, failures=1)


def test_an_endless_answer_is_cut_off(serve, pauses, monkeypatch):
    monkeypatch.setattr(retriever_client, "MAX_ANSWER_BYTES", 10)
    with pytest.raises(RetrievalFailed, match="longer than 10 bytes"):
        client(serve().url, retries=0).retrieve("q")


def test_a_query_is_asked_once_and_remembered(serve):
    server = serve()
    mine = client(server.url)
    assert mine.retrieve("a") == mine.retrieve("a") == mine.retrieve("b")
    assert [body["queries"] for _, body in server.requests] == [["a"], ["b"]]
    assert mine.counts == Counts(requests=2, remembered=1)


def test_what_was_asked_longest_ago_is_forgotten_first(serve, monkeypatch):
    monkeypatch.setattr(retriever_client, "MAX_REMEMBERED", 2)
    server = serve()
    mine = client(server.url)
    for query in "abacab":  # c drives out b, not a; b drives out c
        mine.retrieve(query)
    assert [body["queries"][0] for _, body in server.requests] == ["a", "b", "c", "b"]


def test_counts_are_right_when_many_threads_ask(serve, pauses):
    server = serve(*[(500, b"")] * 5)
    mine = client(server.url, retries=6)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(mine.retrieve, [f"q{i}" for i in range(40)])) == {(PASSAGE,)}
    assert mine.counts == Counts(requests=45, retries=5)


def test_a_dead_server_is_one_line(caplog):
    with socket.socket() as taken:  # bound and not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RetrieverError) as dead:
            client(url).probe()
    line = str(dead.value)
    assert line.startswith(f"{url}/retrieve: the search server gives no passages (ConnectionRefusedError")
    assert line.endswith("start one with `latentmem retriever serve CORPUS`, or mend data.search")
    assert "\n" not in line


def test_the_probe_asks_once_and_does_not_accept_nonsense(serve):
    server = serve((500, b""), b"welcome to my page", FOUND)
    for _ in range(2):
        with pytest.raises(RetrieverError):
            client(server.url).probe()
    client(server.url).probe()
    assert len(server.requests) == 3


def test_an_unknown_host_is_a_failure_with_its_cause():
    with pytest.raises(RetrieverError, match="gaierror"):
        client("http://no-such-host.invalid:1").probe()


def test_proxies_of_the_environment_are_not_asked(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert client(serve().url).retrieve("q") == (PASSAGE,)


def test_failures_are_logged_at_1_10_100(serve, pauses, caplog):
    mine = client(serve(*[(500, b"")] * 12).url, retries=0)
    with caplog.at_level(logging.WARNING):
        for i in range(12):
            with pytest.raises(RetrievalFailed):
                mine.retrieve(f"q{i}")
    assert [line.split("(")[1].split(")")[0] for line in caplog.messages] == ["1 times so far", "10 times so far"]


# Whatever comes over the wire, an attempt ends when its time is over


@pytest.fixture
def talk():
    """Start a server that says a beginning and then, until the test is over, the same again and again."""
    over = threading.Event()
    threads = []
    sockets = []

    def talk(beginning, again):
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def answer():
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                with caller:
                    try:
                        caller.sendall(beginning)
                        while not over.wait(0.02):
                            caller.sendall(again)
                    except OSError:
                        pass

        threads.append(threading.Thread(target=answer))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield talk
    over.set()
    for listener in sockets:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
DRIPS = {
    "status line": (b"HTTP", b" "),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "size of a chunk": (CHUNKED, b"0"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
    "nothing": (b"", b""),
}


@pytest.mark.timeout(60)  # what drips for ever would be listened to for ever
@pytest.mark.parametrize("drip", DRIPS)
def test_no_drip_is_listened_to_for_longer_than_the_timeout(talk, drip):
    mine = client(talk(*DRIPS[drip]), timeout_seconds=0.3, retries=0)
    with pytest.raises(RetrievalFailed, match=r"after 1 attempts: no whole answer within 0\.3 s"):
        mine.retrieve("q")


@pytest.mark.timeout(60)
def test_a_handshake_that_drips_is_no_exception(talk):
    mine = client(talk(b"", b"\x16").replace("http:", "https:"), timeout_seconds=0.3, retries=0)
    with pytest.raises(RetrievalFailed, match="after 1 attempts: "):
        mine.retrieve("q")


def test_what_a_server_says_is_told_in_one_short_line_that_no_terminal_obeys(serve, talk, pauses):
    url = serve((404, b"\x1b[2Jgone\n" + b"x" * 5000)).url
    with pytest.raises(RetrievalFailed) as failed:
        client(url, retries=0).retrieve("q")
    assert r"status 404: \x1b[2Jgone xxx" in str(failed.value)
    with pytest.raises(RetrievalFailed) as garbled:
        client(talk(b"\x00\x1b" * 500 + b"\r\n\r\n", b""), retries=0).retrieve("q")
    for said in (str(failed.value), str(garbled.value)):
        assert said.isprintable()
        assert len(said) < 1000
