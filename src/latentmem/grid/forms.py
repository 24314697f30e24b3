"""What a grid relies on in the files of its runs, and its page in grid.json; checked once, when a file is read."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from latentmem.parsing import Form

Number = Annotated[float, Field(ge=-1e9, le=1e9)]
"""One that can be drawn."""


class PlayedMemory(Form):
    """One memory in the results.json of a run."""

    name: str
    accuracy: Number
    accuracy_low: Number
    accuracy_high: Number
    num_errors: int
    peak_memory_mb: Number
    seconds: dict[str, Number]
    successes: tuple[Annotated[int, Field(ge=0, le=1)], ...]
    rewards: tuple[Number, ...]


class PlayedResults(Form):
    """The results.json of a run."""

    model: str
    temperature: Number
    task_ids: tuple[str, ...]
    memories: tuple[PlayedMemory, ...]

    @model_validator(mode="after")
    def _all_tasks_were_played(self) -> Self:
        for memory in self.memories:
            if len(memory.successes) != len(self.task_ids):
                raise ValueError(f"{memory.name} has {len(memory.successes)} of {len(self.task_ids)} tasks")
        return self


class _Comparison(Form):
    difference: Number
    low: Number
    high: Number
    p_value: Number
    p_holm: Number


class _Row(Form):
    variant: str
    memory: str
    accuracy: Number
    accuracy_low: Number
    accuracy_high: Number
    vs_none: _Comparison | None
    vs_text: _Comparison | None = None
    vs_real: _Comparison | None = None


class _PlacedRow(_Row):
    benchmark: str
    team: str


class _Cell(Form):
    run: str
    seed: int


class _Failure(Form):
    benchmark: str
    team: str
    variant: str
    memory: str
    seed: int
    line: str


class _Varied(Form):
    benchmarks: dict[str, object]
    teams: tuple[str, ...]
    memories: tuple[str, ...]
    seeds: tuple[int, ...]
    variants: dict[str, object]
    leave_out: str


class Table(Form):
    """The numbers of grid.json that its tables are made of."""

    run: str
    grid: _Varied
    train_teams: tuple[str, ...] = ()
    models: tuple[str, ...]
    temperatures: tuple[Number, ...]
    num_cells: int
    num_done: int
    num_comparisons: int
    rows: tuple[_PlacedRow, ...]
    overall: tuple[_Row, ...]
    cells: tuple[_Cell, ...]
    failures: tuple[_Failure, ...]
