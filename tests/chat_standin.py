"""A server that speaks OpenAI's chat completions and answers what it is told to, whole or streamed."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}


class ChatStandIn:
    """A server of one model. Its attributes may be changed while it runs."""

    def __init__(self, reply: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.reply = reply
        """The message that answers a request."""
        self.finish = "stop"
        self.misdeeds: list[str] = []
        """What is done to the next requests, in order: a status, `garbage`, `drop`; for streams `break`, `fail`."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.gone = threading.Event()
        self.gate = threading.Event()
        """Streams wait for it after their second piece."""
        self.gate.set()
        standin = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                standin.requests.append(asked | {"path": self.path})
                standin.headers.append(dict(self.headers))
                misdeed = standin.misdeeds.pop(0) if standin.misdeeds else ""
                if misdeed == "drop":
                    self.connection.close()
                elif misdeed.isdigit():
                    self.whole(int(misdeed), b'{"error": {"message": "come again later"}}')
                elif misdeed == "garbage":
                    self.whole(200, b"<html>welcome</html>")
                elif asked.get("stream"):
                    standin.stream(self, asked, misdeed)
                else:
                    choice = {"index": 0, "message": standin.reply(asked), "finish_reason": standin.finish}
                    usage = USAGE
                    self.whole(
                        200,
                        json.dumps(
                            {"model": "big-1", "system_fingerprint": "fp_7", "choices": [choice], "usage": usage}
                        ).encode(),
                    )

            def whole(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                standin.gone.set()

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stream(self, handler: Any, asked: dict[str, Any], misdeed: str) -> None:
        message = self.reply(asked)
        deltas: list[dict[str, Any]] = [{"role": "assistant"}, *({"content": c} for c in message.get("content") or "")]
        for place, call in enumerate(message.get("tool_calls", ())):
            function = call["function"]
            deltas.append({"tool_calls": [{"index": place, "id": call["id"], "function": {"name": function["name"]}}]})
            deltas += [{"tool_calls": [{"index": place, "function": {"arguments": a}}]} for a in function["arguments"]]
        handler.send_response(200)
        handler.end_headers()

        def send(said: dict[str, Any]) -> None:
            handler.wfile.write(f"data: {json.dumps(said)}\n\n".encode())

        for number, delta in enumerate(deltas):
            if (misdeed, number) == ("break", 3):
                return
            if (misdeed, number) == ("fail", 3):
                send({"error": {"message": "the engine is dead"}})
            if number == 2:
                self.gate.wait(30)
            send(
                {
                    "model": "big-1",
                    "system_fingerprint": "fp_7",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
                }
            )
        send({"model": "big-1", "choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]})
        send({"model": "big-1", "choices": [], "usage": USAGE})
        handler.wfile.write(b"data: [DONE]\n\n")

    def kill(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def chat_stand_in(reply: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[ChatStandIn]:
    """A running stand-in."""
    server = ChatStandIn(reply)
    try:
        yield server
    finally:
        server.gate.set()
        server.kill()
