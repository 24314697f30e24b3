"""The body of `/v1/responses`, and what it asks for: the same as a chat, written otherwise."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag

from latentmem.serving.asks import Ask, Refused
from latentmem.serving.face.body import MAX_MESSAGES
from latentmem.serving.face.chat_request import choose
from latentmem.serving.face.fields import (
    WHOLE,
    Count,
    Fields,
    Label,
    Metadata,
    Own,
    PlainText,
    Temperature,
    ToolName,
    TopP,
    read_fields,
)
from latentmem.trajectory import SYSTEM_ROLES, Conversation


class InputText(Fields):
    """A part of a message's content."""

    type: Literal["input_text", "output_text"]
    text: str


class RefusalPart(Fields):
    """A part in which a model declined; to us it is text."""

    type: Literal["refusal"]
    refusal: str


Parts = list[Annotated[InputText | RefusalPart, Field(discriminator="type")]]


class InputMessage(Fields):
    """A message of the chat, or one that an earlier answer held."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts


class InputCall(Fields):
    """A tool that was called."""

    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class InputResult(Fields):
    """What a tool gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


def _kind(item: Any) -> str:
    """Return the kind of an input; one without a type is a message."""
    kind = item.get("type", "message") if isinstance(item, dict) else "message"
    return kind if isinstance(kind, str) else "message"


Input = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Fields):
    """A function that the agent may call. `strict` changes nothing."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class NamedTool(Fields):
    """The one tool that has to be called."""

    type: Literal["function"]
    name: ToolName


class TextForm(Fields):
    """The form of the response."""

    format: PlainText | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Fields):
    """How a model thinks; here nothing can be chosen."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponsesRequest(Fields):
    """A chat to continue."""

    input: str | Annotated[list[Input], Field(min_length=1)]
    model: Label
    instructions: str | None = None
    previous_response_id: Label | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_output_tokens: Count | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), WHOLE] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    latentmem: Own | None = None
    text: TextForm | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    moderation: None = None
    max_tool_calls: None = None


def read_responses(values: dict[str, Any], call: str) -> tuple[Ask, ResponsesRequest]:
    """Return what a body asks for, its earlier part left out.

    Raises:
        Refused: a field is at fault; it is named.
    """
    body = read_fields(ResponsesRequest, values)
    tools: list[dict[str, JsonValue]] = [
        {"type": "function", "function": each.model_dump(exclude_none=True, exclude={"type"})}
        for each in body.tools or ()
    ]
    named = isinstance(body.tool_choice, NamedTool)
    choice = body.tool_choice.name if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    must_call, offered = choose(choice, named, tools)
    own = body.latentmem or Own()
    ask = Ask(
        call=call,
        model=body.model,
        conversation=Conversation(messages=tuple(_messages(body)), tools=offered, must_call=must_call),
        temperature=body.temperature,
        top_p=body.top_p,
        max_tokens=body.max_output_tokens,
        logprobs="message.output_text.logprobs" in (body.include or ()),
        stream=bool(body.stream),
        with_usage=True,
        parallel_calls=body.parallel_tool_calls is not False,
        memory=own.memory,
        with_tokens=own.tokens,
        extra=_echoed(body),
    )
    return ask, body


def go_on(earlier: Conversation, now: Conversation, has_instructions: bool) -> Conversation:
    """Return the chat that continues an earlier one; instructions given now take the place of those given then.

    Raises:
        Refused: it is longer than is read.
    """
    before = list(earlier.messages)
    if has_instructions and before and before[0].get("role") in SYSTEM_ROLES:
        before = before[1:]
    first = 1 if has_instructions else 0
    messages = (*now.messages[:first], *before, *now.messages[first:])
    if len(messages) > MAX_MESSAGES:
        raise Refused(
            400, f"input: with the earlier response {len(messages)} messages; at most {MAX_MESSAGES} are read", "input"
        )
    return now.model_copy(update={"messages": messages})


def _messages(body: ResponsesRequest) -> list[dict[str, JsonValue]]:
    """Return the input as messages of a chat; calls of tools join what the agent said before them."""
    messages: list[dict[str, JsonValue]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        if isinstance(item, InputMessage):
            messages.append({"role": item.role, "content": _text(item.content)})
        elif isinstance(item, InputResult):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            calls = messages[-1].setdefault("tool_calls", [])
            assert isinstance(calls, list)
            function: dict[str, JsonValue] = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": function})
    return messages


def _text(content: str | Sequence[InputText | RefusalPart]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, InputText) else part.refusal for part in content)


def _echoed(body: ResponsesRequest) -> dict[str, JsonValue]:
    """Return the fields that the answer repeats."""
    echoed: dict[str, JsonValue] = body.model_dump(
        include={"instructions", "previous_response_id", "temperature", "top_p", "max_output_tokens", "metadata"}
    )
    tools: list[JsonValue] = [
        {
            "type": "function",
            "name": t.name,
            "description": t.description,
            "parameters": t.parameters,
            "strict": t.strict,
        }
        for t in body.tools or ()
    ]
    choice = body.tool_choice
    return {
        **echoed,
        "tools": tools,
        "tool_choice": choice.model_dump() if isinstance(choice, NamedTool) else choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
    }
