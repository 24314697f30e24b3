"""Compare memories on held-out tasks, under equal conditions."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from latentmem.config import Config, Sampling
from latentmem.evaluation import evaluate, forget, task_bar
from latentmem.files import write_atomic
from latentmem.memory_names import MemoryName
from latentmem.recipes.folders import EVALUATIONS, RESULTS
from latentmem.recipes.lessons import right_responses
from latentmem.recipes.memories import learn, learning, made_of, memory_of, own_memory
from latentmem.recipes.parts import Parts
from latentmem.recipes.phase import Phase, begin, initials
from latentmem.recipes.readings import write_reading
from latentmem.report import format_markdown, format_table, write_report
from latentmem.report.cells import comparison_cells
from latentmem.runs import Run
from latentmem.seeds import stream_seed

logger = logging.getLogger(__name__)

_MEASURED = 32
"""Tasks whose right responses are used to measure what a memory carries, where the data demonstrate them."""


def compare(config: Config, parts: Parts | None = None) -> dict[str, Any]:
    """Evaluate each memory; write the results and, for the test split, the report; return the results."""
    with begin(config, EVALUATIONS[config.evaluate.split], parts) as here:
        results = _play(here)
    if here.is_first and config.evaluate.split == "test":
        page = f"report: {write_report([Path(config.run)])}"
    else:
        page = f"dev split, for choices: {Path(config.run) / RESULTS['dev']}"
    here.say(f"{format_table(results)}\n{page}")
    return results


def play_test(config: Config, parts: Parts | None = None) -> dict[str, Any]:
    """Evaluate each memory on `evaluate.split`; write that split's results file; return the results."""
    with begin(config, EVALUATIONS[config.evaluate.split], parts) as here:
        return _play(here)


def _play(here: Phase) -> dict[str, Any]:
    """Evaluate each memory, and write the results and what the latents say."""
    config, parts, processes = here.config, here.parts, here.processes
    section = config.evaluate
    tasks = parts.asked_tasks[: section.num_tasks]
    names = section.memories
    for name in names:
        if name.is_own:
            own_memory(parts, name)  # reports a mistake in it before a model is loaded
    made = {str(name): memory_of(parts, name) for name in names}  # reports a missing or unfit checkpoint now
    for name in names:
        if name.is_own and tasks and parts.team.roles:
            made[str(name)].recall_many([(tasks[0], parts.team.roles[0])])  # shows a fault before hours of play
    for memory in made.values():
        learn(memory, processes, shown=True)
    if here.opened is not None:
        _forget_outdated(here.opened, {name: made_of(parts, name) for name in names})
    folder = Path(config.run) / here.name
    copies = folder if section.online else None
    sampling = Sampling(
        temperature=section.temperature,
        top_p=parts.sampling.top_p,
        top_k=parts.sampling.top_k,
        max_response_tokens=section.max_response_tokens or parts.sampling.max_response_tokens,
    )
    with task_bar(len(tasks), made, here.is_first) as show:
        found = evaluate(
            parts.team,
            parts.agents,
            {str(name): partial(memory_of, parts, name, copies) for name in names} if section.online else made,
            parts.domain,
            tasks=tasks,
            folder=folder,
            sampling=sampling,
            seed=stream_seed(config.seed, "evaluate"),
            batch_size=section.batch_size,
            max_turns=config.max_turns,
            online=section.online,
            num_bootstraps=section.num_bootstraps,
            on_progress=show,
            processes=processes,
            bank=parts.bank if any(name.needs_bank for name in names) else None,
            held_out=right_responses(parts, tasks[:_MEASURED], parts.team),
            starts={f"latent:{phase}": f"latent:{first}" for phase, first in initials(config).items()},
        )
    results = found.to_dict()
    for name, row in zip(names, results["memories"], strict=True):
        row["learning"] = learning(parts, name, copies)
    results = {"run": config.run, "split": section.split, **results, "seed": config.seed}
    if here.opened is not None:
        write_atomic(here.opened.folder / RESULTS[section.split], json.dumps(results, indent=1, allow_nan=False) + "\n")
        for name in names:
            write_reading(parts, name, folder, tasks)
    here.run.show_results(comparison_cells(results), format_markdown(results), results)
    processes.wait()  # reading out a composer that is spread over the processes needs all of them
    return results


def _forget_outdated(run: Run, inputs: dict[MemoryName, str]) -> None:
    """Drop the trajectories of memories whose composer or bank has changed since they were evaluated."""
    before = run.state.get("inputs", {})
    for name, now in inputs.items():
        if before.get(str(name), now) != now:
            logger.warning("evaluate: %s has changed since it was evaluated; it is evaluated again", name)
            forget(run.phase_folder, name)
    run.state = {"inputs": before | {str(name): now for name, now in inputs.items()}}
