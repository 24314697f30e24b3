"""Any server of OpenAI's chat completions speaks for the agents: chats go out as messages, text comes back.

Such a server takes no latents and tells no token ids, so nothing is trained on what it says, and a memory is text. To
those who listen, the bytes of the text (UTF-8) stand in for token ids; `said` makes text of them. Calls of tools are
written into the text in the form that Hermes and Qwen use, the one form that a program's endpoint reads.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from latentmem.config import OpenAIEngineSection, Sampling, default
from latentmem.engines.answers import BadAnswer, refusal
from latentmem.engines.events import DONE, Events
from latentmem.engines.servers import Call, Servers, ask_all
from latentmem.errors import EngineError, ModelError
from latentmem.models.agent import Prompt, Sampled
from latentmem.models.ending import Finish
from latentmem.outside import well_formed
from latentmem.parsing import parse_json

COMPLETIONS = "/chat/completions"
TOOL_CALL = "<tool_call>\n{call}\n</tool_call>"
_FINISHES: Mapping[str, Finish] = {"length": "length", "stop": "stop", "tool_calls": "stop", "content_filter": "stop"}


class UpstreamEngine:
    """An `AgentModel` that asks a server of OpenAI's form; many threads may ask it at the same time."""

    concurrent = True
    tool_form = "hermes"
    """The form in which calls of tools stand in responses; see `serving.tools`."""

    def __init__(
        self,
        name: str,
        url: str,
        key: str | None = None,
        limit_key: str = default(OpenAIEngineSection, "limit_key"),
        parallel: int = default(OpenAIEngineSection, "parallel"),
        timeout_seconds: float = default(OpenAIEngineSection, "timeout_seconds"),
        retries: int = default(OpenAIEngineSection, "retries"),
        backoff_seconds: float = 0.5,
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            name: the model's name there.
            url: the server's address, with the path that `/chat/completions` follows, such as `/v1`.
            key: sent as a bearer token; None: none is sent. It is never logged or shown.
            limit_key: the request's key for the longest response.
            parallel: most requests in flight, whoever asks.
            timeout_seconds: wall-clock limit of one attempt.
            retries: attempts after the first.
            backoff_seconds: pause before the first retry; each further pause is twice as long.
        """
        self.name = name
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._servers = Servers([url], timeout_seconds, retries, backoff_seconds, headers)
        self._limit_key = limit_key
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="upstream")

    def said(self, token_ids: Sequence[int]) -> str:
        """Return the text of what a listener was told."""
        return bytes(token_ids).decode("utf-8", "replace")

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        """Get one response per prompt, in the order of the prompts.

        Raises:
            ModelError: a prompt has latents or wants an adapter.
            EngineError: the server refuses a prompt, or gives no usable answer to it.
        """
        for prompt in prompts:
            if prompt.latents is not None or prompt.adapter is not None:
                raise ModelError(
                    f"the prompt of {prompt.role!r} ({prompt.group}) has latents or an adapter; a server of "
                    "model.engine openai takes neither: take the memory text"
                )
        return ask_all(self._pool, lambda number, call: self._ask(prompts[number], sampling, call), len(prompts))

    def _ask(self, prompt: Prompt, sampling: Sampling, call: Call) -> Sampled:
        is_streamed = prompt.on_tokens is not None
        asked: dict[str, Any] = {
            "model": self.name,
            "messages": _messages(prompt),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._limit_key: prompt.most_tokens(sampling),
            "seed": prompt.seed % 2**31,
        }
        if prompt.conversation is not None and prompt.conversation.tools:
            asked["tools"] = list(prompt.conversation.tools)
            if name := prompt.conversation.must_call:
                one = {"type": "function", "function": {"name": name}}
                asked["tool_choice"] = "required" if name == "*" else one
        if sampling.top_k:
            asked["top_k"] = sampling.top_k
        if any(prompt.stop):
            asked["stop"] = [stop for stop in prompt.stop if stop]
        if is_streamed:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        request = json.dumps(asked, ensure_ascii=False).encode("utf-8", "replace")
        if not is_streamed:
            said = self._servers.insist(COMPLETIONS, request, 0, _read, call)
        else:
            heard = _Heard(prompt.on_tokens)
            said = self._servers.insist_stream(COMPLETIONS, request, 0, heard.again, call)
        return Sampled(
            text=said.text.strip(),
            token_ids=(),
            logps=(),
            finish=said.finish,
            num_prompt_tokens=said.num_prompt_tokens,
            weights=said.model,
            num_kept=min(said.num_kept, said.num_prompt_tokens),
            num_sampled=said.num_sampled,
        )


@dataclass
class _Said:
    """What a server says, as far as it is known."""

    text: str = ""
    finish: Finish = "length"
    num_prompt_tokens: int = 0
    num_kept: int = 0
    """How many of these it had kept."""
    num_sampled: int = 0
    model: str = ""
    """The model's name and version, as the server tells them."""
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    """Names and arguments of the calls of tools, by their number."""

    def note(self, said: Mapping[str, Any]) -> None:
        """Take note of what an answer, or a piece of one, tells about the whole."""
        version = " ".join(str(said[key]) for key in ("model", "system_fingerprint") if said.get(key))[:200]
        self.model = max(self.model, version, key=len)  # not each piece of a stream tells all of it
        if isinstance(usage := said.get("usage"), dict):
            details = usage.get("prompt_tokens_details")
            self.num_prompt_tokens = _count(usage, "prompt_tokens", self.num_prompt_tokens)
            self.num_kept = _count(details, "cached_tokens", self.num_kept)
            self.num_sampled = _count(usage, "completion_tokens", self.num_sampled)

    def add_calls(self, calls: Any) -> None:
        """Add calls of tools, or pieces of them."""
        for place, piece in enumerate(calls or ()):
            function = piece.get("function") or {}
            known = self.calls.setdefault(piece.get("index", place), {"name": "", "arguments": ""})
            for key in known:
                known[key] += function.get(key) or ""

    def told_calls(self) -> str:
        """Return the calls as text."""
        told = []
        for _, call in sorted(self.calls.items()):
            try:
                arguments = parse_json(call["arguments"] or "{}")
            except ValueError:
                arguments = call["arguments"]
            written = json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)
            told.append(TOOL_CALL.format(call=written))
        return "".join(f"\n{text}" for text in told)


