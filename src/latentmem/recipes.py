"""The main path, read from top to bottom: collect -> sft -> lmpo -> evaluate -> report; grpo is its rival.

This is the only place that sees a whole configuration and the only one that chooses by name; it builds the parts from
their sections and lets them run.
"""

import hashlib
import json
import logging
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import fields
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_args

import torch
from transformers import PreTrainedModel

from latentmem.bank import ExperienceBank
from latentmem.carrying import measure_carried, roles_of_teams, scorable
from latentmem.config import (
    RIVALS,
    CodeSection,
    Config,
    GRPOSection,
    HiddenFactsSection,
    LMPOSection,
    MemorySection,
    MixPart,
    MixSection,
    OptimizerFields,
    PDDLSection,
    QASection,
    ReasoningSection,
    RivalsSection,
    SFTSection,
    WarmupSection,
    dump_config,
    is_parametric,
    needs_bank,
    parse_config,
    split_control,
)
from latentmem.environments.code import CodeDomain
from latentmem.environments.environment import Demonstrator, Domain, Split
from latentmem.environments.hidden_facts import HiddenFactsDomain
from latentmem.environments.mix import MixDomain, Part
from latentmem.environments.pddl import PDDLDomain
from latentmem.environments.qa import QADomain
from latentmem.environments.reasoning import ReasoningDomain
from latentmem.environments.search import SearchDomain
from latentmem.errors import BankError, CheckpointError, ConfigError, DataError, RunError, TrainingError, suggest
from latentmem.evaluation import check_online, evaluate, file_stem, forget
from latentmem.kept_latents import SUFFIX, read_latents
from latentmem.kept_readings import READING_SUFFIX, LatentReading, readings_as_json
from latentmem.latent_reading import format_reading, leave_out_each, read_out
from latentmem.memory.checkpoints import kind_of, weights_file
from latentmem.memory.composer import FIELDS, Composer
from latentmem.memory.controls import (
    ControlMemory,
    Replace,
    another_of,
    corrupted,
    empty,
    filler,
    irrelevant,
    other_role,
    random_latents,
    shuffled,
    zero_latents,
)
from latentmem.memory.graph import Graph
from latentmem.memory.insights import Insights
from latentmem.memory.latent import LatentMemory
from latentmem.memory.learned import LearnedMemory, Method, Scribe, Similarity
from latentmem.memory.memory import Ledger, Memory, NoMemory
from latentmem.memory.parametric import ParametricMemory
from latentmem.memory.rating import Rater, check_rating_template
from latentmem.memory.stream import Stream
from latentmem.memory.summaries import Summaries
from latentmem.memory.text import TextMemory
from latentmem.models.embedder import Embedder
from latentmem.models.language_model import LanguageModel, Sampling, stream_seed
from latentmem.models.sharding import shard
from latentmem.processes import Processes, sharding_asked
from latentmem.progress import progress
from latentmem.prompts import format_prompts
from latentmem.report import format_table, write_report
from latentmem.rollout import rollout
from latentmem.runs import Run, write_atomic
from latentmem.teams.team import load_team, team_file
from latentmem.teams.turn import Team, Teams
from latentmem.templates import check_template
from latentmem.training.demonstrations import Demonstration, demonstrate, read_demonstrations
from latentmem.training.lmpo import LMPOSettings, LMPOTrainer
from latentmem.training.optimization import (
    Optimization,
    Trained,
    newest_checkpoint,
    remove_others,
    selected_checkpoint,
)
from latentmem.training.policies import AgentsPolicy, LatentPolicy, Policy
from latentmem.training.sft import SFTSettings, SFTTrainer
from latentmem.training.warmup import WarmupSettings, WarmupTrainer
from latentmem.trajectory import Recalled, Task, Trajectory

logger = logging.getLogger(__name__)
T = TypeVar("T")


def _questions(section: QASection) -> Domain:
    questions = QADomain(
        schema=section.schema_, train=section.train, test=section.test, instructions=section.instructions
    )
    return questions if section.search is None else SearchDomain(questions, section.search)


def _parts_of_mix(parts: Sequence[MixPart]) -> list[Part]:
    return [Part(DOMAINS[type(part.data)](part.data), part.max_turns) for part in parts]


DOMAINS: dict[type, Callable[[Any], Domain]] = {
    ReasoningSection: lambda s: ReasoningDomain(
        families=s.families,
        train_size=s.train_size,
        test_size=s.test_size,
        seed=s.seed,
        instructions=s.instructions,
    ),
    QASection: _questions,
    CodeSection: lambda s: CodeDomain(
        schema=s.schema_,
        train=s.train,
        test=s.test,
        sandbox=s.sandbox,
        prompt=s.prompt,
        instructions=s.instructions,
    ),
    PDDLSection: lambda s: PDDLDomain(
        worlds=s.worlds,
        size=s.size,
        train_size=s.train_size,
        test_size=s.test_size,
        seed=s.seed,
        path=s.path,
        instructions=s.instructions,
    ),
    HiddenFactsSection: lambda s: HiddenFactsDomain(**{key: value for key, value in s if key != "kind"}),
    MixSection: lambda s: MixDomain(_parts_of_mix(s.train), _parts_of_mix(s.test)),
}


def _check_roles(data: Any, teams: Sequence[Team]) -> None:
    """Refuse data that judge a role which a team does not have."""
    sections = [part.data for part in (*data.train, *data.test)] if isinstance(data, MixSection) else [data]
    for section in sections:
        for role in section.needs if isinstance(section, HiddenFactsSection) else ():
            for team in teams:
                known = [member.name for member in team.roles]
                if role not in known:
                    raise ConfigError(f"data.needs: team {team.name} has no role {role!r}; {suggest(role, known)}")


EVALUATIONS = {"test": "evaluate", "dev": "evaluate-dev"}
"""The phase, and so the folder, of an evaluation of each split: neither is held to how the other was started."""
RESULTS = {"test": "results.json", "dev": "results-dev.json"}
"""The file of the results of each split."""
_MEASURED = 32
"""Tasks whose right responses tell what a memory carries, where the data demonstrate them."""
_READ_TASKS = 3
"""Tasks of an evaluation whose latents are read out."""
_LOOKED_AT = 64
"""Failures of a bank that are read to see whether they hold feedback."""
_SETUP = ("seed", "team", "max_turns", "data", "model", "composer", "bank", "memory", "rivals", "sampling")
"""Sections that matter to every phase but the warm-up."""
_WARMUP_SETUP = ("seed", "team", "model", "composer", "memory")
"""Sections that matter to the warm-up, which reads neither data nor bank and plays nothing."""


