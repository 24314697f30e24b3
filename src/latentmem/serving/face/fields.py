"""What the requests of both endpoints have in common, and how a field that is at fault is named.

A field that OpenAI documents and that is not served has a type that admits its default alone, so the schema of a
request says the same as the server does. Fields that are not documented are ignored.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from latentmem.outside import one_line
from latentmem.serving.asks import Refused
from latentmem.serving.closed import UNKNOWN, Closed
from latentmem.serving.identity import NAME


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


class Fields(BaseModel):
    """An object in a request; what is not documented is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


Zero = Annotated[float, Field(ge=0, le=0)]
Empty = Annotated[dict[str, JsonValue], Field(max_length=0)]
WHOLE = BeforeValidator(lambda value: int(value) if _is_whole(value) else value)
"""Makes 8.0 a whole number, which it is in JSON."""
Count = Annotated[int, Field(ge=1, le=1_000_000), WHOLE]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
MAX_SEED = 9_223_372_036_854_776_000
"""OpenAI's limit: that of 64 bits, as a float writes it."""
Seed = Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED), WHOLE]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = StopText | Annotated[list[StopText], Field(max_length=16)]
Name = Annotated[str, Field(pattern=NAME)]
Label = Annotated[str, Field(min_length=1, max_length=200)]
Metadata = Annotated[dict[str, str], Field(max_length=64)]


class Own(Closed):
    """The body's object `latentmem`; other fields are refused, since a typing error would mix up sessions."""

    model_config = ConfigDict(strict=True)
    session: Name | None = None
    role: Name | None = None
    agent: Name | None = None
    """Another name of `role`."""
    task: Name | None = None
    domain: Name | None = None
    memory: Name | None = None
    """The memory to use for this request, where the server lets requests choose."""
    tokens: bool = False
    """Whether the answer tells token ids and their log-probabilities."""


class PlainText(Fields):
    """The one form of a response."""

    type: Literal["text"]


F = TypeVar("F", bound=BaseModel)


def of_64_bits(seed: int | None) -> int | None:
    """Return a seed as a signed number of 64 bits."""
    return None if seed is None else (seed + 2**63) % 2**64 - 2**63


def read_fields(form: type[F], values: dict[str, Any]) -> F:
    """Return a request's fields.

    Raises:
        Refused: one is missing, is of another type, or asks for what is not served; it is named.
    """
    try:
        return form.model_validate(values)
    except ValidationError as error:
        raise at_fault(error.errors(include_url=False), values) from None


def at_fault(errors: Sequence[Any], values: Any) -> Refused:
    """Return the refusal that names the field at fault.

    Args:
        errors: what pydantic found.
        values: what it read.
    """
    # Of the forms that a value may have, the one that fits best fails deepest.
    first = max(errors, key=lambda each: len(each["loc"]))
    kind, context = first["type"], first.get("ctx", {})
    if kind == UNKNOWN:
        field = path_of((*first["loc"], context["field"]), values)
        return Refused(400, f"{field}: {one_line(first['msg'])}", field)
    chosen_by = context.get("discriminator", "").strip("'")
    field = path_of(first["loc"], values) + (f".{chosen_by}" if chosen_by.isidentifier() else "")
    said = first["msg"].removeprefix("Value error, ")
    said = _SAID.get(kind, f"{said[:1].lower()}{said[1:]}")
    found = "" if kind in _TELLS_ITSELF else f"; found {one_line(repr(first['input']), 60)}"
    return Refused(400, f"{field}: {one_line(said)}{found}", field)


_SAID = {"none_required": "it is not supported; leave it out"}
_TELLS_ITSELF = ("missing", "value_error")
"""Kinds of errors that show what was found, if anything."""


def path_of(loc: Sequence[int | str], values: Any) -> str:
    """Return the path of a field, such as `messages[0].content`, without the forms that were tried for it."""
    path = ""
    loc = [part for part in loc if part != "[key]"]
    for number, part in enumerate(loc):
        if isinstance(values, list) and isinstance(part, int) and part < len(values):
            values, path = values[part], f"{path}[{part}]"
        elif isinstance(values, dict) and (part in values or number == len(loc) - 1):
            values, path = values.get(str(part)), f"{path}.{part}"
    return one_line(path.lstrip("."), 200) or "body"
