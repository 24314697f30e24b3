"""Turn numbers into the sentences they support, in one place for page, terminal and Markdown."""

from collections.abc import Iterable

from latentmem.memory_names import MemoryName
from latentmem.report.cells import carried_cell, p_cell, points_cell
from latentmem.report.values import Row, as_dict, has, memories_in, number
from latentmem.stats import holm

MUCH_CARRIED = 0.1
"""Nats per response below which a memory is said to carry only a trace."""
FEW_TASKS = 16
"""With fewer tasks nothing is concluded about what a memory carries: Student's interval needs more, unless the
differences are distributed normally."""


def verdict(results: Row) -> list[str]:
    """Return the sentences that a results.json supports; p-values are corrected for their number (Holm)."""
    memories = memories_in(results)
    num_tasks = results.get("num_tasks", 0)
    sentences = []
    widths = [(m["accuracy_high"] - m["accuracy_low"]) / 2 for m in memories if has(m, "accuracy_low", "accuracy_high")]
    if widths:
        sentences.append(
            f"With {num_tasks} tasks the 95% interval of an accuracy is up to ±{100 * max(widths):.0f} points."
        )
    comparisons = list(_comparisons(memories))
    if memories and all(memory.get("accuracy") == 0 for memory in memories):
        sentences.append(f"No memory solved any of the {num_tasks} tasks, so nothing is said about which is better.")
    elif not comparisons:
        sentences.append("No memory was compared with none or text, so nothing is said about which is better.")
    else:
        sentences += findings(comparisons, num_tasks)
    sentences += _carrying(memories, num_tasks)
    for memory in memories:
        if memory.get("num_errors"):
            sentences.append(
                f"{memory['name']}: {memory['num_errors']} of {num_tasks} episodes ended in an error, not an answer."
            )
        if (memory.get("no_answer") or 0) >= 0.1:
            sentences.append(f"{memory['name']}: no answer could be read in {memory['no_answer']:.0%} of the episodes.")
        sentences += _expenses(memory)
    if memories:
        seed = f" ({results['seed']})" if "seed" in results else ""
        sentences.append(f"The intervals cover the choice of tasks, not the luck of training: this is one seed{seed}.")
    return sentences


def _carrying(memories: list[Row], num_tasks: int) -> list[str]:
    """Say of each memory whether it matters to the agents what it was made from."""
    found = {str(m["name"]): (m, as_dict(m.get("carried"))) for m in memories}
    told = {n: (m, c) for n, (m, c) in found.items() if has(c, "nats", "low", "high", "p_value", "num_tasks")}
    enough = {name: carried["p_value"] for name, (_, carried) in told.items() if carried["num_tasks"] >= FEW_TASKS}
    adjusted = dict(zip(enough, holm([*enough.values()]), strict=True))
    return [_carries(name, memory, carried, adjusted.get(name), num_tasks) for name, (memory, carried) in told.items()]


def _carries(name: str, memory: Row, carried: Row, p: float | None, num_tasks: int) -> str:
    """Say what the numbers support; `p` is corrected for the number of memories, and None where tasks are too few."""
    size = f"{carried_cell(memory)} nats a response over another task's memory, on {carried['num_tasks']} tasks"
    if p is None:
        return f"{name}: too few tasks to say whether it carries what it read, {FEW_TASKS} are needed: {size}."
    if carried["low"] > 0 and p < 0.05:
        if memory.get("accuracy") == 0:
            return (
                f"{name} makes the right responses likelier by what it read, but not likely enough: none of its "
                f"{num_tasks} episodes succeeded; {size}."
            )
        what = "what it read" if carried["nats"] >= MUCH_CARRIED else "a trace of what it read"
        return f"{name} carries {what}: {size}."
    if carried["high"] < 0 and p < 0.05:
        return f"{name} makes the right responses less likely than another task's memory does: {size}."
    if carried["high"] >= MUCH_CARRIED:
        return f"{name}: it is open whether it carries what it read; more tasks would tell: {size}."
    if MemoryName.parse(name).is_trained:
        return f"{name} is a learned prompt at most, because its content hardly matters: {size}."
    return f"{name} carries nothing that helps: {size}."


