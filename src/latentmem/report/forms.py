"""What reports rely on in results.json; checked once, when the file is read, so that every cell can be written."""

from typing import Annotated

from pydantic import Field

from latentmem.parsing import Form

Number = Annotated[float, Field(ge=-1e9, le=1e9)] | None
"""One that can be drawn; null where there was none."""


class Comparison(Form):
    """A memory against another."""

    difference: Number = None
    low: Number = None
    high: Number = None
    p_value: Number = None


class MemoryRow(Form):
    """The numbers of one memory; older runs lack some."""

    name: str
    trajectories: str | None = None
    accuracy: Number = None
    accuracy_low: Number = None
    accuracy_high: Number = None
    reward: Number = None
    no_answer: Number = None
    num_errors: Number = None
    memory_malformed: Number = None
    memory_prompt_tokens: Number = None
    memory_generated_tokens: Number = None
    vs_none: Comparison | None = None
    vs_text: Comparison | None = None
    vs_start: Comparison | None = None
    vs_real: Comparison | None = None


class ResultsForm(Form):
    """The outcome of an evaluation."""

    run: str | None = None
    memories: tuple[MemoryRow, ...] | None = None
