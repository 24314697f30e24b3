"""Numbers as cells of a table; a number looks the same on a page, on a terminal and in Markdown."""

from collections.abc import Callable, Sequence
from functools import partial

from latentmem.report.values import Row, as_dict, has, memories_in, number

MISSING = "-"
"""A cell without a value."""


def table_cells(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> list[list[str]]:
    """Return header and rows of a table, with the columns in which some row has a value."""
    filled = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    shown = {title: cells for title, cells in filled.items() if any(cell != MISSING for cell in cells)}
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]


def comparison_cells(results: Row) -> list[list[str]]:
    """Return header and rows of the comparison table, with the columns in which some memory has a value."""
    return table_cells(memories_in(results), COLUMNS) if memories_in(results) else [["memory"]]


def group_cells(results: Row) -> list[list[str]]:
    """Return header and rows of accuracies by group, also for tasks whose answer was recalled; [] without groups."""
    memories = [m for m in memories_in(results) if as_dict(m.get("groups"))]
    names = list(dict.fromkeys(group for m in memories for group in as_dict(m["groups"])))
    rows = []
    for group in names:
        found = [as_dict(as_dict(m["groups"]).get(group)) for m in memories]
        rows.append([group, *map(_share_cell, found)])
        if any(as_dict(part.get("hit")) for part in found):
            rows.append([f"{group}, given a hit", *(_share_cell(as_dict(part.get("hit"))) for part in found)])
    return [["accuracy by group [95%], tasks", *(str(m["name"]) for m in memories)], *rows] if rows else []


def accuracy_cell(memory: Row) -> str:
    """Format an accuracy with its interval, in percent."""
    if not has(memory, "accuracy"):
        return MISSING
    if not has(memory, "accuracy_low", "accuracy_high"):
        return f"{100 * memory['accuracy']:.1f}%"
    return "{:.1f}% [{:.1f}, {:.1f}]".format(
        *(100 * memory[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
    )


def points_cell(difference: Row) -> str:
    """Format a difference of two accuracies with its interval, in points."""
    if not has(difference, "difference"):
        return MISSING
    if not has(difference, "low", "high"):
        return f"{100 * difference['difference']:+.1f}"
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * difference[key] for key in ("difference", "low", "high")))


def carried_cell(memory: Row) -> str:
    """Format what a memory carries with its interval, in nats per response."""
    carried = as_dict(memory.get("carried"))
    if not has(carried, "nats"):
        return MISSING
    if not has(carried, "low", "high"):
        return f"{carried['nats']:+.2f}"
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(carried[key] for key in ("nats", "low", "high")))


def _share_cell(share: Row) -> str:
    """Format an accuracy with its interval, in percent, and the number of tasks behind it."""
    if not has(share, "accuracy", "low", "high", "num_tasks"):
        return MISSING
    percent = "{:.1f}% [{:.1f}, {:.1f}]".format(*(100 * share[key] for key in ("accuracy", "low", "high")))
    return f"{percent}, {share['num_tasks']}"


def p_cell(p: float | None) -> str:
    """Format a p-value."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _share(key: str, memory: Row) -> str:
    return f"{100 * memory[key]:.0f}%" if has(memory, key) else MISSING


def _partial_reward(memory: Row) -> str:
    """Format the mean reward if it differs from the accuracy."""
    differs = has(memory, "reward", "accuracy") and abs(memory["reward"] - memory["accuracy"]) > 1e-9
    return f"{memory['reward']:.3f}" if differs else MISSING


def errors_cell(memory: Row) -> str:
    """Format the number of episodes that ended in an error, if any."""
    return str(memory["num_errors"]) if memory.get("num_errors") else MISSING


def per_task_cell(key: str, digits: int, memory: Row) -> str:
    """Format a number per task."""
    return f"{memory[key]:.{digits}f}" if has(memory, key) else MISSING


def memory_tokens_cell(memory: Row) -> str:
    """Format the tokens that language models, the composer among them, read and wrote for recalls."""
    if not memory.get("memory_prompt_tokens"):
        return MISSING
    return "+".join(per_task_cell(f"memory_{kind}_tokens", 0, memory) for kind in ("prompt", "generated"))


def seconds_cell(memory: Row) -> str:
    """Format the seconds per task, all parts together."""
    return per_task_cell("total", 2, as_dict(memory.get("seconds")))


COLUMNS: dict[str, Callable[[Row], str]] = {
    "memory": lambda memory: str(memory["name"]),
    "accuracy [95%]": accuracy_cell,
    "reward": _partial_reward,
    "vs none, points": lambda memory: points_cell(as_dict(memory.get("vs_none"))),
    "p vs none": lambda memory: p_cell(number(as_dict(memory.get("vs_none")).get("p_value"))),
    "vs text, points": lambda memory: points_cell(as_dict(memory.get("vs_text"))),
    "p vs text": lambda memory: p_cell(number(as_dict(memory.get("vs_text")).get("p_value"))),
    "vs its start, points": lambda memory: points_cell(as_dict(memory.get("vs_start"))),
    "p vs its start": lambda memory: p_cell(number(as_dict(memory.get("vs_start")).get("p_value"))),
    "vs real, points": lambda memory: points_cell(as_dict(memory.get("vs_real"))),
    "p vs real": lambda memory: p_cell(number(as_dict(memory.get("vs_real")).get("p_value"))),
    "carried, nats [95%]": carried_cell,
    "hits": partial(_share, "retrieval_hits"),
    "accuracy given a hit [95%], tasks": lambda memory: _share_cell(as_dict(memory.get("accuracy_hit"))),
    "no answer": partial(_share, "no_answer"),
    "errors": errors_cell,
    "prompt tok": partial(per_task_cell, "prompt_tokens", 0),
    "latent tok": partial(per_task_cell, "latent_tokens", 0),
    "new tok": partial(per_task_cell, "generated_tokens", 0),
    "memory tok": memory_tokens_cell,
    "s/task": seconds_cell,
    "peak MB": partial(per_task_cell, "peak_memory_mb", 0),
}
"""Title and cell function of each column; tokens and seconds are per task."""