def _count(told: Any, key: str, before: int) -> int:
    """Return a count that a server tells; what is no count leaves what was known before."""
    count = told.get(key) if isinstance(told, dict) else None
    return count if type(count) is int and count >= 0 else before


def _messages(prompt: Prompt) -> list[Any]:
    if prompt.conversation is not None:
        return list(prompt.conversation.messages)
    roles = (("system", prompt.system), ("user", prompt.user))
    return [{"role": role, "content": text} for role, text in roles if text]


def _read(body: bytes) -> _Said:
    """Read a whole answer."""
    said, answer = _Said(), _parsed(body)
    try:
        (choice,) = answer["choices"]
        content, calls = choice["message"].get("content"), choice["message"].get("tool_calls")
        said.note(answer)
        said.add_calls(calls)
        said.finish = _FINISHES[choice["finish_reason"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadAnswer(f"the answer is no chat completion: {body[:80]!r}") from None
    if not isinstance(content, str | None):
        raise BadAnswer(f"the answer's content is no text: {body[:80]!r}")
    said.text = well_formed(content or "") + said.told_calls()
    return said


class _Heard:
    """What a listener has heard; an attempt that is made again tells it nothing twice."""

    def __init__(self, on_tokens: Callable[[Sequence[int]], bool] | None) -> None:
        self._on_tokens = on_tokens
        self.text = ""

    def again(self) -> "_Stream":
        """Return what reads one attempt."""
        return _Stream(self)

    def tell(self, text: str) -> bool:
        """Tell what the text so far adds, and return whether anybody waits for more."""
        if not text.startswith(self.text[: len(text)]):
            raise EngineError(
                "the server ended in mid-stream and then said something else; what was told already cannot be taken "
                "back: ask again"
            )
        new, self.text = text[len(self.text) :], max(self.text, text, key=len)
        return not new or self._on_tokens is None or self._on_tokens(list(new.encode("utf-8")))


class _Stream:
    """A streamed answer, as it comes."""

    def __init__(self, heard: _Heard) -> None:
        self._heard = heard
        self._said = _Said()
        self._events = Events()
        self._is_ended = False

    def take(self, block: bytes) -> bool:
        """Take the next bytes, and return whether no more are needed."""
        return any(self._take(data) for data in self._events.feed(block))

    def _take(self, data: bytes) -> bool:
        if data == DONE:
            return True
        said, piece = self._said, _parsed(data)
        if "error" in piece:
            raise BadAnswer(f"the server failed: {refusal(data)}")
        try:
            said.note(piece)
            for choice in piece.get("choices") or ():
                delta = choice.get("delta") or {}
                said.text += well_formed(delta.get("content") or "")
                said.add_calls(delta.get("tool_calls"))
                if choice.get("finish_reason") is not None:
                    said.finish, self._is_ended = _FINISHES[choice["finish_reason"]], True
                    said.text += said.told_calls()
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BadAnswer(f"the stream is of no chat completion: {data[:80]!r}") from None
        if not self._heard.tell(said.text):
            self._is_ended = True
            return True
        return False

    def result(self) -> _Said:
        """Return what was said."""
        if not self._is_ended:
            raise BadAnswer("the stream ends without saying why")
        return self._said


def _parsed(body: bytes) -> Any:
    try:
        said = parse_json(body)
    except ValueError:
        raise BadAnswer(f"the answer is not JSON: {body[:80]!r}") from None
    if not isinstance(said, dict):
        raise BadAnswer(f"the answer is no JSON object: {body[:80]!r}")
    return said
