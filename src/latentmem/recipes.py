"""The main path, read from top to bottom: collect -> sft -> lmpo -> evaluate -> report.

This is the only place that sees a whole configuration and the only one that chooses by name; it builds the parts from
their sections and lets them run.
"""

import logging
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latentmem.bank import ExperienceBank
from latentmem.config import CodeSection, Config, OptimizerFields, QASection, ReasoningSection, dump_config
from latentmem.environments.code import CodeDomain
from latentmem.environments.environment import Domain
from latentmem.environments.qa import QADomain
from latentmem.environments.reasoning import ReasoningDomain
from latentmem.errors import CheckpointError, DataError, RunError, TrainingError
from latentmem.evaluation import evaluate
from latentmem.memory.composer import Composer
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import Memory, NoMemory
from latentmem.memory.text import TextMemory
from latentmem.models.embedder import Embedder
from latentmem.models.language_model import LanguageModel, Sampling, stream_seed
from latentmem.report import format_table, write_report
from latentmem.rollout import rollout
from latentmem.runs import Run, write_atomic
from latentmem.teams.team import FixedTeam, load_team
from latentmem.training.lmpo import LMPOSettings, LMPOTrainer
from latentmem.training.optimization import Optimization, selected_checkpoint
from latentmem.training.processes import Processes
from latentmem.training.sft import SFTSettings, SFTTrainer
from latentmem.trajectory import Task

logger = logging.getLogger(__name__)

DOMAINS: dict[type, Callable[[Any], Domain]] = {
    ReasoningSection: lambda s: ReasoningDomain(
        families=s.families, train_size=s.train_size, test_size=s.test_size, seed=s.seed
    ),
    QASection: lambda s: QADomain(schema=s.schema_, train=s.train, test=s.test),
    CodeSection: lambda s: CodeDomain(schema=s.schema_, train=s.train, test=s.test, sandbox=s.sandbox),
}
_SETUP = ("seed", "team", "max_turns", "data", "model", "composer", "bank", "sampling")
"""Sections that matter to every phase."""


