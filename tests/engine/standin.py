"""A server that speaks as vLLM does, with a small model in a thread of this process, and that can misbehave.

It decodes token by token through transformers alone: none of our prefixes, caches or samplers has a part in it.
"""

import base64
import io
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

import torch

from standing_in import Requested, listening

MODEL_LOCK = threading.Lock()


class StandIn:
    """A server of one model. Its attributes may be changed while it runs."""

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.name = name
        self.max_model_len = 2048
        self.takes_embeds = True
        self.processed_logprobs = True
        self.sees_latents = True
        self.mixes_up_latents = False
        """Whether it answers with the rows of the first prompt it saw, as a broken cache does."""
        self.repeats_seeds = True
        self.misdeeds: list[str] = []
        """What is done to the next requests, in order: a status, `garbage`, `slow`, `nan`, `drop` or `die`; to streamed
        ones also `break` (after three tokens), `fail` (an error in the stream), `short` (it ends too early) and
        `wait` (for `gate` after two tokens)."""
        self.gate = threading.Event()
        """What `slow` waits for."""
        self.gone = threading.Event()
        """Set once a client has closed a stream."""
        self.requests: list[dict[str, Any]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._count = threading.Lock()
        self._http = self._listen(0)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def _listen(self, port: int) -> ThreadingHTTPServer:
        return listening(self.serve, self.show, port=port)

    def show(self, handler: Requested) -> None:
        row = {"id": self.name, "max_model_len": self.max_model_len}
        handler.answer(200, json.dumps({"object": "list", "data": [row]}).encode())

    def kill(self) -> None:
        """Stop listening; connections are refused from now on."""
        self._http.shutdown()
        self._http.server_close()

    def revive(self) -> None:
        """Listen again at the same port."""
        self._http = self._listen(int(self.url.rpartition(":")[2]))

    def serve(self, handler: Requested, asked: dict[str, Any]) -> None:
        with self._count:
            self.requests.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            misdeed = self.misdeeds.pop(0) if self.misdeeds else ""
        try:
            status, body = self._answer(asked, misdeed)
            if status == 200 and asked.get("stream") and body[:1] == b"{":
                self._stream(handler, json.loads(body), misdeed)
                return
        finally:
            with self._count:
                self._at_once -= 1
        if status:
            handler.answer(status, body)
        else:
            handler.connection.close()

    def _answer(self, asked: dict[str, Any], misdeed: str) -> tuple[int, bytes]:
        """The status and the body of an answer; a status of 0 hangs up."""
        if misdeed == "die":
            threading.Thread(target=self.kill).start()
        if misdeed in ("drop", "die"):
            return 0, b""
        if misdeed == "slow":
            self.gate.wait(30)
        if misdeed.isdigit():
            return int(misdeed), _error("no room")
        if misdeed == "garbage":
            return 200, b"<html>welcome</html>"
        if asked["model"] != self.name:
            return 404, _error(f"The model `{asked['model']}` does not exist.")
        if "prompt_embeds" in asked and not self.takes_embeds:
            return 400, _error("You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        return 200, json.dumps(self._complete(asked, misdeed)).encode()

    def _stream(self, handler: Any, whole: dict[str, Any], misdeed: str) -> None:
        """Send a completion piece by piece, two tokens in the second piece."""
        choice, usage = whole["choices"][0], whole["usage"]
        ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()

        def send(data: bytes) -> None:
            try:
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            except OSError:
                self.gone.set()
                raise

        cuts = [0, 1, *range(3, len(ids)), len(ids)]
        for begin, end in itertools.pairwise(cuts):
            if begin >= end:
                continue
            if (misdeed, begin) in (("break", 3), ("short", 3)):
                break
            if (misdeed, begin) == ("fail", 3):
                send(b'data: {"error": {"message": "the engine is dead"}}\n\n')
            if (misdeed, begin) == ("wait", 3):
                self.gate.wait(30)
            piece = {
                "index": 0,
                "text": "?",
                "logprobs": {"token_logprobs": logps[begin:end]},
                "finish_reason": choice["finish_reason"] if end == len(ids) else None,
                "token_ids": ids[begin:end],
            }
            said = {"model": whole["model"], "choices": [piece], "usage": usage}
            data = f"data: {json.dumps(said)}\n\n".encode()
            send(data[:7])
            send(data[7:])
        if misdeed == "break":
            handler.connection.close()
            return
        send(
            f"data: {json.dumps({'model': whole['model'], 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()
        )
        handler.wfile.write(b"0\r\n\r\n")

    @torch.no_grad()
    def _complete(self, asked: dict[str, Any], misdeed: str) -> dict[str, Any]:
        assert asked["logprobs"] == 0
        assert asked["return_token_ids"]
        assert not asked["add_special_tokens"]
        embed = self.model.get_input_embeddings()
        if "prompt_embeds" in asked:
            rows = torch.load(io.BytesIO(base64.b64decode(asked["prompt_embeds"])), weights_only=True)
            if not self.sees_latents:
                rows = torch.cat([rows[:-4], torch.zeros_like(rows[-4:])])
            if self.mixes_up_latents:
                rows = self._first = getattr(self, "_first", rows)
            rows = rows.to(embed.weight.dtype)
        else:
            rows = embed(torch.tensor(asked["prompt"]))
        num_rows, ids, logps = len(rows), [], []
        generator = torch.Generator()
        generator.manual_seed(asked["seed"]) if self.repeats_seeds else generator.seed()
        with MODEL_LOCK:
            cache, now = None, rows[None]
            while len(ids) < asked["max_tokens"]:
                output = self.model(inputs_embeds=now, past_key_values=cache, use_cache=True)
                cache, logits = output.past_key_values, output.logits[0, -1].float()
                tempered = (logits / (asked["temperature"] or 1.0)).log_softmax(0)
                if asked["temperature"] == 0:
                    token = int(logits.argmax())
                else:
                    token = int(torch.multinomial(tempered.exp(), 1, generator=generator))
                ids.append(token)
                logps.append(float((tempered if self.processed_logprobs else logits.log_softmax(0))[token]))
                if token in asked["stop_token_ids"]:
                    break
                now = embed(torch.tensor([[token]]))
        if misdeed == "nan":
            logps[0] = float("nan")
        finish = "stop" if ids[-1] in asked["stop_token_ids"] else "length"
        return {
            "object": "text_completion",
            "model": self.name,
            "choices": [
                {
                    "index": 0,
                    "text": "not looked at",
                    "logprobs": {"token_logprobs": logps, "tokens": ["?"] * len(ids)},
                    "finish_reason": finish,
                    "token_ids": ids,
                }
            ],
            "usage": {"prompt_tokens": num_rows, "completion_tokens": len(ids)},
        }


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


@contextmanager
def stand_in(model: Any, name: str) -> Iterator[StandIn]:
    """A running stand-in."""
    server = StandIn(model, name)
    try:
        yield server
    finally:
        server.gate.set()
        server.kill()
