"""Let the team play, and fill the bank."""

from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

from latentmem.bank.stored_form import canonical
from latentmem.config import Config
from latentmem.errors import DataError, EpisodesError
from latentmem.files import write_atomic
from latentmem.memory.memory import Memory
from latentmem.memory_names import MemoryName
from latentmem.progress import progress
from latentmem.recipes.memories import learn, memory_of
from latentmem.recipes.parts import Parts
from latentmem.recipes.phase import Phase, begin
from latentmem.rollout import rollout
from latentmem.runs import Run
from latentmem.seeds import stream_seed
from latentmem.trajectory import Task, Trajectory

T = TypeVar("T")


def collect(config: Config, parts: Parts | None = None) -> None:
    """Play the experience split, or the train split if there is none; store every trajectory, including failures.

    Each batch is written to a file before it is stored. If the process dies between storing and counting a batch, the
    batch is taken from that file and not played again with a memory that already holds it.

    Raises:
        EpisodesError: in no episode an agent spoke to the end; they are stored all the same.
    """
    with begin(config, "collect", parts) as here:
        section, parts, processes = config.collect, here.parts, here.processes
        tasks = parts.collected_tasks[: section.num_tasks]
        done = processes.from_first(lambda: _go_on_collecting(here.opened, parts, len(tasks)))
        if done == len(tasks):
            here.say(
                f"collect: finished already, {done} {parts.collected_split} tasks; "
                f"the bank has {len(parts.bank)} trajectories"
            )
            _check_use(here)
            return
        kind = "latent:untrained" if section.memory == "latent" else section.memory
        memory = memory_of(parts, MemoryName.parse(kind))
        learn(memory, processes)
        play = partial(_play, config, parts, memory)
        per_batch = max(1, section.batch_size // section.rollouts_per_task)
        # Without memory the batches do not depend on each other, so whole batches are shared out; each is the same
        # computation whichever process plays it. With memory a batch recalls what the one before it stored, so the
        # tasks within a batch are shared out.
        per_round = per_batch if section.memory != "none" else per_batch * processes.size
        with progress(len(tasks), "collect", "task", done, shown=here.is_first) as bar:
            for start in range(done, len(tasks), per_round):
                batch = tasks[start : start + per_round]
                per_share = per_batch if section.memory == "none" else ceil(len(batch) / processes.size)
                shares = processes.map(play, _chunks(batch, per_share))
                if here.opened is not None:
                    played = [trajectory for share in shares for trajectory in share]
                    for trajectories in _chunks(played, per_batch * section.rollouts_per_task):
                        _write_down(_batch_file(here.opened), trajectories)
                        state = _store_batch(here.opened, parts)
                        bar.set_postfix(success=f"{state['successes'] / state['episodes']:.1%}", refresh=False)
                        bar.update(state["tasks"] - bar.n)
                learn(memory, processes)  # all wait until the batch is stored, because the next one may recall it
        if here.opened is not None:
            state = here.opened.state
            failed = f", {state['errors']} ended in an error" if state["errors"] else ""
            here.say(
                f"collect: {state['successes']} of {state['episodes']} episodes succeeded{failed}, on "
                f"{state['tasks']} {parts.collected_split} tasks; "
                f"{parts.bank.path} has {len(parts.bank)} trajectories"
            )
            _check_use(here)


def _check_use(here: Phase) -> None:
    """Refuse to go on from episodes that all failed."""
    if here.opened is None or not (state := here.opened.state).get("episodes"):
        return
    remedy = "mend that, and name a new run folder with run=FOLDER"
    if state["errors"] == state["episodes"]:
        cause = f", the last with: {state['last_error']}" if "last_error" in state else ""
        raise EpisodesError(f"collect: all {state['episodes']} episodes ended in an error{cause}; {remedy}")
    if state.get("unspoken", 0) == state["episodes"]:
        raise EpisodesError(
            f"collect: in none of {state['episodes']} episodes an agent spoke, so nothing can be learned; {remedy}"
        )


def _play(config: Config, parts: Parts, memory: Memory, tasks: list[Task]) -> list[Trajectory]:
    return rollout(
        parts.players,
        memory,
        parts.agents,
        tasks,
        parts.domain.start,
        sampling=parts.sampling,
        group_size=config.collect.rollouts_per_task,
        seed=stream_seed(config.seed, "collect"),
        max_turns=config.max_turns,
    ).trajectories


def _go_on_collecting(run: Run | None, parts: Parts, num_tasks: int) -> int:
    """Store a batch that was written but not counted when the last process died; return the number of tasks done."""
    assert run is not None
    done: int = run.state.get("tasks", 0)
    for counted in run.phase_folder.glob("batch-*.jsonl"):
        if counted != _batch_file(run):
            counted.unlink()
    if done < num_tasks:
        run.rewind_metrics("collect", done)
        if _batch_file(run).exists():
            done = _store_batch(run, parts)["tasks"]
    return done


def _batch_file(run: Run) -> Path:
    """Return the file for the batch that follows the counted ones."""
    return run.phase_folder / f"batch-{run.state.get('tasks', 0):06d}.jsonl"


def _write_down(path: Path, trajectories: list[Trajectory]) -> None:
    """Write a batch down; what the bank would refuse is refused before, or it would be read, and refused, for ever."""
    write_atomic(path, b"".join(canonical(trajectory) + b"\n" for trajectory in trajectories))


def _store_batch(run: Run, parts: Parts) -> dict[str, Any]:
    """Store and count the batch that was written to its file; return the counts."""
    path = _batch_file(run)
    rows = path.read_bytes().split(b"\n")[:-1]
    try:
        trajectories = [Trajectory.from_json(row, f"{path}:{i}") for i, row in enumerate(rows, 1)]
    except DataError as error:
        raise DataError(f"{error}; delete that file, and its tasks are played again") from None
    parts.bank.add(trajectories)
    state = {"tasks": 0, "episodes": 0, "successes": 0, "errors": 0, "unspoken": 0} | run.state
    successes = sum(t.success for t in trajectories)
    causes = [t.error for t in trajectories if t.error is not None]
    state["tasks"] += len(trajectories) // parts.config.collect.rollouts_per_task
    state["episodes"] += len(trajectories)
    state["successes"] += successes
    state["errors"] += len(causes)
    state["unspoken"] += sum(not t.messages for t in trajectories)
    if causes:
        state["last_error"] = causes[-1]
    run.log(
        {
            "step": state["tasks"],
            "episodes": len(trajectories),
            "successes": successes,
            "reward": sum(t.reward for t in trajectories) / len(trajectories),
            "errors": len(causes),
            "stored": len(parts.bank),
        }
    )
    run.state = state
    path.unlink()
    return state


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
