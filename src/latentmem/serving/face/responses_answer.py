"""What `/v1/responses` is answered: an object, or a stream of events that build it up."""

from collections.abc import Iterable
from typing import Any

from latentmem.serving.asks import Answer, Ask, Choice, ToolCall
from latentmem.serving.face.chat_answer import sse
from latentmem.serving.face.own_part import own_part, token_entries, usage_of
from latentmem.serving.reading import TextOf
from latentmem.serving.tools import Piece


def responses_object(answer: Answer, ask: Ask, text_of: TextOf) -> dict[str, Any]:
    """Return the answer as `response`."""
    items = Items(answer.id)
    choice = answer.choices[0]
    if choice.content or not choice.tool_calls:
        items.add(choice.content)
    for call in choice.tool_calls:
        items.add(call)
    return _response(answer.id, answer.created, ask, items.done(choice, ask, text_of), answer)


class Items:
    """The items that an answer consists of: the text, and each call of a tool."""

    def __init__(self, call: str) -> None:
        self._tail = call.rpartition("_")[2]
        self.all: list[dict[str, Any]] = []

    def add(self, piece: Piece) -> dict[str, Any]:
        """Return the item that holds a piece; text goes on in the last item if that is text."""
        if isinstance(piece, ToolCall):
            item: dict[str, Any] = {
                "id": f"fc_{self._tail}_{len(self.all)}",
                "type": "function_call",
                "status": "completed",
                "call_id": piece.id,
                "name": piece.name,
                "arguments": piece.arguments,
            }
            self.all.append(item)
            return item
        if not self.all or self.all[-1]["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {
                "id": f"msg_{self._tail}_{len(self.all)}",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [part],
            }
            self.all.append(item)
        self.all[-1]["content"][0]["text"] += piece
        return self.all[-1]

    def done(self, choice: Choice, ask: Ask, text_of: TextOf) -> list[dict[str, Any]]:
        """Return all items of the finished response; the first text bears the log-probabilities."""
        texts = [item for item in self.all if item["type"] == "message"]
        if texts and ask.logprobs:
            texts[0]["content"][0]["logprobs"] = token_entries(choice, text_of)
        if texts and choice.finish == "length":
            texts[-1]["status"] = "incomplete"
        return self.all


class ResponsesStream:
    """The events of one answer."""

    def __init__(self, ask: Ask, call: str, created: int, text_of: TextOf) -> None:
        self._ask = ask
        self._call = call
        self._created = created
        self._text_of = text_of
        self._items = Items(call)
        self._open: dict[str, Any] | None = None
        self._number = 0

    def begin(self) -> Iterable[bytes]:
        """Yield that the response is under way."""
        response = _response(self._call, self._created, self._ask, [], None)
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)

    def say(self, number: int, piece: Piece) -> Iterable[bytes]:
        """Yield what a piece adds."""
        del number
        if isinstance(piece, ToolCall):
            yield from self._end_text()
            item = self._items.add(piece)
            at = {"output_index": len(self._items.all) - 1}
            started = item | {"status": "in_progress", "arguments": ""}
            yield self._event("response.output_item.added", item=started, **at)
            delta = {"item_id": item["id"], **at}
            yield self._event("response.function_call_arguments.delta", delta=piece.arguments, **delta)
            yield self._event("response.function_call_arguments.done", arguments=piece.arguments, **delta)
            yield self._event("response.output_item.done", item=item, **at)
            return
        yield from self._begin_text()
        item = self._items.add(piece)
        if piece:
            yield self._event("response.output_text.delta", delta=piece, logprobs=[], **self._at(item))

    def end_choice(self, number: int, choice: Choice) -> Iterable[bytes]:
        """Yield the end of the text; a response without any has an empty one."""
        if not self._items.all:
            yield from self.say(number, "")
        self._items.done(choice, self._ask, self._text_of)
        yield from self._end_text()

    def end(self, answer: Answer) -> Iterable[bytes]:
        """Yield the whole response."""
        response = _response(answer.id, self._created, self._ask, self._items.all, answer)
        yield self._event(f"response.{response['status']}", response=response)

    def fail(self, error: dict[str, Any]) -> Iterable[bytes]:
        """Yield that the response failed."""
        response = _response(self._call, self._created, self._ask, self._items.all, None)
        code = "rate_limit_exceeded" if error["type"] == "rate_limit_error" else "server_error"
        response |= {"status": "failed", "error": {"code": code, "message": error["message"]}}
        yield self._event("response.failed", response=response)

    def _begin_text(self) -> Iterable[bytes]:
        if self._open is not None:
            return
        self._open = item = self._items.add("")
        started = item | {"status": "in_progress", "content": []}
        yield self._event("response.output_item.added", item=started, output_index=len(self._items.all) - 1)
        yield self._event("response.content_part.added", part=dict(item["content"][0]), **self._at(item))

    def _end_text(self) -> Iterable[bytes]:
        item, self._open = self._open, None
        if item is None:
            return
        (part,) = item["content"]
        at = self._at(item)
        logprobs = [{key: entry[key] for key in entry if key != "bytes"} for entry in part["logprobs"]]
        yield self._event("response.output_text.done", text=part["text"], logprobs=logprobs, **at)
        yield self._event("response.content_part.done", part=part, **at)
        yield self._event("response.output_item.done", item=item, output_index=at["output_index"])

    def _at(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._items.all) - 1, "content_index": 0}

    def _event(self, event: str, **more: Any) -> bytes:
        data = {"type": event, "sequence_number": self._number, **more}
        self._number += 1
        return sse(data, event)


def _response(call: str, created: int, ask: Ask, output: list[dict[str, Any]], answer: Answer | None) -> dict[str, Any]:
    """Return the object; without an answer it is under way."""
    finish = None if answer is None else answer.choices[0].finish
    response: dict[str, Any] = {
        "id": call,
        "object": "response",
        "created_at": created,
        "model": ask.model,
        "status": "in_progress" if answer is None else "incomplete" if finish == "length" else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
        "output": output,
        "text": {"format": {"type": "text"}},
        **ask.extra,
        "usage": None,
    }
    if answer is not None:
        usage = usage_of(answer)
        response["usage"] = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total,
            "latent_tokens": usage.latents,
        }
        response["latentmem"] = own_part(answer, ask)
    return response
