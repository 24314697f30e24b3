"""Forms that take no other fields than their own: a misspelt one is refused, with the name that was probably meant."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from latentmem.errors import suggest

UNKNOWN = "unknown_field"
"""Type of the error of a field that there is not; its context names the `field`."""


class Closed(BaseModel):
    """A form with its own fields alone."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_no_other(cls, values: Any) -> Any:
        for field in values if isinstance(values, dict) else ():
            if field not in cls.model_fields:
                said = "there is no such field; {hint}"
                raise PydanticCustomError(UNKNOWN, said, {"field": field, "hint": suggest(field, cls.model_fields)})
        return values
