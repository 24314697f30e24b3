"""The four trainings: warm-up, SFT and LMPO train a composer; GRPO, their rival, trains the agents themselves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from latentmem.config import Config, GRPOSection, LMPOSection
from latentmem.errors import EpisodesError, TrainingError
from latentmem.folders import DEV_ROWS, checkpoints_of, steps_done, warmup_steps_done
from latentmem.memory.latent import LatentMemory
from latentmem.memory.parametric import ParametricMemory
from latentmem.recipes.lessons import carried_by, lessons, right_responses
from latentmem.recipes.memories import latent_memory
from latentmem.recipes.parts import Parts
from latentmem.recipes.phase import Phase, begin
from latentmem.seeds import stream_seed
from latentmem.training.checkpoint_folder import newest_checkpoint, remove_others, selected_checkpoint, step_of
from latentmem.training.journal import StepBar, step_bar
from latentmem.training.lmpo import LMPOTrainer
from latentmem.training.sft import SFTTrainer
from latentmem.training.warmup import WarmupTrainer
from latentmem.trajectory import Task

_BY_REWARD = {"lmpo": "the composer", "grpo": "the agents"}
"""The trainings by reward, which teaches nothing where all get the same, and what they train."""


def train_warmup(config: Config, parts: Parts | None = None) -> None:
    """Train agents and composer to pass words on, before any data are used."""
    with begin(config, "warmup", parts) as here:
        section, parts = config.warmup, here.parts
        if _is_finished(here, section.copy_steps):
            return
        seed = stream_seed(config.seed, "warmup")
        trainer = WarmupTrainer(
            parts.composer(), parts.model, parts.players, section, seed=seed, processes=here.processes
        )
        done = warmup_steps_done(checkpoints_of(config, "warmup"), section.frame_steps)
        _train(here, trainer, section.frame_steps + section.copy_steps, "loss", done)


def train_sft(config: Config, parts: Parts | None = None) -> None:
    """Train the composer on the bank's successes, or on demonstrations, as a start for LMPO."""
    with begin(config, "sft", parts) as here:
        parts = here.parts
        if _is_finished(here, config.sft.num_steps):
            return
        initial = parts.initial(config.sft.initial)
        if config.sft.demonstrations == "bank":
            aside = parts.held_out_tasks(config.sft)
        else:
            aside = parts.eval_tasks("sft", config.sft)
        if not len(parts.bank):
            raise TrainingError(f"{parts.bank.path} is empty; run `latentmem collect` with this configuration first")
        learned, held_out = lessons(parts, aside)
        memory = latent_memory(parts, initial)
        trainer = SFTTrainer(
            memory,
            parts.model,
            parts.players,
            learned,
            held_out,
            config.sft,
            seed=stream_seed(config.seed, "sft"),
            processes=here.processes,
            carried=carried_by(parts, memory, held_out, "sft", here.processes),
        )
        _train(here, trainer, config.sft.num_steps, "loss")


def train_lmpo(config: Config, parts: Parts | None = None) -> None:
    """Train the composer on the team's reward."""
    with begin(config, "lmpo", parts) as here:
        parts = here.parts
        if _is_finished(here, config.lmpo.num_steps):
            return
        initial = parts.initial(config.lmpo.initial)
        aside = parts.eval_tasks("lmpo", config.lmpo)
        memory = latent_memory(parts, initial)
        held_out = right_responses(parts, aside, parts.players)
        if held_out is None:
            held_out = parts.bank.get(id_ for task in aside for id_ in parts.bank.ids_of(task))
        carried = carried_by(parts, memory, held_out, "lmpo", here.processes) if aside else None
        _reinforce(here, config.lmpo, memory, aside, carried)


def train_grpo(config: Config, parts: Parts | None = None) -> None:
    """Train a LoRA on the agents themselves with the team's reward, without memory."""
    with begin(config, "grpo", parts) as here:
        parts = here.parts
        if _is_finished(here, config.grpo.num_steps):
            return
        aside = parts.eval_tasks("grpo", config.grpo)
        _reinforce(here, config.grpo, parts.parametric_memory(), aside)


