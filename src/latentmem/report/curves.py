"""Figures of runs: learning curves, and bars of accuracy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from latentmem.memory_names import MemoryName
from latentmem.report.cells import accuracy_cell
from latentmem.report.figures import COLOURS, STYLES, THEMES, Picture, add_legend, dress, in_both_themes, label, png
from latentmem.report.read import RunRecord
from latentmem.report.values import Row, has, memories_in, number


@dataclass(frozen=True)
class Curve:
    """One figure of a phase, with one value from each of its metric lines."""

    phase: str
    key: str
    title: str
    value: Callable[[Row], float | None]
    ends: tuple[str, str] | None = None
    """Keys of the ends of the value's interval, if it is logged with one."""


def _signal(row: Row) -> float | None:
    groups = number(row.get("groups"))
    found = number(row.get("signal_groups"))
    return found / groups if groups and found is not None else None


def _field(key: str) -> Callable[[Row], float | None]:
    return lambda row: number(row.get(key))


_CARRIED = "What latents carry on held-out tasks, in nats a response"

CURVES = (
    Curve("lmpo", "carried", _CARRIED, _field("carried"), ("carried_low", "carried_high")),
    *(
        Curve(phase, key, title, value)
        for phase in ("lmpo", "grpo")
        for key, title, value in (
            ("reward", "Mean reward of the rollouts", _field("reward")),
            ("eval_reward", "Mean reward on held-out tasks", _field("eval_reward")),
            ("advantage_std", "Spread of the advantages", _field("advantage_std")),
            ("signal", "Share of groups with signal", _signal),
            ("clip_fraction", "Clip fraction", _field("clip_fraction")),
            ("grad_norm", "Gradient norm", _field("grad_norm")),
            ("loss", "Loss", _field("loss")),
            ("kl", f"KL to the {'initial composer' if phase == 'lmpo' else 'untrained agents'}", _field("kl")),
        )
    ),
    Curve("warmup", "loss", "Loss", _field("loss")),
    Curve("warmup", "eval_loss", "Loss on held-out words", _field("eval_loss")),
    Curve("warmup", "framed", "Share of held-out words said from a slot", _field("framed")),
    Curve("warmup", "copied", "Share of held-out words copied by the composer", _field("copied")),
    Curve("sft", "loss", "Loss", _field("loss")),
    Curve("sft", "eval_loss", "Loss on held-out trajectories", _field("eval_loss")),
    Curve("sft", "carried", _CARRIED, _field("carried"), ("carried_low", "carried_high")),
    Curve("sft", "eval_accuracy", "Share of held-out responses that are said exactly", _field("eval_accuracy")),
)
SHOWN_PHASES = ("collect", "warmup", "sft", "lmpo", "grpo")


def learning_curves(records: list[RunRecord]) -> tuple[list[Picture], dict[str, list[str]]]:
    """Draw the figures that have data; also return, by phase, the titles of those that no run recorded."""
    pictures: list[Picture] = []
    unrecorded: dict[str, list[str]] = {}
    labels = _told_apart([r.name for r in records])
    for curve in CURVES:
        series = {r.name: _series(r.rows(curve.phase), curve) for r in records}
        series = {name: points for name, points in series.items() if points}
        if series:
            alt = f"{curve.title} over the steps of {curve.phase.upper()}. " + " ".join(
                f"{name}: {_trend(points)}" for name, points in series.items()
            )
            bands = {r.name: _band(r.rows(curve.phase), curve) for r in records}
            drawn = in_both_themes(partial(_draw_curve, series, bands, labels))
            pictures.append(Picture(f"{curve.phase}_{curve.key}", curve.title, alt, drawn))
        elif any(r.rows(curve.phase) for r in records):
            unrecorded.setdefault(curve.phase, []).append(curve.title)
    return pictures, unrecorded


def _series(rows: list[Row], curve: Curve) -> list[tuple[int, float]]:
    values = [(row.get("step"), curve.value(row)) for row in rows]
    return [(step, value) for step, value in values if isinstance(step, int) and value is not None]


def _band(rows: list[Row], curve: Curve) -> list[tuple[int, float, float]]:
    """Return step, low end and high end of each interval that was logged."""
    if curve.ends is None:
        return []
    found = [(row.get("step"), *(number(row.get(key)) for key in curve.ends)) for row in rows]
    return [
        (step, low, high) for step, low, high in found if isinstance(step, int) and low is not None and high is not None
    ]


