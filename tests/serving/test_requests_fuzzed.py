"""Damaged requests: each is answered, or refused by a line that says why, and none is a fault of the server's."""

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from fuzzing import DAMAGES, Sample, damaged
from latentmem.serving.face.routes import openai_routes
from scripted_desk import ScriptedDesk

CALL = {"id": "k1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Wend"}'}}
TOOL = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}, "strict": True}
OWN = {"session": "s", "role": "r", "task": "t", "domain": "d", "memory": "none", "tokens": True}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "You count.", "name": "counter"},
        {"role": "user", "content": [{"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "k1", "content": "rain"},
    ],
    "tools": [{"type": "function", "function": TOOL}],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "n": 2, "stop": ["x", "y"], "seed": 7, "temperature": 0.5, "top_p": 0.9, "max_tokens": 200, "logprobs": True,
    "stream_options": {"include_usage": True}, "metadata": {"session": "m"}, "latentmem": OWN,
    "logit_bias": {}, "response_format": {"type": "text"}, "parallel_tool_calls": False,
}  # fmt: skip
RESPONSES: dict[str, Any] = {
    "model": "tiny",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "1?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Look."}]},
        {"type": "function_call", "call_id": "k1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "k1", "output": [{"type": "input_text", "text": "rain"}]},
    ],
    "tools": [{"type": "function", **TOOL}],
    "tool_choice": {"type": "function", "name": "weather"},
    "instructions": "You count.", "previous_response_id": "resp_1", "temperature": 0.5, "top_p": 0.9,
    "max_output_tokens": 200, "include": ["message.output_text.logprobs"], "metadata": {"task": "m"}, "store": False,
    "latentmem": OWN, "text": {"format": {"type": "text"}}, "reasoning": {"effort": None}, "truncation": "disabled",
}  # fmt: skip
BODIES = {"/v1/chat/completions": CHAT, "/v1/responses": RESPONSES | {"previous_response_id": None}}


@pytest.fixture(scope="module")
def app() -> Any:
    desk = ScriptedDesk(lambda ask, choice: 'Grün <tool_call>{"name": "weather"}</tool_call>', step=9)
    with ThreadPoolExecutor(4) as pool:
        yield Starlette(routes=openai_routes(desk, pool))


def post(app: Any, path: str, body: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Send a request to the app, without a server between; an exception of the app passes through."""

    async def run() -> tuple[int, bytes]:
        sent = [{"type": "http.request", "body": body, "more_body": False}]
        got: list[dict[str, Any]] = []
        forever = asyncio.Event()

        async def receive() -> Any:
            if sent:
                return sent.pop()
            await forever.wait()
            return None

        async def send(message: Any) -> None:
            got.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(b"content-type", b"application/json"), *headers],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await app(scope, receive, send)
        text = b"".join(message.get("body", b"") for message in got[1:])
        return got[0]["status"], text

    return asyncio.run(run())


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [b"x-latentmem-session-id", b"x-latentmem-role", b"x-latentmem-task", b"idempotency-key",
             b"x-stainless-retry-count"]
        ),
        st.binary(max_size=12),
    ),
    max_size=2,
)  # fmt: skip


@settings(
    max_examples=int(os.environ.get("FUZZ_INPUTS", "150")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(damages=DAMAGES, streams=st.booleans(), headers=HEADERS)
@pytest.mark.parametrize("path", BODIES)
def test_a_damaged_request_is_answered_or_refused(
    app: Any, path: str, damages: Any, streams: bool, headers: Any
) -> None:
    body = damaged(Sample(BODIES[path] | {"stream": streams}), damages)
    status, text = post(app, path, body, headers)
    assert status in (200, 400, 403, 404), text
    if status == 200:
        assert b'"error": {' not in text.replace(b'"error":{', b'"error": {')
        return
    error = json.loads(text)["error"]
    assert error["message"]
    assert error["message"].isprintable(), error
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("path", BODIES)
def test_the_undamaged_request_is_answered(app: Any, path: str) -> None:
    for streams in (False, True):
        status, text = post(app, path, json.dumps(BODIES[path] | {"stream": streams}).encode(), [])
        assert status == 200, text
        assert b"weather" in text