def collect(config: Config, parts: "_Parts | None" = None) -> None:
    """Play the experience split, or the train split where there is none; store every trajectory, failures too.

    A batch is written down before it is stored, so that one which was stored but not yet counted when the process died
    is not played again, with a memory that holds it already, but taken from there.
    """
    with _phase(config, "collect", parts) as (processes, parts, run):
        section = config.collect
        tasks = parts.collected_tasks[: section.num_tasks]
        done = processes.from_first(lambda: _go_on_collecting(run, parts, len(tasks)))
        if done == len(tasks):
            if run is not None:
                _say(
                    f"collect: finished already, {done} {parts.collected_split} tasks; "
                    f"the bank has {len(parts.bank)} trajectories"
                )
            return
        memory = parts.memory("latent:untrained" if section.memory == "latent" else section.memory)
        _learn(memory, processes)
        play = partial(_play, config, parts, memory)
        per_batch = max(1, section.batch_size // section.rollouts_per_task)
        # Without memory no batch depends on another, and whole ones are dealt out: each is the same computation whoever
        # plays it. With memory a batch recalls what the one before it stored, and the tasks of one are dealt out.
        per_round = per_batch if section.memory != "none" else per_batch * processes.size
        with progress(len(tasks), "collect", "task", done, shown=run is not None) as bar:
            for start in range(done, len(tasks), per_round):
                batch = tasks[start : start + per_round]
                per_share = per_batch if section.memory == "none" else ceil(len(batch) / processes.size)
                shares = processes.map(play, _chunks(batch, per_share))
                if run is not None:
                    played = [trajectory for share in shares for trajectory in share]
                    for trajectories in _chunks(played, per_batch * section.rollouts_per_task):
                        _write_down(_batch_file(run), trajectories)
                        state = _store_batch(run, parts)
                        bar.set_postfix(success=f"{state['successes'] / state['episodes']:.1%}", refresh=False)
                        bar.update(state["tasks"] - bar.n)
                _learn(memory, processes)  # all wait until it is stored: the next batch may recall it
        if run is not None:
            state = run.state
            failed = f", {state['errors']} ended in an error" if state["errors"] else ""
            _say(
                f"collect: {state['successes']} of {state['episodes']} episodes succeeded{failed}, on "
                f"{state['tasks']} {parts.collected_split} tasks; "
                f"{parts.bank.path} has {len(parts.bank)} trajectories"
            )


def train_warmup(config: Config, parts: "_Parts | None" = None) -> None:
    """Let agents and composer learn to pass words on, before any data."""
    with _phase(config, "warmup", parts) as (processes, parts, run):
        section = config.warmup
        if _is_finished(config, "warmup", section.copy_steps, run, section.frame_steps):
            return
        trainer = WarmupTrainer(
            parts.composer(),
            parts.model,
            parts.train_teams,
            partial(
                Optimization,
                processes=processes,
                schedule="constant",
                warmup_steps=0,
                max_grad_norm=section.max_grad_norm,
                weight_decay=0.0,
            ),
            processes,
            WarmupSettings(**_fields(WarmupSettings, section)),
            seed=stream_seed(config.seed, "warmup"),
        )
        done = _warmup_steps_done(_checkpoints(config, "warmup"), section.frame_steps)
        _train(config, "warmup", run, trainer.train, section.frame_steps + section.copy_steps, "loss", done)


def train_sft(config: Config, parts: "_Parts | None" = None) -> None:
    """Warm the composer up on the bank's successes, or on demonstrations."""
    with _phase(config, "sft", parts) as (processes, parts, run):
        if _is_finished(config, "sft", config.sft.num_steps, run):
            return
        initial = parts.initial(config.sft.initial)
        if config.sft.demonstrations == "bank":
            aside = parts.held_out_tasks(config.sft)
        else:
            aside = parts.eval_tasks("sft", config.sft)
        if not len(parts.bank):
            raise TrainingError(f"{parts.bank.path} is empty; run `latentmem collect` with this configuration first")
        learned, held_out = _lessons(parts, aside)
        memory = parts.latent_memory()
        if initial is not None:
            memory.composer.load_weights(initial)
        trainer = SFTTrainer(
            memory,
            parts.model,
            learned,
            held_out,
            parts.train_teams,
            _optimization(parts, memory.composer, config.sft, processes, config.sft.projection_rate),
            processes,
            SFTSettings(**_fields(SFTSettings, config.sft)),
            seed=stream_seed(config.seed, "sft"),
            carried=parts.carried_by(memory, held_out, "sft", processes),
        )

        def log_tasks(rows: list[dict[str, Any]]) -> None:
            if run is not None:
                run.log_details(_DEV, rows)

        train = partial(trainer.train, log_tasks=log_tasks)
        _train(config, "sft", run, train, config.sft.num_steps, "loss")


def _lessons(parts: "_Parts", aside: list[Task]) -> tuple[list[Trajectory], list[Trajectory]]:
    """What SFT learns from, and what it is held to.

    Whole tasks are set aside, so that no episode of theirs is learned from.
    """
    keys = {task.key for task in aside}
    shown = parts.demonstrated([*parts.train_tasks, *aside])
    if shown is None:
        experience = {task.key for task in parts.tasks["experience"]}
        stored = [t for t in parts.bank if t.task.key not in experience]
        if not stored:
            raise TrainingError(
                f"{parts.bank.path} holds episodes of experience tasks only, which are recalled and not trained on; "
                "set sft.demonstrations to what is to be learned"
            )
        return [t for t in stored if t.task.key not in keys], [t for t in stored if t.task.key in keys]
    train = [one for one in shown if one.task.key not in keys]
    if not train:
        raise TrainingError(
            f"sft.demonstrations is {parts.config.sft.demonstrations}: there is none of a train task that is trained "
            f"on, of {len(shown)} in all; add some, or set sft.eval_tasks lower"
        )
    return parts.act_out(train), parts.act_out([one for one in shown if one.task.key in keys])


def train_lmpo(config: Config, parts: "_Parts | None" = None) -> None:
    """Train the composer on the team's reward."""
    with _phase(config, "lmpo", parts) as (processes, parts, run):
        if _is_finished(config, "lmpo", config.lmpo.num_steps, run):
            return
        initial = parts.initial(config.lmpo.initial)
        aside = parts.eval_tasks("lmpo", config.lmpo)
        memory = parts.latent_memory()
        if initial is not None:
            memory.composer.load_weights(initial)
        optimization = _optimization(parts, memory.composer, config.lmpo, processes, config.lmpo.projection_rate)
        policy = LatentPolicy(memory, parts.model)
        held_out = parts.shown(aside, parts.players)
        if held_out is None:
            held_out = parts.bank.get(id_ for task in aside for id_ in parts.bank.ids_of(task))
        carried = parts.carried_by(memory, held_out, "lmpo", processes) if aside else None
        _reinforce(parts, "lmpo", config.lmpo, policy, aside, optimization, processes, run, carried)


def train_grpo(config: Config, parts: "_Parts | None" = None) -> None:
    """Train a LoRA of the agents themselves on the team's reward, without memory."""
    with _phase(config, "grpo", parts) as (processes, parts, run):
        if _is_finished(config, "grpo", config.grpo.num_steps, run):
            return
        aside = parts.eval_tasks("grpo", config.grpo)
        memory = parts.parametric_memory()
        optimization = _optimization(parts, memory, config.grpo, processes)
        _reinforce(parts, "grpo", config.grpo, AgentsPolicy(memory), aside, optimization, processes, run)


def _reinforce(
    parts: "_Parts",
    phase: str,
    section: LMPOSection | GRPOSection,
    policy: Policy,
    aside: list[Task],
    optimization: Optimization,
    processes: Processes,
    run: Run | None,
    carried: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Train a policy on all train tasks but those set aside."""
    config = parts.config
    keys = {task.key for task in aside}
    trainer = LMPOTrainer(
        policy,
        parts.players,
        parts.domain.start,
        [task for task in parts.train_tasks if task.key not in keys],
        aside,
        optimization,
        processes,
        LMPOSettings(**_fields(LMPOSettings, section)),
        parts.sampling,
        max_turns=config.max_turns,
        seed=stream_seed(config.seed, phase),
        carried=carried,
    )
    _train(config, phase, run, trainer.train, section.num_steps, "reward")


def compare(config: Config, parts: "_Parts | None" = None) -> dict[str, Any]:
    """Evaluate each memory; write the results and, of the test split, the report; return the results."""
    results = play_test(config, parts)
    if Processes().is_first and config.evaluate.split == "dev":
        _say(format_table(results))
        _say(f"dev split, for choices: {Path(config.run) / RESULTS['dev']}")
    elif Processes().is_first:
        page = write_report([Path(config.run)])
        _say(format_table(results))
        _say(f"report: {page}")
    return results


def play_test(config: Config, parts: "_Parts | None" = None) -> dict[str, Any]:
    """Evaluate each memory on `evaluate.split`; write results.json, or that of the dev split; return the results."""
    phase = EVALUATIONS[config.evaluate.split]
    with _phase(config, phase, parts) as (processes, parts, run):
        section = config.evaluate
        tasks = parts.asked_tasks[: section.num_tasks]
        names = section.memories
        made = [parts.memory(name) for name in names]  # a missing checkpoint, or one that does not fit, is said now
        for memory in made:
            _learn(memory, processes, shown=True)
        if run is not None:
            _forget_outdated(run, {name: parts.inputs(name) for name in names})
        folder = Path(config.run) / phase
        copies = folder if section.online else None
        sampling = Sampling(
            section.temperature,
            parts.sampling.top_p,
            parts.sampling.top_k,
            section.max_response_tokens or parts.sampling.max_response_tokens,
        )
        with progress(len(tasks) * len(names), "evaluate", "task", shown=run is not None) as bar:

            def show(name: str, num_tasks: int, reward: float) -> None:
                bar.set_postfix(memory=name, reward=f"{reward:.3f}", refresh=False)
                bar.update(names.index(name) * len(tasks) + num_tasks - bar.n)

            results = evaluate(
                parts.team,
                parts.model,
                {name: partial(parts.memory, name, copies) for name in names},
                tasks,
                parts.domain.start,
                folder,
                sampling=sampling,
                seed=stream_seed(config.seed, "evaluate"),
                batch_size=section.batch_size,
                max_turns=config.max_turns,
                online=section.online,
                num_bootstraps=section.num_bootstraps,
                on_progress=show,
                processes=processes,
                bank=parts.bank if any(map(needs_bank, names)) else None,
                held_out=parts.shown(tasks[:_MEASURED], parts.team),
                starts={f"latent:{phase}": f"latent:{first}" for phase, first in initials(config).items()},
            )
        for row in results["memories"]:
            row["learning"] = parts.learning(row["name"], copies)
        results = {"run": config.run, "split": section.split, **results, "seed": config.seed}
        if run is not None:
            write_atomic(run.folder / RESULTS[section.split], json.dumps(results, indent=1, allow_nan=False) + "\n")
            for name in names:
                _write_reading(parts, name, folder, tasks)
        processes.wait()  # a composer that is spread over the processes needs the others to read out
    return results


def _write_reading(parts: "_Parts", name: str, folder: Path, tasks: Sequence[Task]) -> None:
    """What a latent memory's latents say at the first tasks whose latents were kept, as a file beside them.

    Those after training are read from what was kept, those before are composed again from the texts of the episodes.
    Roles that said nothing are left out.
    """
    path, kept_path = (folder / f"{file_stem(name)}{suffix}" for suffix in (READING_SUFFIX, SUFFIX))
    if path.exists() or not kept_path.exists():
        return
    try:
        kept = read_latents(kept_path)
    except RunError as error:  # the report tells it too; the results are no worse for it
        logger.warning("%s", error)
        return
    lines = (folder / f"{file_stem(name)}.jsonl").read_bytes().split(b"\n")
    place = {task.key: i for i, task in enumerate(tasks)}
    after: dict[str, dict[str, list[LatentReading]]] = {}
    texts: dict[tuple[str, str], str] = {}
    memory = parts.memory(name)
    assert isinstance(memory, LatentMemory)
    for row, key in enumerate(kept.tasks[:_READ_TASKS]):
        episode = Trajectory.from_json(lines[place[key]], f"{kept_path}")
        spoke = {message.role: message.recalled.text for message in episode.messages}
        texts |= {(key, role): text for role, text in spoke.items()}
        after[key] = {
            role: read_out(memory.composer, parts.model, torch.from_numpy(kept.latents[row, column]))
            for column, role in enumerate(kept.roles)
            if role in spoke
        }
    before = _before(parts.config, name)
    said = {} if before is None else parts.read_texts(before, list(texts.values()))
    read = {key: {role: (found, said.get(texts[key, role])) for role, found in after[key].items()} for key in after}
    write_atomic(path, json.dumps(readings_as_json(name, before, read), indent=1, allow_nan=False) + "\n")


def _before(config: Config, name: str) -> str | None:
    """What a latent memory was before it was trained on tasks: warmed up, untrained, or a folder; None if untrained."""
    if name == "latent:untrained":
        return None
    began = initials(config)
    phase = name.removeprefix("latent:")
    if phase not in began:
        return "latent:untrained"
    while phase in began:
        phase = began[phase]
    return f"latent:{phase}"


def show_prompts(config: Config, split: Split = "train", number: int = 1, memory: str | None = None) -> None:
    """Play one task and print exactly what each agent read, and where those words come from; nothing is stored.

    Args:
        config: the experiment.
        split: whose task.
        number: of the task in its split, from 1.
        memory: its name as in `evaluate.memories`; None is latent:untrained where the run has a bank, else none.

    Raises:
        ConfigError: the split has fewer tasks, or none.
        BankError: a memory of a bank that is not there.
    """
    parts = _Parts(config)
    task, which = _task_to_show(parts, split, number)
    has_bank = parts.bank_path.exists()
    name = memory or ("latent:untrained" if has_bank else "none")
    if needs_bank(name) and not has_bank:
        raise BankError(
            f"{parts.bank_path}: memory {name} needs a bank, and there is none yet; run `latentmem collect` with this "
            "configuration first, or show memory none"
        )
    num_turns = min(config.max_turns, 2)
    limit = parts.sampling.max_response_tokens
    with TemporaryDirectory() as scratch:
        chosen, learned = _shown_memory(parts, name, Path(scratch))
        rollouts = rollout(
            parts.team,
            chosen,
            parts.model,
            [task],
            parts.domain.start,
            sampling=Sampling(temperature=0, max_response_tokens=limit),
            max_turns=num_turns,
        )
    bank = f", of {len(parts.bank)} trajectories in {parts.bank_path}{learned}" if needs_bank(name) else ""
    latent = chosen.memory if isinstance(chosen, ControlMemory) else chosen
    composer = latent.composer if isinstance(latent, LatentMemory) else None
    spent = rollouts.spent
    asked = (
        f"To recall it, language models read {spent.prompt_tokens} tokens and wrote {spent.generated_tokens}.\n"
        if spent.prompt_tokens
        else ""
    )
    _say(
        f"{which}\n"
        f"memory {name}{bank}\n{asked}"
        f"The responses that others read are real: {parts.model.name}, greedy, at most {limit} tokens each; "
        f"{num_turns} of at most {config.max_turns} turns.\n\n"
        f"{format_prompts(parts.model, rollouts.trajectories[0], composer)}\n\n"
        f"{_origins(config, name)}{_templates(config, composer)}{_rivals_words(config, name)}"
    )


def _task_to_show(parts: "_Parts", split: Split, number: int) -> tuple[Task, str]:
    """A task by its number in a split, from 1, and how it is called.

    Raises:
        ConfigError: the split has fewer tasks, or none.
    """
    tasks = parts.tasks[split]
    if not tasks:
        having = ", ".join(name for name, found in parts.tasks.items() if found)
        raise ConfigError(f"a task of the {split} split is asked for, but these data have none; they have {having}")
    if number > len(tasks):
        raise ConfigError(
            f"task {number} of the {split} split is asked for, but it has {len(tasks)} tasks; give a number from 1 to "
            f"{len(tasks)}"
        )
    task = tasks[number - 1]
    return task, f"task {number} of {len(tasks)} in the {split} split: {task.key}"


def show_latents(config: Config, split: Split = "train", number: int = 1, memory: str | None = None) -> None:
    """Play one turn of a task and print what each latent says, said before training, and does; nothing is stored.

    Args:
        config: the experiment.
        split: whose task.
        number: of the task in its split, from 1.
        memory: a latent one, its name as in `evaluate.memories`; None is the one of this run that was trained last.

    Raises:
        ConfigError: the memory is no latent one; the split has fewer tasks, or none.
        BankError: there is no bank.
        CheckpointError: the memory was not trained yet.
    """
    name = memory or _trained_last(config)
    if not name.startswith("latent:") or split_control(name)[1] is not None:
        raise ConfigError(
            f"show latents: memory {name} has no latents of its own; name a latent one without a control, such as "
            "latent:untrained"
        )
    parts = _Parts(config)
    task, which = _task_to_show(parts, split, number)
    if not parts.bank_path.exists():
        raise BankError(
            f"{parts.bank_path}: memory {name} needs a bank, and there is none yet; run `latentmem collect` with this "
            "configuration first"
        )
    before = _before(config, name)
    chosen = parts.memory(name)  # a missing checkpoint is told before anything is composed
    assert isinstance(chosen, LatentMemory)
    texts = [record.text for record in chosen.records([(task, role) for role in parts.team.roles])]
    earlier = {} if before is None else parts.read_texts(before, texts)
    chosen = parts.memory(name)  # there is one composer, and it was the other's
    assert isinstance(chosen, LatentMemory)
    limit = parts.sampling.max_response_tokens
    greedy = Sampling(temperature=0, max_response_tokens=limit)
    played = rollout(parts.team, chosen, parts.model, [task], parts.domain.start, sampling=greedy)
    said = {message.role: message for message in reversed(played.trajectories[0].messages)}
    tables = []
    for role in parts.team.roles:
        recall = played.recalls[task.key, role.name]
        assert recall.latents is not None
        message = said.get(role.name)
        tables.append(
            format_reading(
                f"{role.name}  (memory {name}{f', before: {before}' if before else ''})",
                read_out(chosen.composer, parts.model, recall.latents),
                earlier.get(recall.record.text),
                leave_out_each(parts.model, message, recall.latents, limit) if message else [],
                message.response if message else "",
            )
        )
    _say(
        f"{which}\n"
        f"memory {name}, of {len(parts.bank)} trajectories in {parts.bank_path}\n"
        f"The responses are real: {parts.model.name}, greedy, at most {limit} tokens each, each role's first one.\n\n"
        + "\n\n".join(tables)
    )


def _trained_last(config: Config) -> str:
    """The latent memory of a run that is furthest trained."""
    done = [phase for phase in ("lmpo", "sft", "warmup") if selected_checkpoint(_checkpoints(config, phase))]
    return f"latent:{done[0] if done else 'untrained'}"


def _shown_memory(parts: "_Parts", name: str, scratch: Path) -> tuple[Memory, str]:
    """A memory to show, and where its notes are from; what it has not learned yet it learns for this page alone."""
    if name not in parts.methods:
        return parts.memory(name), ""
    memory = parts.learned(name, parts.bank, scratch)
    path, known, num_all = parts.notes_path(name), len(memory.learned), len(parts.bank)
    if known == num_all:
        return memory, f", as learned in {path}"
    _catch_up(memory)
    return memory, f"; {num_all - known} of them, which {path} lacks, were learned for this page and not kept"


def _origins(config: Config, memory: str) -> str:
    """Where the words of a prompt come from, and what replaces them."""

    def origin(value: str | None) -> str:
        return "built in" if value is None else "set in the configuration"

    own = "each part's own"
    how_to_answer = own if isinstance(config.data, MixSection) else origin(config.data.instructions)
    search = config.data.search if isinstance(config.data, QASection) else None
    how_to_search = [("and to search", "data.search.instructions", origin(search.instructions))] if search else []
    changed = [f"memory.{key}" for key, value in config.memory if value != getattr(MemorySection(), key)]
    rows = [
        ("the team's prompts", "team", str(team_file(config.team))),
        ("how to answer", "data.instructions", how_to_answer),
        *how_to_search,
        ("form of the chat", "model.name", f"the tokenizer of {config.model.name}"),
    ]
    if needs_bank(memory):
        words = "set in the configuration: " + ", ".join(changed) if changed else "built in"
        rows.append(("words of the memory", "memory", words))
    rated = memory in ("generative", "gmemory") or (
        needs_bank(memory) and split_control(memory)[0] not in RIVALS and config.bank.rating != "none"
    )
    if rated:
        rows.append(("how ratings are asked", "bank.rating_template", origin(config.bank.rating_template)))
        rows.append(("and its system prompt", "bank.rating_system", origin(config.bank.rating_system)))
    for section in _RIVALS_SECTIONS.get(memory, ()):
        same = getattr(config.rivals, section) == getattr(RivalsSection(), section)
        rows.append((f"what {memory} asks and tells", f"rivals.{section}", origin(None if same else "")))
    if memory.startswith("latent"):
        rows.append(("the composer's text", "composer.template", origin(config.composer.template)))
    table = [("what", "key that replaces it", "where it comes from now"), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    lines = [f"{what:{widths[0]}}  {key:{widths[1]}}  {where}" for what, key, where in table]
    return "\n".join(["==== where these words come from", *lines])


def _templates(config: Config, composer: Composer | None) -> str:
    """What the composer reads around what was retrieved, ready to be copied into a configuration."""
    if composer is None:
        return ""
    words = "\n".join(f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in config.memory)
    return f"\n\n==== the keys of memory\nmemory:\n{words}\n==== composer.template\n{composer.template}"


_RIVALS_SECTIONS = {
    "voyager": ["voyager"],
    "generative": ["generative"],
    "oagents": ["insights"],
    "gmemory": ["gmemory", "insights"],
}
"""The sections of `rivals` that each memory reads."""


def _rivals_words(config: Config, memory: str) -> str:
    """What a memory that learns asks and tells, ready to be copied into a configuration."""
    sections = {name: getattr(config.rivals, name).model_dump() for name in _RIVALS_SECTIONS.get(memory, ())}
    if not sections:
        return ""
    lines = [
        f"  {name}:\n" + "\n".join(f"    {key}: {json.dumps(v, ensure_ascii=False)}" for key, v in values.items())
        for name, values in sections.items()
    ]
    return "\n\n==== the keys of rivals\nrivals:\n" + "\n".join(lines)


def quickstart(config: Config) -> None:
    """The whole main path; its phases share the model, the embedder and the bank."""
    processes = Processes()
    with processes.one_fate():
        parts = _Parts(config)
    phases: list[tuple[str, Callable[[Config, _Parts], object]]] = [
        ("collect: the team plays without memory; the bank fills", collect),
        ("warmup: the agents learn to read a slot, whatever word is in it", train_warmup),
        ("sft: the composer learns from right responses", train_sft),
        ("lmpo: the composer learns from the team's reward", train_lmpo),
        ("evaluate: memories compared on held-out tasks", compare),
    ]
    for title, recipe in phases:
        if recipe is train_warmup and "warmup" not in (config.sft.initial, config.lmpo.initial):
            continue
        if processes.is_first:
            _say(f"\n== {title}")
        recipe(config, parts)


class Shared:
    """What the runs of one process have in common: of equal settings each model, embedder and domain is made once."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def parts(self, config: Config) -> "_Parts":
        """What the phases of a run are made of; to be closed before another's, for one backbone carries one composer.

        Raises:
            LatentMemError: a mistake in what is cheap to make: the team, the templates, the data.
        """
        return _Parts(config, self)

    def get(self, make: Callable[[], T], *settings: Any) -> T:
        """What was made of equal settings before, or now."""
        key = repr(settings)
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


class _Parts:
    """What the phases are made of.

    Cheap parts are made at once, so that a mistake in them is said before a model is loaded; the others when they are
    first asked for, once.
    """

    def __init__(self, config: Config, shared: Shared | None = None) -> None:
        self.config = config
        self.shared = shared or Shared()
        self.sharding = sharding_asked()
        self.team = load_team(config.team)
        self.train_teams: tuple[Team, ...] = tuple(map(load_team, config.train_teams)) or (self.team,)
        self.players = Teams(self.train_teams, config.seed) if config.train_teams else self.team
        _check_roles(config.data, (self.team, *self.train_teams))
        if config.composer.template is not None:
            check_template(config.composer.template, FIELDS, "composer.template")
        if config.bank.rating_template is not None:
            check_rating_template(config.bank.rating_template)
        self.domain: Domain = self.shared.get(lambda: DOMAINS[type(config.data)](config.data), config.data)
        found: dict[Split, list[Task]] = {split: self.domain.tasks(split) for split in get_args(Split)}
        needed: tuple[Split, ...] = ("train", "test")
        for split in needed:
            if not found[split]:
                raise DataError(f"data: the {split} split is empty; expected at least one task")
        if config.sft.demonstrations == "domain" and not isinstance(self.domain, Demonstrator):
            raise ConfigError(
                f"sft.demonstrations is domain, but data of kind {config.data.kind} demonstrates nothing; set it to "
                "bank, or to a .jsonl file of demonstrations"
            )
        self.tasks = _with_experience(found, config.bank.experience_tasks)
        """Of each split; of experience and dev there may be none."""
        self.train_tasks = self.tasks["train"]
        self._has_warned = False
        section = config.sampling
        self.sampling = Sampling(section.temperature, section.top_p, section.top_k, section.max_response_tokens)

    @property
    def collected_split(self) -> Split:
        """What is played into the bank."""
        return "experience" if self.tasks["experience"] else "train"

    @property
    def collected_tasks(self) -> list[Task]:
        """Its tasks."""
        return self.tasks[self.collected_split]

    @cached_property
    def asked_tasks(self) -> list[Task]:
        """The tasks that memories are evaluated on."""
        if self.config.evaluate.split == "test" or self.tasks["dev"]:
            return self.tasks[self.config.evaluate.split]
        if self.config.lmpo.eval_every is None:
            logger.warning(
                "evaluate.split is dev, and these data have no dev split: the last %d train tasks are taken, which "
                "lmpo trains on too unless lmpo.eval_every is set",
                self.config.lmpo.eval_tasks,
            )
        return _last(self.train_tasks, self.config.lmpo.eval_tasks, "lmpo.eval_tasks", "train")

    @cached_property
    def model(self) -> LanguageModel:
        """The agents."""
        return self._load("agents", self.config.model.name)

    def _load(self, use: str, name: str) -> LanguageModel:
        section = self.config.model
        place = _spread if self.sharding == "fsdp" else None
        return self.shared.get(
            lambda: LanguageModel.from_pretrained(name, section.device, section.dtype, section.max_batch_size, place),
            use,
            name,
            section,
        )

    @cached_property
    def embedder(self) -> Embedder:
        """What the bank searches with."""
        name = self.config.bank.embedder
        return self.shared.get(lambda: Embedder(name), "embedder", name)

    @property
    def bank_path(self) -> Path:
        """Where the run's bank is, or the one that the configuration names."""
        return Path(self.config.bank.path or Path(self.config.run) / "bank.sqlite")

    @cached_property
    def bank(self) -> ExperienceBank:
        """The run's bank, or the one that the configuration names."""
        return self._open_bank(self.bank_path)

    @cached_property
    def _composer(self) -> tuple[Composer, dict[str, torch.Tensor]]:
        """The one composer, and its weights as they were untrained."""
        section = self.config.composer
        base = self.model if section.model is None else self._load("composer", section.model)
        composer = Composer(
            base,
            self.model,
            num_latents=section.num_latents,
            rank=section.rank,
            alpha=section.alpha,
            target_modules=section.target_modules,
            template=section.template,
            max_prompt_tokens=section.max_prompt_tokens,
            initial_scale=section.initial_scale,
            slots=section.slots,
            sharpness=section.sharpness,
            cue=section.cue,
            seed=stream_seed(self.config.seed, "composer"),
            words=self.config.memory,
        )
        return composer, _copied(composer)

    def close(self) -> None:
        """Let go of the bank and of the backbone; these parts are of no use afterwards."""
        made = vars(self)
        if "bank" in made:
            self.bank.close()
        if "_composer" in made:
            self._composer[0].detach()
        if "_parametric" in made:
            self._parametric[0].detach()

    def memory(self, name: str, copies: Path | None = None) -> Memory:
        """A memory by its name in the configuration; over a copy of the bank, kept in the folder `copies`, if given."""
        if name == "none":
            return NoMemory()
        if is_parametric(name):
            parametric = self.parametric_memory()
            parametric.load_weights(self.checkpoint(name))
            return parametric
        real, control = split_control(name)
        if control is not None:
            replace = self._replace(control)  # a mistake in it is told before a model is loaded
        bank = self.bank if copies is None else self._bank_copy(copies / f"{file_stem(name)}.sqlite")
        if name in self.methods:
            return self.learned(name, bank, copies)
        section, ledger = self.config.bank, Ledger()
        memories: Mapping[str, Callable[[], LatentMemory | TextMemory]] = {
            "text": lambda: TextMemory(
                self._recalling(bank),
                section.num_retrieved,
                section.only_successes,
                self._rater(ledger),
                self.config.memory,
                ledger,
            ),
            "metagpt": lambda: TextMemory(
                self._recalling(bank), section.num_retrieved, section.only_successes, words=self.config.memory
            ),
            "latent:untrained": lambda: self.latent_memory(bank),
        }
        if real in memories:
            memory = memories[real]()
        else:
            checkpoint = self.checkpoint(real.removeprefix("latent:"))
            memory = latent = self.latent_memory(bank)
            latent.composer.load_weights(checkpoint)
        return memory if control is None else ControlMemory(memory, replace)

    def _replace(self, control: str) -> Replace:
        seed = stream_seed(self.config.seed, control)
        controls: Mapping[str, Callable[[], Replace]] = {
            "empty": empty,
            "shuffle": lambda: shuffled(seed),
            "irrelevant": lambda: irrelevant(another_of(self.asked_tasks, seed)),
            "corrupt": lambda: corrupted(seed),
            "filler": filler,
            "other-role": lambda: other_role(self.team.roles),
            "random": lambda: random_latents(seed),
            "zero": zero_latents,
        }
        return controls[control]()

    @cached_property
    def _parametric(self) -> tuple[ParametricMemory, dict[str, torch.Tensor]]:
        """The one adapter of the agents, and its weights as they were untrained."""
        section = self.config.grpo
        memory = ParametricMemory(
            self.model,
            rank=section.rank,
            alpha=section.alpha,
            target_modules=section.target_modules,
            seed=stream_seed(self.config.seed, "grpo"),
        )
        return memory, _copied(memory)

    def parametric_memory(self) -> ParametricMemory:
        """Agents with an untrained adapter. There is one: the memory made last is the one to use."""
        memory, untrained = self._parametric
        _restore(memory, untrained)
        return memory

    def composer(self) -> Composer:
        """The one composer, untrained again."""
        composer, untrained = self._composer
        _restore(composer, untrained)
        return composer

    def latent_memory(self, bank: ExperienceBank | None = None) -> LatentMemory:
        """Latent memory with an untrained composer. There is one composer: the memory made last is the one to use."""
        section, ledger = self.config.bank, Ledger()
        return LatentMemory(
            self._recalling(bank or self.bank),
            self.composer(),
            section.num_retrieved,
            section.only_successes,
            rate=self._rater(ledger),
            ledger=ledger,
        )

    def read_texts(self, name: str, texts: Sequence[str]) -> dict[str, list[LatentReading]]:
        """What the latents say that a latent memory composes from each text. The composer is that memory's then."""
        memory = self.memory(name)
        assert isinstance(memory, LatentMemory)
        records = [Recalled(kind=memory.kind, text=text) for text in texts]
        found = {recall.record.text: recall.latents for recall in memory.compose(records)}
        return {
            text: read_out(memory.composer, self.model, latents)
            for text, latents in found.items()
            if latents is not None
        }

    @property
    def methods(self) -> Mapping[str, Callable[[Ledger], Method]]:
        """The memories that learn with a language model's help, by name; each is given where to write its expenses."""
        section, words = self.config.rivals, self.config.memory
        k, only = self.config.bank.num_retrieved, self.config.bank.only_successes

        def scribe(ledger: Ledger) -> Scribe:
            return Scribe(self.model, ledger, section.max_response_tokens, section.max_episode_characters)

        def stream(ledger: Ledger) -> Method:
            prompt, system = section.generative.importance, section.generative.importance_system
            limit = self.config.bank.rating_max_tokens
            importance = Rater(self.model, prompt, limit, system=system, words=words, ledger=ledger, needed=["episode"])
            raters = {"model": self.model.name, "rating_max_tokens": limit}
            return Stream(
                self._relevance(ledger), importance, k, section.generative, words, raters, only_successes=only
            )

        return {
            "voyager": lambda ledger: Summaries(
                scribe(ledger), Similarity(self.embedder), k, section.voyager, words, only_successes=only
            ),
            "generative": stream,
            "oagents": lambda ledger: Insights(scribe(ledger), k, section.insights, words, only_successes=only),
            "gmemory": lambda ledger: Graph(
                scribe(ledger),
                Similarity(self.embedder),
                self._relevance(ledger),
                k,
                section.gmemory,
                section.insights,
                words,
                only_successes=only,
            ),
        }

    def notes_path(self, name: str) -> Path:
        """Where a memory that learns keeps what it has learned from the bank."""
        return Path(self.config.run) / "memories" / f"{name}.json"

    def learning(self, name: str, copies: Path | None = None) -> dict[str, Any] | None:
        """What a memory that learns has spent on it, and from how many trajectories; None for the others."""
        if name not in self.methods:
            return None
        memory = self.learned(name, self.bank, copies)
        return {"num_trajectories": len(memory.learned), **memory.costs}

    def learned(self, name: str, bank: ExperienceBank, copies: Path | None = None) -> LearnedMemory:
        """A memory that learns, with its notes; with a copy of them, kept in the folder `copies`, if given."""
        path = self.notes_path(name)
        if copies is not None:
            copy = copies / path.name
            if path.exists() and not copy.exists():
                write_atomic(copy, path.read_bytes())
            path = copy
        ledger = Ledger()
        return LearnedMemory(
            self._recalling(bank), self.methods[name](ledger), path, ledger, self.config.rivals.batch_size
        )

    def _rater(self, ledger: Ledger) -> Rater | None:
        """How candidates are rated before they are recalled, if they are."""
        return None if self.config.bank.rating == "none" else self._relevance(ledger)

    def _relevance(self, ledger: Ledger) -> Rater:
        """A new one for each memory: it keeps its ratings, and of memories that are compared each pays for its own."""
        section = self.config.bank
        return Rater(
            self.model,
            section.rating_template,
            section.rating_max_tokens,
            system=section.rating_system,
            words=self.config.memory,
            ledger=ledger,
        )

    def demonstrated(self, tasks: Sequence[Task]) -> list[Demonstration] | None:
        """Demonstrations of some tasks, as `sft.demonstrations` says; None where the bank's successes are learned.

        Raises:
            DataError: a row that cannot be used.
        """
        source = self.config.sft.demonstrations
        if source == "bank":
            return None
        if source == "domain":
            assert isinstance(self.domain, Demonstrator)
            return _told_by(self.domain, tasks)
        keys = {task.key for task in tasks}
        known = [task for split in get_args(Split) for task in self.domain.tasks(split)]
        roles = {role.name for team in (*self.train_teams, self.team) for role in team.roles}
        return [one for one in read_demonstrations(Path(source), known, roles) if one.task.key in keys]

    def shown(self, tasks: Sequence[Task], players: Team | Teams) -> list[Trajectory] | None:
        """The right responses to some tasks; None where the data cannot tell them of every role that speaks."""
        if not isinstance(self.domain, Demonstrator):
            return None
        shown = _told_by(self.domain, tasks)
        teams = players.teams if isinstance(players, Teams) else (players,)
        roles = {role.name for team in teams for role in team.roles}
        if any("" not in one.said and not roles <= one.said.keys() for one in shown):
            return None
        return self.act_out(shown, players)

    def act_out(self, shown: Sequence[Demonstration], players: Team | Teams | None = None) -> list[Trajectory]:
        """Demonstrations as trajectories, by default of the teams that train."""
        players = players or self.players
        return [
            demonstrate(
                players.of(one.task) if isinstance(players, Teams) else players,
                one.task,
                self.domain.start(one.task).instructions,
                one.said,
                self.model,
                one.where,
            )
            for one in shown
        ]

    def initial(self, which: str) -> Path | None:
        """The checkpoint that a training starts from; None where it starts untrained."""
        return None if which == "untrained" else self.checkpoint(which)

    def checkpoint(self, which: str) -> Path:
        """What a phase of this run selected, or the folder itself."""
        if which not in ("warmup", "sft", "lmpo", "grpo"):
            return Path(which.removeprefix("grpo:"))
        folder = _checkpoints(self.config, which)
        found = selected_checkpoint(folder)
        if found is None:
            raise CheckpointError(
                f"{self.config.run}: no checkpoint of {which} here; "
                f"run `latentmem train {which}` with this configuration first"
            )
        sections = self.config
        lengths = {
            "warmup": sections.warmup.copy_steps,
            "sft": sections.sft.num_steps,
            "lmpo": sections.lmpo.num_steps,
            "grpo": sections.grpo.num_steps,
        }
        steps, wanted = _steps_done(folder), lengths[which]
        if steps < wanted:
            logger.warning("%s has done %d of its %d steps; its checkpoint so far is used", which, steps, wanted)
        return found

    def inputs(self, name: str) -> str:
        """What a memory is made of: how much the bank holds, what was learned from it, weights that were trained."""
        if name == "none":
            return ""
        if is_parametric(name):
            return f"weights {_digest(self.checkpoint(name))}"
        which = split_control(name)[0].removeprefix("latent:")
        bank = f"bank of {len(self.bank)}"
        if name in self.methods:
            return f"{bank}, notes {self.learned(name, self.bank).digest}"
        if which in ("text", "metagpt", "untrained"):
            return bank
        return f"{bank}, weights {_digest(self.checkpoint(which))}"

    def eval_tasks(self, name: str, section: OptimizerFields) -> list[Task]:
        """Tasks for choosing checkpoints: the first of the dev split, or the last train tasks where there is none."""
        count = section.eval_tasks if section.eval_every else 0
        if self.tasks["dev"]:
            return self.tasks["dev"][:count]
        return _last(self.train_tasks, count, f"{name}.eval_tasks", "train")

    def held_out_tasks(self, section: SFTSection) -> list[Task]:
        """The last train tasks: SFT needs episodes of what it sets aside, and dev tasks are not played."""
        count = section.eval_tasks if section.eval_every else 0
        return _last(self.train_tasks, count, "sft.eval_tasks", "train")

    def _recalling(self, bank: ExperienceBank) -> ExperienceBank:
        """The bank; where only its successes are recalled, a warning, once, if that leaves out what matters."""
        if self._has_warned or not self.config.bank.only_successes:
            return bank
        info = bank.info()
        num_failures = info.num_trajectories - info.num_successes
        if num_failures and not info.num_successes:
            logger.warning(
                "%s: all %d stored episodes are failures, so nothing is ever recalled; set bank.only_successes to "
                "false to recall failures too",
                bank.path,
                num_failures,
            )
            self._has_warned = True
        elif num_failures > info.num_successes and _any_feedback(bank.newest(_LOOKED_AT, success=False)):
            logger.warning(
                "%s: %d of %d stored episodes are failures and never recalled, nor is the feedback in them; set "
                "bank.only_successes to false to recall them too",
                bank.path,
                num_failures,
                info.num_trajectories,
            )
            self._has_warned = True
        return bank

    def carried_by(
        self, memory: LatentMemory, held_out: Sequence[Trajectory], phase: str, processes: Processes
    ) -> Callable[[], Mapping[str, float]] | None:
        """What measures, whenever it is called, what a memory carries; None where too few tasks have successes."""
        roles_of = roles_of_teams(self.train_teams)
        solved = scorable(held_out, self.model, roles_of)
        if len({trajectory.task.key for trajectory in solved}) < 2:
            if held_out:
                logger.warning("%s: the held-out tasks have too few successes to measure what latents carry", phase)
            return None

        def measure() -> Mapping[str, float]:
            with self.bank.frozen("training"):
                found = measure_carried(
                    memory,
                    self.model,
                    solved,
                    roles_of,
                    seed=stream_seed(self.config.seed, "carried"),
                    processes=processes,
                )
            return {} if found is None else found.metrics()

        return measure

    def _bank_copy(self, path: Path) -> ExperienceBank:
        assert self.bank.path.exists()
        if not path.exists():
            fresh = path.with_suffix(".fresh")
            fresh.unlink(missing_ok=True)
            try:
                # Closed before it is renamed: only then is all of it in the one file.
                with closing(sqlite3.connect(self.bank.path)) as source, closing(sqlite3.connect(fresh)) as target:
                    source.backup(target)
            except sqlite3.Error as error:
                raise BankError(
                    f"{fresh}: the bank cannot be copied here ({error}); free some space and run the same command again"
                ) from None
            fresh.rename(path)
        return self._open_bank(path)

    def _open_bank(self, path: Path) -> ExperienceBank:
        return ExperienceBank(path, self.embedder, embedder=self.embedder.name, index=self.config.bank.index)


@contextmanager
def _phase(config: Config, phase: str, parts: "_Parts | None") -> Iterator[tuple[Processes, "_Parts", Run | None]]:
    """What a phase works with: its processes, the parts, and the run, which only the first process opens.

    A mistake in one process ends all of them. One in the cheap parts is told before the run's folder is made.
    """
    processes = Processes()
    with processes.one_fate():
        parts = parts or _Parts(config)
        check_online(phase in EVALUATIONS.values() and config.evaluate.online, processes)
        with _open_run(config, phase, parts.domain) if processes.is_first else nullcontext() as run:
            processes.wait()  # what was found there is found by all
            if parts.sharding == "fsdp":  # all load it, also one that will be dealt nothing: each has to send its part
                logger.info("%s is spread over %d processes", parts.model.name, processes.size)
            yield processes, parts, run


def _spread(model: PreTrainedModel, device: torch.device) -> None:
    Processes().wait()  # a process that could not load its model says so here, before the others rely on it
    shard(model, device)


def _open_run(config: Config, phase: str, domain: Domain) -> Run:
    # Each memory is played on its own and keeps files of its own: others may join them.
    free = ["evaluate.memories"]
    if not _plays_itself(config, phase):
        free.append("team")
    skipped = {split: domain.skipped(split) for split in get_args(Split)}
    told = {split: counts for split, counts in skipped.items() if counts or split in ("train", "test")}
    sections = _sections(config, phase)
    data = config.model_dump(mode="json", by_alias=True)["data"]
    complete = partial(_completed, data, names=[*sections])
    return Run.open(Path(config.run), dump_config(config), phase, sections, told, free, complete)


def _completed(data: Any, sections: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The sections that a phase was started with, and others of `names`; missing keys are at their defaults.

    Data have none: a phase that does not keep its own takes those of now, which are not told.
    """
    try:
        values = parse_config({"run": "unnamed", "data": data, **sections}).model_dump(mode="json", by_alias=True)
    except ConfigError:  # they have a key that is no more, which then is told as the difference
        return sections
    return {key: values[key] for key in dict.fromkeys([*sections, *names])}


def _sections(config: Config, phase: str) -> dict[str, Any]:
    values = config.model_dump(mode="json", by_alias=True)
    keys = [
        *(_WARMUP_SETUP if phase == "warmup" else _SETUP),
        "evaluate" if phase in EVALUATIONS.values() else phase,
        *(["train_teams"] if config.train_teams else []),
    ]
    return {key: values[key] for key in keys}


def what_decides(config: Config, phase: str) -> dict[str, Any]:
    """Equal where a phase does the very same with the same bank."""
    sections = _sections(config, phase)
    if not _plays_itself(config, phase):
        del sections["team"]
    return sections


def initials(config: Config) -> dict[str, str]:
    """What each training of a composer starts from, as the configuration names it."""
    return {"sft": config.sft.initial, "lmpo": config.lmpo.initial}


def _plays_itself(config: Config, phase: str) -> bool:
    """Whether it is the team that plays in a phase, and not others in its place."""
    return phase in EVALUATIONS.values() or not config.train_teams


def _told_by(domain: Demonstrator, tasks: Sequence[Task]) -> list[Demonstration]:
    """What a domain demonstrates of some tasks, of each once."""
    different = {task.key: task for task in tasks}
    return [Demonstration(task, domain.demonstrations(task), key) for key, task in different.items()]


def _with_experience(found: Mapping[Split, list[Task]], count: int) -> dict[Split, list[Task]]:
    """The splits; where there is no experience split, the first `count` train tasks are one."""
    experience, train = found["experience"], found["train"]
    if count and experience:
        raise ConfigError(
            f"bank.experience_tasks is {count}, but these data have an experience split of their own, of "
            f"{len(experience)} tasks; set it to 0"
        )
    if count >= len(train):
        raise ConfigError(
            f"bank.experience_tasks is {count}, but the train split has {len(train)} tasks; "
            "set it lower, so that some are left to train on"
        )
    return {**found, "experience": experience or train[:count], "train": train[count:]}


def _last(tasks: list[Task], count: int, key: str, split: Split) -> list[Task]:
    if count >= len(tasks):
        raise ConfigError(
            f"{key} is {count}, but the {split} split has {len(tasks)} tasks; "
            "set it lower, so that some are left to train on"
        )
    return tasks[len(tasks) - count :]


def _any_feedback(trajectories: Sequence[Trajectory]) -> bool:
    return any(step.observation for trajectory in trajectories for step in trajectory.steps)


def _play(config: Config, parts: _Parts, memory: Memory, tasks: list[Task]) -> list[Trajectory]:
    return rollout(
        parts.players,
        memory,
        parts.model,
        tasks,
        parts.domain.start,
        sampling=parts.sampling,
        group_size=config.collect.rollouts_per_task,
        seed=stream_seed(config.seed, "collect"),
        max_turns=config.max_turns,
    ).trajectories


def _go_on_collecting(run: Run | None, parts: _Parts, num_tasks: int) -> int:
    """Store what was written down but not counted when the last process died; how many tasks are done."""
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
    """Where the batch that follows those counted is written down."""
    return run.phase_folder / f"batch-{run.state.get('tasks', 0):06d}.jsonl"


def _write_down(path: Path, trajectories: list[Trajectory]) -> None:
    lines = "".join(trajectory.to_json() + "\n" for trajectory in trajectories)
    write_atomic(path, lines.encode("utf-8", "surrogatepass"))


def _store_batch(run: Run, parts: _Parts) -> dict[str, Any]:
    """Store and count the batch that was written down; the counts."""
    path = _batch_file(run)
    rows = path.read_bytes().split(b"\n")[:-1]
    trajectories = [Trajectory.from_json(row, f"{path}:{i}") for i, row in enumerate(rows, 1)]
    parts.bank.add(trajectories)
    state = {"tasks": 0, "episodes": 0, "successes": 0, "errors": 0} | run.state
    successes = sum(t.success for t in trajectories)
    errors = sum(t.error is not None for t in trajectories)
    state["tasks"] += len(trajectories) // parts.config.collect.rollouts_per_task
    state["episodes"] += len(trajectories)
    state["successes"] += successes
    state["errors"] += errors
    run.log(
        {
            "step": state["tasks"],
            "episodes": len(trajectories),
            "successes": successes,
            "reward": sum(t.reward for t in trajectories) / len(trajectories),
            "errors": errors,
            "stored": len(parts.bank),
        }
    )
    run.state = state
    path.unlink()
    return state


def _learn(memory: Memory, processes: Processes, shown: bool = False) -> None:
    """Let a memory that learns catch up with the bank: the first process does, the others then read what it wrote."""
    if processes.is_first and isinstance(memory, LearnedMemory):
        _catch_up(memory, shown)
    processes.wait()
    if not processes.is_first and isinstance(memory, LearnedMemory):
        memory.learn()


def _catch_up(memory: LearnedMemory, shown: bool = True) -> None:
    num_all, known = len(memory.bank), len(memory.learned)
    with progress(num_all, f"{memory.kind} learns", "episode", known, shown and known < num_all) as bar:
        memory.learn(lambda num: bar.update(num - bar.n))


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _forget_outdated(run: Run, inputs: dict[str, str]) -> None:
    """Drop the trajectories of memories whose composer or bank has changed since they were evaluated."""
    before = run.state.get("inputs", {})
    for name, now in inputs.items():
        if before.get(name, now) != now:
            logger.warning("evaluate: %s has changed since it was evaluated; it is evaluated again", name)
            forget(run.phase_folder, name)
    run.state = {"inputs": before | inputs}


def _digest(checkpoint: Path) -> str:
    return hashlib.sha256(weights_file(checkpoint, kind_of(checkpoint)).read_bytes()).hexdigest()


def _copied(trained: Trained) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained.trainable().items()}


def _restore(trained: Trained, weights: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in trained.trainable().items():
        parameter.data.copy_(weights[name])


def _optimization(
    parts: _Parts,
    trained: Trained,
    section: SFTSection | LMPOSection | GRPOSection,
    processes: Processes,
    projection_rate: float = 1.0,
) -> Optimization:
    return Optimization(
        trained,
        processes,
        num_steps=section.num_steps,
        learning_rate=section.learning_rate,
        projection_rate=projection_rate,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        max_grad_norm=section.max_grad_norm,
        weight_decay=section.weight_decay,
        zero2=parts.sharding == "zero2",
    )


def _checkpoints(config: Config, phase: str) -> Path:
    return Path(config.run) / phase / "checkpoints"


def _steps_done(folder: Path) -> int:
    newest = newest_checkpoint(folder)
    return int(newest.name.removeprefix("step-")) if newest else 0


def _warmup_steps_done(folder: Path, frame_steps: int) -> int:
    """As the warm-up counts them: the copy's first row is that of step `frame_steps + 1`."""
    if newest_checkpoint(folder) is None:
        return _steps_done(folder / "frame")
    return frame_steps + 1 + _steps_done(folder)


def _is_finished(config: Config, phase: str, num_steps: int, run: Run | None, earlier_steps: int = 0) -> bool:
    """Whether a training is done, which is told; `earlier_steps` were done in a folder of their own."""
    folder = _checkpoints(config, phase)
    if newest_checkpoint(folder) is None or _steps_done(folder) < num_steps:
        return False
    if run is not None:
        remove_others(folder)
        _say(f"{phase}: finished already, {earlier_steps + num_steps} steps; {selected_checkpoint(folder)} is selected")
    return True


def _train(
    config: Config,
    phase: str,
    run: Run | None,
    train: Callable[[Path, Callable[[dict[str, Any]], None], Callable[[int], None]], object],
    num_steps: int,
    shown: str,
    done: int | None = None,
) -> None:
    folder = _checkpoints(config, phase)
    begun = _steps_done(folder) if done is None else done
    with progress(num_steps, phase, "step", begun, shown=run is not None) as bar:

        def log(metrics: dict[str, Any]) -> None:
            if run is not None:
                run.log(metrics)
                figures = {key: f"{metrics[key]:.3f}" for key in (shown, "eval_loss", "eval_reward") if key in metrics}
                bar.set_postfix(figures, refresh=False)
                bar.update(min(metrics["step"], num_steps) - bar.n)

        def rewind(step: int) -> None:
            if run is not None:
                run.rewind_metrics(phase, step)
                run.rewind_details(_DEV, step)

        train(folder, log, rewind)
    if run is not None:
        _say(f"{phase}: {num_steps} steps done; {selected_checkpoint(folder)} is selected")


def _fields(
    settings: type[LMPOSettings] | type[SFTSettings] | type[WarmupSettings], section: OptimizerFields | WarmupSection
) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in fields(settings)}


_DEV = "dev.jsonl"
"""In a phase's folder, how each task that was set aside did at each evaluated step."""


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
