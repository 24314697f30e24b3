"""The body of `/v1/chat/completions`, and what it asks for."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from latentmem.serving.asks import Ask, Refused
from latentmem.serving.face.fields import (
    WHOLE,
    Count,
    Empty,
    Fields,
    Label,
    Metadata,
    Own,
    PlainText,
    Seed,
    Stop,
    Temperature,
    ToolName,
    TopP,
    Zero,
    of_64_bits,
    read_fields,
)
from latentmem.trajectory import Conversation

MAX_CHOICES = 8


class TextPart(Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class RefusalPart(Fields):
    """A part in which a model declined; to us it is text."""

    type: Literal["refusal"]
    refusal: str


Texts = str | list[TextPart]


class SystemMessage(Fields):
    """What the agent is told about its part."""

    role: Literal["system", "developer"]
    content: Texts
    name: str | None = None


class UserMessage(Fields):
    """What the agent is asked or told by others."""

    role: Literal["user"]
    content: Texts
    name: str | None = None


class CalledFunction(Fields):
    """A function and what it was called with."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str


class CalledTool(Fields):
    """A tool that was called."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Fields):
    """What an agent said."""

    role: Literal["assistant"]
    content: str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[CalledTool] | None = None
    function_call: None = None
    audio: None = None


class ToolMessage(Fields):
    """What a tool gave."""

    role: Literal["tool"]
    content: Texts
    tool_call_id: str
    name: str | None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Fields):
    """A function that the agent may call. `strict` changes nothing."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool that the agent may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    """A function by its name."""

    name: ToolName


class NamedTool(Fields):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Fields):
    """How a stream is written."""

    include_usage: bool | None = None


class ChatRequest(Fields):
    """A chat to continue."""

    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    model: Label
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), WHOLE] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    latentmem: Own | None = None
    response_format: PlainText | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Empty | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    audio: None = None
    functions: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    function_call: None = None
    web_search_options: None = None
    moderation: None = None


def read_chat(values: dict[str, Any], call: str) -> tuple[Ask, ChatRequest]:
    """Return what a body asks for.

    Raises:
        Refused: a field is at fault; it is named.
    """
    body = read_fields(ChatRequest, values)
    tools = [each.model_dump(exclude_none=True) for each in body.tools or ()]
    choice = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    must_call, offered = choose(choice, isinstance(body.tool_choice, NamedTool), tools)
    own = body.latentmem or Own()
    ask = Ask(
        call=call,
        model=body.model,
        conversation=Conversation(messages=tuple(map(_plain, body.messages)), tools=offered, must_call=must_call),
        temperature=body.temperature,
        top_p=body.top_p,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        n=body.n or 1,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        seed=of_64_bits(body.seed),
        logprobs=bool(body.logprobs),
        stream=bool(body.stream),
        with_usage=bool(body.stream_options and body.stream_options.include_usage),
        parallel_calls=body.parallel_tool_calls is not False,
        memory=own.memory,
        with_tokens=own.tokens,
        extra={"metadata": dict(body.metadata)} if body.metadata else {},
    )
    return ask, body


def choose(
    choice: str | None, is_name: bool, tools: Sequence[dict[str, JsonValue]]
) -> tuple[str, tuple[dict[str, JsonValue], ...]]:
    """Return which tool has to be called, see `Conversation.must_call`, and the tools that the agent is shown.

    Raises:
        Refused: a tool has to be called that is not there.
    """
    names = [str(tool["function"]["name"]) for tool in tools if isinstance(tool["function"], dict)]
    if len(set(names)) < len(names):
        raise Refused(400, "tools: two of them have one name", "tools")
    if is_name and choice not in names:
        raise Refused(400, f"tool_choice: {choice} is not among the tools", "tool_choice")
    if is_name:
        return str(choice), (tools[names.index(str(choice))],)
    if choice == "required" and not tools:
        raise Refused(400, "tool_choice: a tool is required, and there are no tools", "tool_choice")
    return "*" if choice == "required" else "", () if choice == "none" else tuple(tools)


def _plain(message: SystemMessage | UserMessage | AssistantMessage | ToolMessage) -> dict[str, JsonValue]:
    """Return the message as it is kept: parts that decline become text, and what is empty is left out."""
    plain: dict[str, Any] = message.model_dump(exclude_none=True)
    content = plain.setdefault("content", None)
    refusal = plain.pop("refusal", None)
    if isinstance(content, list):
        plain["content"] = [{"type": "text", "text": part.get("text", part.get("refusal"))} for part in content]
    elif refusal and not content:
        plain["content"] = refusal
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
    return plain
