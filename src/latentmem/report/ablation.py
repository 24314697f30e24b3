"""Draw runs that differ in one key of their configuration against that key.

The key is found by comparing the resolved configurations that the runs left behind, so the user need not name it. Seeds
may differ as well; each value then has several points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from latentmem.config import FILLS_BANK, FILLS_BANK_IN_BANK
from latentmem.parsing import parse_yaml
from latentmem.report.figures import COLOURS, MARKERS, STYLES, Picture, add_legend, dress, in_both_themes, label, png

NOT_VARIED = ("run", "seed", "evaluate.memories", "evaluate.num_bootstraps")
"""Keys that may differ without counting as what was varied."""


@dataclass(frozen=True)
class Point:
    """One measure of one memory in one run."""

    run: str
    memory: str
    value: Any
    """The run's value of the key that the runs differ in."""
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Ablation:
    """Runs arranged by the one key that they differ in."""

    key: str
    values: list[Any]
    """In drawing order: numbers by size, anything else in the order of the runs."""
    points: dict[str, list[Point]]
    """Points by measure: accuracy and reward."""


def differing_keys(configs: Sequence[str]) -> dict[str, list[Any]]:
    """Return the dotted keys that all YAML texts have and whose values differ, with these values.

    Keys in `NOT_VARIED` are left out. So is `bank.path` if a key differs that decides what a bank is filled with, since
    the path then differs for that reason. The result is empty if a text is not a mapping in YAML.
    """
    try:
        flat = [_flat(parse_yaml(text)) for text in configs]
    except ValueError:
        return {}
    shared = [key for key in flat[0] if all(key in found for found in flat)]
    values = {key: [found[key] for found in flat] for key in shared}
    differing = {key: found for key, found in values.items() if any(value != found[0] for value in found)}
    filled_otherwise = any(
        key.partition(".")[0] in FILLS_BANK or key.removeprefix("bank.") in FILLS_BANK_IN_BANK for key in differing
    )
    left_out = (*NOT_VARIED, "bank.path") if filled_otherwise else NOT_VARIED
    return {key: found for key, found in differing.items() if key not in left_out}


def find_ablation(
    names: Sequence[str], configs: Sequence[str], results: Sequence[Mapping[str, Any]]
) -> Ablation | None:
    """Arrange the runs by the key that they differ in; None if they differ in no key, or in several.

    Args:
        names: the runs' names.
        configs: their config.yaml, as text.
        results: their results.json.
    """
    keys = differing_keys(configs) if len(configs) > 1 else {}
    if len(keys) != 1:
        return None
    ((key, values),) = keys.items()
    points: dict[str, list[Point]] = {"accuracy": [], "reward": []}
    for name, value, found in zip(names, values, results, strict=True):
        for memory in found.get("memories") or []:
            for measure, drawn in points.items():
                numbers = [memory.get(f"{measure}{end}") for end in ("", "_low", "_high")]
                if all(isinstance(number, int | float) for number in numbers):
                    drawn.append(Point(name, str(memory.get("name")), value, *numbers))
    distinct = [value for i, value in enumerate(values) if value not in values[:i]]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        distinct.sort()
    return Ablation(key, distinct, points)


def ablation_cells(ablation: Ablation) -> list[list[str]]:
    """Return header and rows of a table: a row for each run, a column for each memory."""
    points = ablation.points["accuracy"]
    memories = _memories(points)
    rows = [[ablation.key, "run", *memories]]
    for value in ablation.values:
        for run in dict.fromkeys(point.run for point in points if point.value == value):
            found = {point.memory: point for point in points if point.run == run}
            rows.append([str(value), run, *(_told(found.get(memory)) for memory in memories)])
    return rows


def draw_ablation(ablation: Ablation) -> list[Picture]:
    """Draw accuracy against the key, and the mean reward too if it differs from accuracy."""
    pictures = []
    accuracies = [point.mean for point in ablation.points["accuracy"]]
    for measure, points in ablation.points.items():
        means = [point.mean for point in points]
        if not points or (measure == "reward" and np.allclose(means, accuracies)):
            continue
        alt = f"Mean {measure} of each memory with its 95% interval, against {ablation.key}. " + "; ".join(
            f"{point.memory} at {point.value}: {_told(point)}" for point in points
        )
        title = f"{measure.capitalize()} against {ablation.key}"

        def draw(theme: str, points: list[Point] = points, measure: str = measure) -> bytes:
            return _draw(ablation, points, measure, theme)

        pictures.append(Picture(f"ablation_{measure}", title, alt, in_both_themes(draw)))
    return pictures


def _draw(ablation: Ablation, points: list[Point], measure: str, theme: str) -> bytes:
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    memories = _memories(points)
    for i, memory in enumerate(memories):
        shift = 0.5 * ((i + 0.5) / len(memories) - 0.5)  # side by side, so that intervals do not hide each other
        drawn = [point for point in points if point.memory == memory]
        places = np.array([ablation.values.index(point.value) for point in drawn])
        means, lows, highs = (np.array([getattr(p, end) for p in drawn]) for end in ("mean", "low", "high"))
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.vlines(places + shift, lows, highs, color=colour, linewidth=1.2)
        axes.plot(places + shift, means, marker, color=colour, ms=5, label=label(memory))
        at = sorted(set(places.tolist()))
        line = [means[places == place].mean() for place in at]
        axes.plot(np.array(at) + shift, line, STYLES[i % len(STYLES)], color=colour, linewidth=1)
    axes.set_xticks(range(len(ablation.values)), [label(value) for value in ablation.values])
    axes.set_xlim(-0.5, len(ablation.values) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label(ablation.key))
    axes.set_ylabel(measure)
    dress(axes, theme)
    axes.grid(visible=False, axis="x")
    for text in [*axes.get_xticklabels(), axes.xaxis.label]:
        text.set_parse_math(False)
    add_legend(axes, theme, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return png(figure)


def _told(point: Point | None) -> str:
    return "-" if point is None else f"{100 * point.mean:.1f}% [{100 * point.low:.1f}, {100 * point.high:.1f}]"


def _memories(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.memory for point in points))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {}
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