def _expenses(memory: Row) -> list[str]:
    """Say what a memory spent on learning and recalling, and how many replies could not be used."""
    sentences = []
    learning = as_dict(memory.get("learning"))
    if has(learning, "num_trajectories", "prompt_tokens", "generated_tokens", "seconds"):
        unused = sum(number(count) or 0 for count in as_dict(learning.get("malformed")).values())
        sentences.append(
            f"{memory['name']}: learned from {learning['num_trajectories']} trajectories before; a language model read "
            f"{learning['prompt_tokens']} tokens for it and wrote {learning['generated_tokens']}, in "
            f"{learning['seconds']:.0f} s; {unused} of its replies, or lines of them, could not be used."
        )
    if memory.get("memory_malformed"):
        sentences.append(f"{memory['name']}: {memory['memory_malformed']} replies could not be used while recalling.")
    return sentences


def _comparisons(memories: list[Row]) -> Iterable[tuple[str, str, Row]]:
    against_none = {m["name"] for m in memories if m.get("vs_none")}
    for memory in memories:
        # For a control only one question is asked: what does the memory itself lose?
        for baseline in ("real",) if memory.get("vs_real") else ("none", "text", "start"):
            found = as_dict(memory.get(f"vs_{baseline}"))
            # "none against text" repeats "text against none", and would be corrected for twice.
            twice = memory["name"] == "none" and "text" in against_none
            if found and not twice and has(found, "difference", "p_value"):
                other = memory.get("start") if baseline == "start" else compared_with(memory["name"], baseline)
                yield memory["name"], str(other), found


def compared_with(memory: str, baseline: str) -> str:
    """Return the name behind a baseline: for `real`, the memory that `memory` is a control of."""
    return str(MemoryName.parse(memory).real) if baseline == "real" else baseline


def findings(comparisons: list[tuple[str, str, Row]], num_tasks: int | None = None) -> list[str]:
    """Return sentences about comparisons; their p-values are corrected for their number (Holm).

    Args:
        comparisons: each with the memory, its baseline, and a row of `difference`, `low`, `high` and `p_value`.
        num_tasks: number of tasks, if all comparisons have the same; says whether any finding was possible.
    """
    count = len(comparisons)
    if num_tasks and count * 2.0 ** (1 - num_tasks) >= 0.05:  # the p of winning every task, the smallest there is
        many = f" and {count} comparisons" if count > 1 else ""
        return [f"With {num_tasks} tasks{many} no difference could be significant at 5%; play more tasks."]
    p_values = [found["p_value"] for _, _, found in comparisons]
    adjusted = holm(p_values)
    corrected = f" after correction for {count} comparisons" if count > 1 else ""
    sentences = []
    for (name, baseline, found), p in zip(comparisons, adjusted, strict=True):
        if p < 0.05:
            word = "better" if found["difference"] > 0 else "worse"
            sentences.append(
                f"{name} against {baseline}: {points_cell(found)} points, {word}, significant at 5% "
                f"(p {_equals(p)}{corrected})."
            )
    if not sentences:
        which = f"None of the {count} differences is" if count > 1 else "The difference is not"
        sentences.append(f"{which} significant at 5% (smallest p {_equals(min(adjusted))}{corrected}).")
    elif len(sentences) < count:
        rest = count - len(sentences)
        sentences.append(f"The other {rest} differences are not." if rest > 1 else "The other difference is not.")
    alone = [
        f"{name} against {baseline} (p {_equals(p)})"
        for (name, baseline, _), p, q in zip(comparisons, p_values, adjusted, strict=True)
        if p < 0.05 <= q
    ]
    if alone:
        sentences.append(f"Below 5% only before that correction, and so no finding: {', '.join(alone)}.")
    return sentences


def _equals(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p_cell(p)}"
