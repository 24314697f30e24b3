"""The outcome of a comparison: a table for people, plain values, or a data frame."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from latentmem.errors import ConfigError
from latentmem.report.tables import format_table

if TYPE_CHECKING:
    from pandas import DataFrame


class Results(Mapping[str, Any]):
    """What `evaluate` found: a mapping of plain JSON values, described in docs/evaluation.md."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        accuracies = ", ".join(f"{row['name']}={row['accuracy']:.3f}" for row in self._values["memories"])
        return f"Results({self._values['num_tasks']} tasks: {accuracies})"

    def table(self) -> str:
        """Return the comparison as aligned text, with a verdict in words below it."""
        return format_table(self._values)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values, as results.json holds them."""
        return dict(self._values)

    def to_dataframe(self) -> "DataFrame":
        """Return a data frame: one row for each memory, one column for each of its numbers; `carried` is in nats.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError:
            raise ConfigError("a data frame needs pandas, which is not installed; run `pip install pandas`") from None
        rows = []
        for row in self._values["memories"]:
            numbers = {key: value for key, value in row.items() if isinstance(value, str | int | float)}
            carried = row.get("carried") or {}
            rows.append({**numbers, "seconds": row["seconds"]["total"], "carried": carried.get("nats")})
        return DataFrame(rows).set_index("name")
