"""A server that speaks OpenAI's chat completions and answers what it is told to, whole or streamed."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from standing_in import Requested, listening

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
        self._http = listening(self.serve, on_error=self.gone.set)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def serve(self, handler: Requested, asked: dict[str, Any]) -> None:
        self.requests.append(asked | {"path": handler.path})
        self.headers.append(dict(handler.headers))
        misdeed = self.misdeeds.pop(0) if self.misdeeds else ""
        if misdeed == "drop":
            handler.connection.close()
        elif misdeed.isdigit():
            handler.answer(int(misdeed), b'{"error": {"message": "come again later"}}')
        elif misdeed == "garbage":
            handler.answer(200, b"<html>welcome</html>")
        elif asked.get("stream"):
            self.stream(handler, asked, misdeed)
        else:
            choice = {"index": 0, "message": self.reply(asked), "finish_reason": self.finish}
            whole = {"model": "big-1", "system_fingerprint": "fp_7", "choices": [choice], "usage": USAGE}
            handler.answer(200, json.dumps(whole).encode())

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