def _reinforce(
    here: Phase,
    section: LMPOSection | GRPOSection,
    memory: LatentMemory | ParametricMemory,
    aside: list[Task],
    carried: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Train on all train tasks except those set aside."""
    parts = here.parts
    trainer = LMPOTrainer(
        memory,
        parts.model,
        parts.players,
        parts.domain,
        section,
        tasks=parts.train_tasks,
        aside=aside,
        sampling=parts.sampling,
        max_turns=here.config.max_turns,
        seed=stream_seed(here.config.seed, here.name),
        processes=here.processes,
        carried=carried,
    )
    _train(here, trainer, section.num_steps, "reward")
    _check_played(here, trainer.last_error)


def _check_played(here: Phase, cause: str | None = None) -> None:
    """Refuse to end well if all episodes of a training by reward ended in an error.

    Raises:
        EpisodesError: they did; `cause` is the error of one of them, where it is known.
    """
    steps = [row for row in here.run.logged() if "errors" in row]
    size = here.config.grpo.group_size if here.name == "grpo" else here.config.lmpo.group_size
    num_errors = sum(row["errors"] for row in steps)
    if steps and num_errors == size * sum(row["groups"] for row in steps):
        told = f", the last with: {cause}" if cause else ""
        raise EpisodesError(
            f"{here.name}: all {num_errors:.0f} episodes ended in an error{told}; nothing was learned; mend that, and "
            "name a new run folder with run=FOLDER"
        )


class _RunJournal:
    """Writes what a trainer reports into the run, and moves the bar."""

    def __init__(self, here: Phase, bar: StepBar) -> None:
        self.run = here.run
        self.phase = here.name
        self.bar = bar

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.run.log(metrics)
        self.bar.show(metrics)

    def log_tasks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.run.log_details(DEV_ROWS, rows)

    def doing(self, what: str) -> None:
        self.bar.doing(what)

    def rewind(self, step: int) -> None:
        self.run.rewind_metrics(self.phase, step)
        self.run.rewind_details(DEV_ROWS, step)


class _Trainer(Protocol):
    def train(self, folder: Path, journal: _RunJournal) -> object: ...


def _is_finished(here: Phase, num_steps: int) -> bool:
    """Return whether a training is finished, and say so; `num_steps` are those that its folder counts."""
    folder = checkpoints_of(here.config, here.name)
    if newest_checkpoint(folder) is None or steps_done(folder) < num_steps:
        return False
    if here.is_first:
        remove_others(folder)
    steps = _steps(here, num_steps)
    here.say(f"{here.name}: finished already, {steps}{_unmoved(here, num_steps)}; {_selected(here, folder)}")
    _check_played(here)
    return True


def _train(here: Phase, trainer: _Trainer, num_steps: int, shown: str, done: int | None = None) -> None:
    folder = checkpoints_of(here.config, here.name)
    begun = steps_done(folder) if done is None else done
    with step_bar(num_steps, here.name, shown, begun, here.is_first) as bar:
        trainer.train(folder, _RunJournal(here, bar))
    here.say(f"{here.name}: {_steps(here, num_steps)} done{_unmoved(here, num_steps)}; {_selected(here, folder)}")


def _steps(here: Phase, num_steps: int) -> str:
    """Return how many steps a training has, as words; the warm-up has two kinds."""
    if here.name != "warmup":
        return f"{num_steps} steps"
    return f"{here.config.warmup.frame_steps} frame steps and {here.config.warmup.copy_steps} copy steps"


def _selected(here: Phase, folder: Path) -> str:
    """Return which checkpoint is selected. Those of the warm-up are numbered by its copy steps, which come last."""
    chosen = selected_checkpoint(folder)
    if chosen is None or here.name != "warmup":
        return f"{chosen} is selected"
    return f"{chosen} is selected, which is after all frame steps and {step_of(chosen)} copy steps"


def _unmoved(here: Phase, num_steps: int) -> str:
    """Return what to add of a training by reward none of whose steps changed what it trains; else nothing.

    A resumed run has the lines of its earlier commands too. Where lines of some steps are missing, nothing is claimed.
    """
    if here.name not in _BY_REWARD:
        return ""
    steps = [row for row in here.run.logged() if "updated" in row]
    if [row["step"] for row in steps] != list(range(1, num_steps + 1)) or any(row["updated"] for row in steps):
        return ""
    if any(row.get("bad") for row in steps):
        reason = "losses or gradients were not finite"
    elif any(row.get("without_tokens") for row in steps):
        reason = "no group whose messages have token ids had rewards that differ"
    else:
        reason = "no group had rewards that differ"
    crashed = sum(int(row.get("errors") or 0) for row in steps)
    ended = f", and {crashed} episodes ended in an error" if crashed else ""
    return f", none changed {_BY_REWARD[here.name]}: {reason}{ended}; see docs/training.md, Signal"