def _trend(points: list[tuple[int, float]]) -> str:
    values = [value for _, value in points]
    if len(values) < 2:
        return f"{values[0]:.3g} at step {points[0][0]}."
    n = max(1, len(values) // 5)
    first, last = sum(values[:n]) / n, sum(values[-n:]) / n
    over = f" (means of {n} steps)" if n > 1 else ""
    return f"from {first:.3g} to {last:.3g}{over}, between {min(values):.3g} and {max(values):.3g}."


def _told_apart(names: list[str]) -> dict[str, str]:
    """Map each run's name to its path without the leading folders that all runs share."""
    parts = [Path(name).parts for name in names]
    shared = 0
    while all(len(path) > shared + 1 for path in parts) and len({path[shared] for path in parts}) == 1:
        shared += 1
    return {name: str(Path(*path[shared:])) for name, path in zip(names, parts, strict=True)}


def _draw_curve(
    series: dict[str, list[tuple[int, float]]],
    bands: dict[str, list[tuple[int, float, float]]],
    labels: dict[str, str],
    theme: str,
) -> bytes:
    """Draw each run's curve, with its band if it has one; `labels` covers all runs, in the order of their colours."""
    figure = Figure(figsize=(3.7, 2.2 + (0.1 + 0.1 * len(labels) if len(labels) > 1 else 0)), layout="constrained")
    axes = figure.add_subplot()
    for name, points in series.items():
        i = list(labels).index(name)
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
        steps, values = [step for step, _ in points], [value for _, value in points]
        if band := bands[name]:
            at, lows, highs = ([*column] for column in zip(*band, strict=True))
            axes.fill_between(at, lows, highs, color=colour, alpha=0.15, linewidth=0)
        reach = len(values) // 16
        few = len(values) <= 12
        if reach:
            # Single steps are noisy, as they rest on a few groups; the thick line is the mean over neighbouring steps.
            axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
            around = [values[max(0, j - reach) : j + reach + 1] for j in range(len(values))]
            values = [sum(near) / len(near) for near in around]
        axes.plot(
            steps,
            values,
            style,
            color=colour,
            linewidth=1.8,
            label=label(labels[name]),
            marker="o" if few else None,
            ms=4,
        )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(axes, theme)
    if len(labels) > 1:
        add_legend(axes, theme, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    return png(figure)


def accuracy_bars(record: RunRecord, number_of_run: int) -> Picture | None:
    """Draw the accuracy of each memory of a run with its interval; None if none was evaluated."""
    memories = [m for m in memories_in(record.results or {}) if has(m, "accuracy")]
    if not memories:
        return None
    alt = "Accuracy of each memory with its 95% interval. " + "; ".join(
        f"{m['name']} {accuracy_cell(m)}" for m in memories
    )
    drawn = in_both_themes(partial(_draw_bars, memories))
    return Picture(f"accuracy_{number_of_run}", "Accuracy with 95% intervals", alt, drawn)


def _draw_bars(memories: list[Row], theme: str) -> bytes:
    figure = Figure(figsize=(3.7, 0.7 + 0.34 * len(memories)), layout="constrained")
    axes = figure.add_subplot()
    text = THEMES[theme][0]
    for i, m in enumerate(memories):
        accuracy = 100 * m["accuracy"]
        latent = MemoryName.parse(str(m["name"])).is_latent
        axes.barh(i, accuracy, height=0.6, color=COLOURS[0] if latent else "#8a8a8a")
        end = accuracy
        if has(m, "accuracy_low", "accuracy_high"):
            low, end = 100 * m["accuracy_low"], 100 * m["accuracy_high"]
            axes.plot([low, end], [i, i], color=text, linewidth=1.5, marker="|", ms=8)
        axes.annotate(
            f"{accuracy:.1f}", (end, i), (5, 0), textcoords="offset points", va="center", color=text, fontsize=8
        )
    axes.set_yticks(range(len(memories)), [label(m["name"]) for m in memories])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel("accuracy, %")
    dress(axes, theme)
    axes.grid(visible=False, axis="y")
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    return png(figure)
