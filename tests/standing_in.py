"""The HTTP part of servers that stand in for others: JSON in, and what a stand-in makes of it out."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Requested(BaseHTTPRequestHandler):
    """One request."""

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes) -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def listening(
    post: Callable[[Requested, Any], None],
    get: Callable[[Requested], None] | None = None,
    *,
    port: int = 0,
    on_error: Callable[[], object] = lambda: None,
) -> ThreadingHTTPServer:
    """Begin to answer in a thread; `post` gets what was sent, and `on_error` is called when answering failed."""

    class Handler(Requested):
        def do_GET(self) -> None:
            assert get is not None
            get(self)

        def do_POST(self) -> None:
            post(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            on_error()  # the client may have gone

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
