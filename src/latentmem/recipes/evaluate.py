"""Compare memories on held-out tasks, under equal conditions."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from latentmem.config import Config, Sampling
from latentmem.errors import EpisodesError
from latentmem.evaluation import evaluate, forget, num_played, task_bar
from latentmem.files import write_atomic
from latentmem.folders import EVALUATIONS, RESULTS
from latentmem.memory_names import MemoryName
from latentmem.progress import working
from latentmem.recipes.lessons import right_responses
from latentmem.recipes.memories import learn, learning, made_of, memory_of, own_memory
from latentmem.recipes.parts import Parts
from latentmem.recipes.phase import Phase, begin, initials
from latentmem.recipes.readings import is_to_read, write_reading
from latentmem.report import format_markdown, format_table, write_report
from latentmem.report.cells import comparison_cells
from latentmem.runs import Run
from latentmem.seeds import stream_seed
from latentmem.trajectory import Trajectory

logger = logging.getLogger(__name__)

_MEASURED = 32
"""Tasks whose right responses are used to measure what a memory carries, where the data demonstrate them."""
_RIGHT = "right.responses"
"""File of these responses. Its name does not end in .jsonl: those hold what was played."""


def compare(config: Config, parts: Parts | None = None) -> dict[str, Any]:
    """Evaluate each memory; write the results and, for the test split, the report; return the results.

    Raises:
        EpisodesError: all episodes ended in an error; what was written stays.
    """
    with begin(config, EVALUATIONS[config.evaluate.split], parts) as here:
        results = _play(here)
    if here.is_first and config.evaluate.split == "test":
        with working("evaluate: writing the report"):
            page = f"report: {write_report([Path(config.run)])}"
    else:
        page = f"dev split, for choices: {Path(config.run) / RESULTS['dev']}"
    here.say(f"{format_table(results)}\n{page}")
    rows = results["memories"]
    if here.is_first and all(row["num_errors"] == results["num_tasks"] for row in rows):
        path = Path(config.run) / here.name / rows[-1]["trajectories"]
        last = Trajectory.from_json(path.read_bytes().splitlines()[-1], str(path))
        num = len(rows) * results["num_tasks"]
        raise EpisodesError(
            f"evaluate: all {num} episodes ended in an error, the last with: {last.error}; the "
            "table compares nothing; mend that, and name a new run folder with run=FOLDER"
        )
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
    folder = Path(config.run) / here.name
    played = processes.from_first(partial(_played, here, folder, len(tasks)))
    # What is made now reports a missing or unfit checkpoint before hours of play.
    made = {
        str(name): partial(memory_of, parts, name) if str(name) in played else memory_of(parts, name) for name in names
    }
    for name in names:
        memory = made[str(name)]
        if isinstance(memory, partial):
            continue
        if name.is_own and tasks and parts.team.roles:
            memory.recall_many([(tasks[0], parts.team.roles[0])])  # shows a fault before hours of play
        learn(memory, processes, shown=True)
    if here.opened is not None:
        _forget_outdated(here.opened, {name: made_of(parts, name) for name in names})
    copies = folder if section.online else None
    sampling = Sampling(
        temperature=section.temperature,
        top_p=parts.sampling.top_p,
        top_k=parts.sampling.top_k,
        max_response_tokens=section.max_response_tokens or parts.sampling.max_response_tokens,
    )
    right = right_responses(parts, tasks[:_MEASURED], parts.team, folder / _RIGHT)
    with task_bar(len(tasks), [*made], here.is_first) as bar:
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
            on_progress=bar.show,
            on_work=bar.doing,
            processes=processes,
            bank=parts.bank if any(name.needs_bank for name in names) else None,
            held_out=right,
            starts={f"latent:{phase}": f"latent:{first}" for phase, first in initials(config).items()},
        )
        results = found.to_dict()
        for name, row in zip(names, results["memories"], strict=True):
            row["learning"] = learning(parts, name, copies)
        results = {"run": config.run, "split": section.split, **results, "seed": config.seed}
        if here.opened is not None:
            text = json.dumps(results, indent=1, allow_nan=False)
            write_atomic(here.opened.folder / RESULTS[section.split], f"{text}\n")
            for name in names:
                if is_to_read(name, folder):
                    bar.doing(f"reading what the latents of {name} say")
                    write_reading(parts, name, folder, tasks)
    here.run.show_results(comparison_cells(results), format_markdown(results), results)
    processes.wait()  # reading out a composer that is spread over the processes needs all of them
    return results


def _played(here: Phase, folder: Path, num_tasks: int) -> frozenset[str]:
    """Return the latent memories that have played all tasks, and have not changed since.

    Their composers need not be made, which takes seconds each.
    """
    assert here.opened is not None
    before = here.opened.state.get("inputs", {})
    return frozenset(
        str(name)
        for name in here.config.evaluate.memories
        if name.is_latent
        and num_played(folder, name) == num_tasks
        and before.get(str(name)) == made_of(here.parts, name)
    )


def _forget_outdated(run: Run, inputs: dict[MemoryName, str]) -> None:
    """Drop the trajectories of memories whose composer or bank has changed since they were evaluated."""
    before = run.state.get("inputs", {})
    for name, now in inputs.items():
        if before.get(str(name), now) != now:
            logger.warning("evaluate: %s has changed since it was evaluated; it is evaluated again", name)
            forget(run.phase_folder, name)
    run.state = {"inputs": before | {str(name): now for name, now in inputs.items()}}
