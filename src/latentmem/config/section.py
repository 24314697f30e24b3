"""What every section of the configuration is: frozen and strict; and the kinds of values that several have."""

from datetime import date, datetime
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from latentmem.bank_place import is_url, read_url, without_password
from latentmem.memory_names import MemoryName, known_memory

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


def _fits_a_path(value: str) -> str:
    if "\0" in value or len(value.encode()) > 4095 or any(len(name.encode()) > 255 for name in value.split("/")):
        raise ValueError(f"is {value[:40]!r}..., which cannot name a file; a name has at most 255 bytes and no NUL")
    return value


PathText = Annotated[Text, AfterValidator(_fits_a_path)]
"""What is or may be a path: to ask whether there is such a file never fails."""


def _names_a_bank(value: str) -> str:
    if not is_url(value):
        return _fits_a_path(value)
    read_url(value)
    return value


BankText = Annotated[Text, AfterValidator(_names_a_bank), PlainSerializer(without_password)]
"""The path of a bank's file, or the URL of a server; what is written down has no password."""


def _is_http(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username:
        raise ValueError(f"is {value!r}; expected a web address such as http://127.0.0.1:8000")
    return value


WebAddress = Annotated[Text, AfterValidator(_is_http)]
"""The address of a server, without a query or a password."""


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys forbidden, numbers never read from strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def default(section: type[Section], field: str) -> Any:
    """The default of one field, for what takes it as an argument of its own."""
    return section.model_fields[field].default


AnySection = TypeVar("AnySection", bound=Section)
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""YAML has lists; a frozen section holds tuples."""


def _day(value: Any) -> Any:
    """A date as YYYY-MM-DD: YAML reads one as a date, a written configuration holds it as text."""
    if isinstance(value, datetime) or not isinstance(value, date | str):
        raise ValueError(f"is {value!r}; expected a date such as 2026-01-31")
    try:
        return value if isinstance(value, date) else date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"is {value!r}; expected a date such as 2026-01-31") from None


Day = Annotated[date, BeforeValidator(_day)]
"""A day, without a time."""


def _named(value: Any) -> Any:
    """Names of memories as a user writes them, taken apart; what is no list is left to the type."""
    if not isinstance(value, tuple):
        return value
    for name in value:
        if not isinstance(name, str | MemoryName):
            raise ValueError(f"has {name!r}; expected the names of memories")
    names = tuple(name if isinstance(name, MemoryName) else known_memory(_fits_a_path(name)) for name in value)
    if len(set(names)) != len(names):
        raise ValueError("names one memory twice")
    return names


MemoryNames = Annotated[
    tuple[MemoryName, ...],
    BeforeValidator(_named),
    AsTuple,
    Field(min_length=1),
    PlainSerializer(lambda names: [str(name) for name in names]),
]
"""As `evaluate.memories`; written down as texts again."""