def collect(config: Config) -> None:
    """Play the train split and store every trajectory, failures too, in the bank."""
    with _phase(config, "collect", "collect") as run:
        parts = _Parts.of(config)
        section = config.collect
        tasks = parts.train_tasks[: section.num_tasks]
        memory = parts.memory(section.memory if section.memory != "latent" else "latent:untrained")
        state = {"tasks": 0, "episodes": 0, "successes": 0, "stored": 0} | run.state
        run.rewind_metrics("collect", state["tasks"])
        per_batch = max(1, section.batch_size // section.rollouts_per_task)
        with _progress(len(tasks), "collect", "task", state["tasks"]) as bar:
            for i in range(state["tasks"], len(tasks), per_batch):
                batch = tasks[i : i + per_batch]
                trajectories = rollout(
                    parts.team,
                    memory,
                    parts.model,
                    batch,
                    parts.domain.start,
                    sampling=parts.sampling,
                    group_size=section.rollouts_per_task,
                    seed=stream_seed(config.seed, "collect"),
                    max_turns=config.max_turns,
                ).trajectories
                added = parts.bank.add(trajectories)
                state["tasks"] += len(batch)
                state["episodes"] += len(trajectories)
                state["successes"] += sum(t.success for t in trajectories)
                reward = sum(t.reward for t in trajectories) / len(trajectories)
                run.log(
                    {
                        "step": state["tasks"],
                        "episodes": len(trajectories),
                        "successes": sum(t.success for t in trajectories),
                        "reward": reward,
                        "stored": added.num_added,
                        "duplicates": added.num_duplicates,
                        "errors": sum(t.error is not None for t in trajectories),
                    }
                )
                run.state = state
                bar.set_postfix(success=f"{state['successes'] / state['episodes']:.1%}")
                bar.update(len(batch))
        _say(f"bank {parts.bank.path}: {len(parts.bank)} trajectories, {state['successes']} of "
             f"{state['episodes']} episodes succeeded")


def train_sft(config: Config) -> None:
    """Warm the composer up on the bank's successes."""
    with _phase(config, "sft", "sft") as run:
        parts = _Parts.of(config)
        processes = Processes()
        memory = parts.latent_memory()
        # Whole tasks are set aside, so that no episode of theirs is learned from.
        aside = {task.key for task in parts.eval_tasks(config.sft.eval_tasks if config.sft.eval_every else 0)}
        stored = list(parts.bank)
        if not stored:
            raise TrainingError(f"{parts.bank.path} is empty; run `latentmem collect` with this configuration first")
        trainer = SFTTrainer(
            memory,
            parts.model,
            [t for t in stored if t.task.key not in aside],
            [t for t in stored if t.task.key in aside],
            parts.team.roles,
            _optimization(memory.composer, config.sft, config.sft.num_steps, processes),
            processes,
            SFTSettings(**_fields(SFTSettings, config.sft)),
            seed=stream_seed(config.seed, "sft"),
        )
        _train(run, trainer, config.sft.num_steps, processes, "loss")


def train_lmpo(config: Config) -> None:
    """Train the composer on the team's reward."""
    with _phase(config, "lmpo", "lmpo") as run:
        parts = _Parts.of(config)
        processes = Processes()
        memory = parts.latent_memory()
        if config.lmpo.initial != "untrained":
            memory.composer.load_weights(parts.checkpoint(config.lmpo.initial))
        aside = parts.eval_tasks(config.lmpo.eval_tasks if config.lmpo.eval_every else 0)
        keys = {task.key for task in aside}
        trainer = LMPOTrainer(
            memory,
            parts.model,
            parts.team,
            parts.domain.start,
            [task for task in parts.train_tasks if task.key not in keys],
            aside,
            _optimization(memory.composer, config.lmpo, config.lmpo.num_steps, processes),
            processes,
            LMPOSettings(**_fields(LMPOSettings, config.lmpo)),
            parts.sampling,
            max_turns=config.max_turns,
            seed=stream_seed(config.seed, "lmpo"),
        )
        _train(run, trainer, config.lmpo.num_steps, processes, "reward")


def compare(config: Config) -> dict[str, Any]:
    """Evaluate each memory on the test split; write results.json and the report; return the results."""
    with _phase(config, "evaluate", "evaluate") as run:
        parts = _Parts.of(config)
        section = config.evaluate
        tasks = parts.test_tasks[: section.num_tasks]
        sampling = Sampling(section.temperature, max_response_tokens=config.sampling.max_response_tokens)
        memories = {name: partial(parts.memory, name, run.phase_folder if section.online else None) for name in section.memories}
        for name in section.memories:  # a missing checkpoint is said before hours of work
            if name.startswith("latent:") and name != "latent:untrained":
                parts.checkpoint(name.removeprefix("latent:"))
        with _progress(len(tasks) * len(memories), "evaluate", "task") as bar:
            place = {name: i for i, name in enumerate(memories)}

            def show(name: str, num_tasks: int, reward: float) -> None:
                bar.set_postfix(memory=name, reward=f"{reward:.3f}")
                bar.update(place[name] * len(tasks) + num_tasks - bar.n)

            results = evaluate(
                parts.team,
                parts.model,
                memories,
                tasks,
                parts.domain.start,
                run.phase_folder,
                sampling=sampling,
                seed=stream_seed(config.seed, "evaluate"),
                batch_size=section.batch_size,
                max_turns=config.max_turns,
                online=section.online,
                num_bootstraps=section.num_bootstraps,
                on_progress=show,
            )
        results = {"run": config.run, **results, "seed": config.seed}
        write_atomic(run.folder / "results.json", _json(results))
        page = write_report([run.folder])
    _say(format_table(results))
    _say(f"\nreport: {page}")
    return results


def quickstart(config: Config) -> None:
    """The whole main path."""
    for title, recipe in (
        ("collect: the team plays the train tasks without memory; the bank fills", collect),
        ("sft: the composer is warmed up on the bank's successes", train_sft),
        ("lmpo: the composer is trained on the team's reward", train_lmpo),
        ("evaluate: memories compared on held-out tasks", compare),
    ):
        _say(f"\n== {title}")
        recipe(config)


@dataclass
class _Parts:
    """What a phase is made of, built once from the configuration."""

    config: Config
    team: FixedTeam
    domain: Domain
    train_tasks: list[Task]
    test_tasks: list[Task]
    model: LanguageModel
    bank: ExperienceBank
    sampling: Sampling
    composer: Composer | None = None

    @classmethod
    def of(cls, config: Config) -> "_Parts":
        """Cheap parts first, so that a mistake is said before a model is loaded."""
        team = load_team(config.team)
        domain = DOMAINS[type(config.data)](config.data)
        train, test = domain.tasks("train"), domain.tasks("test")
        if not train or not test:
            raise DataError(f"data: the {'train' if not train else 'test'} split is empty")
        if config.composer.model is None:
            _check_template_early(config)
        model = LanguageModel.from_pretrained(
            config.model.name, config.model.device, config.model.dtype, config.model.max_batch_size
        )
        embed = Embedder(config.bank.embedder)
        path = Path(config.bank.path or Path(config.run) / "bank.sqlite")
        bank = ExperienceBank(path, embed, embedder=embed.name)
        section = config.sampling
        sampling = Sampling(section.temperature, section.top_p, section.top_k, section.max_response_tokens)
        return cls(config, team, domain, train, test, model, bank, sampling)

    def memory(self, name: str, copy_bank_to: Path | None = None) -> Memory:
        """A memory by its name in the configuration, over a copy of the bank if a folder for it is given."""
        bank = self.bank if copy_bank_to is None else self._copy_of_bank(copy_bank_to / f"{name.replace(':', '-')}.sqlite")
        section = self.config.bank
        memories: Mapping[str, Callable[[], Memory]] = {
            "none": NoMemory,
            "text": lambda: TextMemory(bank, section.num_retrieved, section.only_successes),
        }
        if name in memories:
            return memories[name]()
        memory = self.latent_memory(bank)
        which = name.removeprefix("latent:")
        if which != "untrained":
            memory.composer.load_weights(self.checkpoint(which))
        return memory

    def latent_memory(self, bank: ExperienceBank | None = None) -> LatentMemory:
        """Latent memory with an untrained composer."""
        section = self.config.composer
        if self.composer is None:
            base = None
            if section.model is not None:
                base = LanguageModel.from_pretrained(section.model, self.config.model.device, self.config.model.dtype)
            self.composer = Composer(
                base or self.model,
                self.model,
                num_latents=section.num_latents,
                rank=section.rank,
                alpha=section.alpha,
                target_modules=section.target_modules,
                template=section.template,
                max_prompt_tokens=section.max_prompt_tokens,
                initial_scale=section.initial_scale,
                seed=stream_seed(self.config.seed, "composer"),
            )
            self._untrained = {name: p.detach().clone() for name, p in self.composer.trainable().items()}
        else:
            for name, parameter in self.composer.trainable().items():
                parameter.data.copy_(self._untrained[name])
        retrieval = self.config.bank
        return LatentMemory(bank or self.bank, self.composer, retrieval.num_retrieved, retrieval.only_successes)

    def checkpoint(self, which: str) -> Path:
        """The composer that a phase of this run selected, or the folder itself."""
        if which not in ("sft", "lmpo"):
            return Path(which)
        found = selected_checkpoint(Path(self.config.run) / which / "checkpoints")
        if found is None:
            raise CheckpointError(
                f"{self.config.run}: no checkpoint of {which} here; run `latentmem train {which}` with this configuration first"
            )
        return found

    def eval_tasks(self, count: int) -> list[Task]:
        """The last train tasks, set aside for choosing checkpoints."""
        if count >= len(self.train_tasks):
            raise DataError(f"eval_tasks is {count}, but the train split has {len(self.train_tasks)} tasks; leave some to train on")
        return self.train_tasks[len(self.train_tasks) - count :]

    def _copy_of_bank(self, path: Path) -> ExperienceBank:
        if not path.exists():
            fresh = path.with_suffix(".new")
            with sqlite3.connect(self.bank.path) as source, sqlite3.connect(fresh) as target:
                source.backup(target)
            fresh.rename(path)
        return ExperienceBank(path, Embedder(self.config.bank.embedder), embedder=self.config.bank.embedder)


def _check_template_early(config: Config) -> None:
    from latentmem.memory.composer import FIELDS, TEMPLATE
    from latentmem.templates import check_template

    check_template(config.composer.template or TEMPLATE, FIELDS, "composer.template")


@contextmanager
def _phase(config: Config, phase: str, section: str) -> Iterator[Run]:
    values = config.model_dump(mode="json", by_alias=True)
    run = Run.open(Path(config.run), dump_config(config), phase, {key: values[key] for key in (*_SETUP, section)})
    with run:
        yield run


def _optimization(composer: Composer, section: OptimizerFields, num_steps: int, processes: Processes) -> Optimization:
    return Optimization(
        composer,
        processes,
        num_steps=num_steps,
        learning_rate=section.learning_rate,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        max_grad_norm=section.max_grad_norm,
        weight_decay=section.weight_decay,
    )


def _train(run: Run, trainer: SFTTrainer | LMPOTrainer, num_steps: int, processes: Processes, shown: str) -> None:
    with _progress(num_steps, run.phase, "step") as bar:

        def log(metrics: dict[str, Any]) -> None:
            if processes.is_first:
                run.log(metrics)
                figures = {key: f"{metrics[key]:.3f}" for key in (shown, "eval_reward") if key in metrics}
                bar.set_postfix(figures)
                bar.update(metrics["step"] - bar.n)

        progress = trainer.train(
            run.phase_folder / "checkpoints", log, lambda step: run.rewind_metrics(run.phase, step)
        )
    chosen = progress.best_step if progress.best_step is not None else progress.step
    _say(f"{run.phase}: {progress.step} steps done; checkpoint of step {chosen} selected")


def _fields(settings: type, section: Any) -> dict[str, Any]:
    return {name: getattr(section, name) for name in settings.__dataclass_fields__}


@contextmanager
def _progress(total: int, name: str, unit: str, initial: int = 0) -> Iterator[Any]:
    with tqdm(total=total, desc=name, unit=unit, initial=initial, file=sys.stderr, dynamic_ncols=True) as bar:
        yield bar


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stdout)


def _json(values: dict[str, Any]) -> str:
    import json

    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
