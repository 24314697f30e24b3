"""What `/v1/chat/completions` is answered: an object, or a stream of chunks that add up to it."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from latentmem.serving.asks import Answer, Ask, Choice, ToolCall
from latentmem.serving.face.own_part import own_part, token_entries, usage_of
from latentmem.serving.reading import TextOf
from latentmem.serving.tools import Piece


def chat_object(answer: Answer, ask: Ask, text_of: TextOf) -> dict[str, Any]:
    """Return the answer as `chat.completion`."""
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": answer.created,
        "model": answer.model,
        "choices": [
            {
                "index": number,
                "message": {
                    "role": "assistant",
                    "content": choice.content if choice.content or not choice.tool_calls else None,
                    "refusal": None,
                    **({"tool_calls": [_call(call) for call in choice.tool_calls]} if choice.tool_calls else {}),
                },
                "finish_reason": choice.finish,
                "logprobs": _logprobs(choice, ask, text_of),
            }
            for number, choice in enumerate(answer.choices)
        ],
        "usage": _usage(answer),
        "latentmem": own_part(answer, ask),
        **ask.extra,
    }


class ChatStream:
    """The chunks of one answer."""

    def __init__(self, ask: Ask, call: str, created: int, text_of: TextOf) -> None:
        self._ask = ask
        self._head = {"id": call, "object": "chat.completion.chunk", "created": created, "model": ask.model}
        self._text_of = text_of
        self._num_calls: dict[int, int] = {}

    def begin(self) -> Iterable[bytes]:
        """Yield the role of each choice."""
        for number in range(self._ask.n):
            yield self._chunk(number, {"role": "assistant", "content": "", "refusal": None})

    def say(self, number: int, piece: Piece) -> Iterable[bytes]:
        """Yield what a piece adds; of a call first its name, then its arguments."""
        if not isinstance(piece, ToolCall):
            yield self._chunk(number, {"content": piece})
            return
        index = self._num_calls.get(number, 0)
        self._num_calls[number] = index + 1
        call = {"index": index, **_call(piece)}
        yield self._chunk(number, {"tool_calls": [call | {"function": {"name": piece.name, "arguments": ""}}]})
        yield self._chunk(number, {"tool_calls": [{"index": index, "function": {"arguments": piece.arguments}}]})

    def end_choice(self, number: int, choice: Choice) -> Iterable[bytes]:
        """Yield nothing: that a choice is whole is told when all are kept."""
        del number, choice
        return ()

    def end(self, answer: Answer) -> Iterable[bytes]:
        """Yield how each choice ended, the usage if it was asked for, and the end."""
        for number, choice in enumerate(answer.choices):
            logprobs = _logprobs(choice, self._ask, self._text_of)
            if logprobs is not None:
                yield self._chunk(number, {}, logprobs=logprobs)
        for number, choice in enumerate(answer.choices):
            last = number == len(answer.choices) - 1
            own = {"latentmem": own_part(answer, self._ask)} if last else {}
            yield self._chunk(number, {}, finish=choice.finish, **own)
        if self._ask.with_usage:
            yield sse({**self._head, "choices": [], "usage": _usage(answer)})
        yield b"data: [DONE]\n\n"

    def fail(self, error: dict[str, Any]) -> Iterable[bytes]:
        """Yield the error that ends the stream."""
        yield sse({"error": error})

    def _chunk(
        self, number: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None, **more: Any
    ) -> bytes:
        choice = {"index": number, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        usage = {"usage": None} if self._ask.with_usage else {}
        return sse({**self._head, "choices": [choice], **usage, **more})


def sse(data: dict[str, Any], event: str | None = None) -> bytes:
    """Return one event of a stream."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(choice: Choice, ask: Ask, text_of: TextOf) -> dict[str, Any] | None:
    entries: Sequence[dict[str, Any]] = token_entries(choice, text_of)
    return {"content": entries, "refusal": None} if ask.logprobs else None


def _usage(answer: Answer) -> dict[str, Any]:
    usage = usage_of(answer)
    return {
        "prompt_tokens": usage.prompt,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens": usage.completion,
        "total_tokens": usage.total,
        "latent_tokens": usage.latents,
    }
