"""The four trainings: warm-up, SFT and LMPO of a composer; GRPO, their rival, of the agents themselves."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from latentmem.config import Config, GRPOSection, LMPOSection, OptimizerFields, SFTSection, WarmupSection
from latentmem.errors import TrainingError
from latentmem.models.language_model import stream_seed
from latentmem.progress import progress
from latentmem.recipes.folders import DEV_ROWS, checkpoints_of, steps_done, warmup_steps_done
from latentmem.recipes.lessons import carried_by, lessons, right_responses
from latentmem.recipes.memories import latent_memory
from latentmem.recipes.parts import Parts
from latentmem.recipes.phase import Phase, begin
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
from latentmem.trajectory import Task


def train_warmup(config: Config, parts: Parts | None = None) -> None:
    """Let agents and composer learn to pass words on, before any data."""
    with begin(config, "warmup", parts) as here:
        section, parts = config.warmup, here.parts
        if _is_finished(here, section.copy_steps, section.frame_steps):
            return
        trainer = WarmupTrainer(
            parts.composer(),
            parts.model,
            parts.train_teams,
            partial(
                Optimization,
                processes=here.processes,
                schedule="constant",
                warmup_steps=0,
                max_grad_norm=section.max_grad_norm,
                weight_decay=0.0,
            ),
            here.processes,
            WarmupSettings(**_fields(WarmupSettings, section)),
            seed=stream_seed(config.seed, "warmup"),
        )
        done = warmup_steps_done(checkpoints_of(config, "warmup"), section.frame_steps)
        _train(here, trainer.train, section.frame_steps + section.copy_steps, "loss", done)


def train_sft(config: Config, parts: Parts | None = None) -> None:
    """Warm the composer up on the bank's successes, or on demonstrations."""
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
            learned,
            held_out,
            parts.train_teams,
            _optimization(here, memory.composer, config.sft, config.sft.projection_rate),
            here.processes,
            SFTSettings(**_fields(SFTSettings, config.sft)),
            seed=stream_seed(config.seed, "sft"),
            carried=carried_by(parts, memory, held_out, "sft", here.processes),
        )
        train = partial(trainer.train, log_tasks=partial(here.run.log_details, DEV_ROWS))
        _train(here, train, config.sft.num_steps, "loss")


def train_lmpo(config: Config, parts: Parts | None = None) -> None:
    """Train the composer on the team's reward."""
    with begin(config, "lmpo", parts) as here:
        parts = here.parts
        if _is_finished(here, config.lmpo.num_steps):
            return
        initial = parts.initial(config.lmpo.initial)
        aside = parts.eval_tasks("lmpo", config.lmpo)
        memory = latent_memory(parts, initial)
        optimization = _optimization(here, memory.composer, config.lmpo, config.lmpo.projection_rate)
        policy = LatentPolicy(memory, parts.model)
        held_out = right_responses(parts, aside, parts.players)
        if held_out is None:
            held_out = parts.bank.get(id_ for task in aside for id_ in parts.bank.ids_of(task))
        carried = carried_by(parts, memory, held_out, "lmpo", here.processes) if aside else None
        _reinforce(here, config.lmpo, policy, aside, optimization, carried)


def train_grpo(config: Config, parts: Parts | None = None) -> None:
    """Train a LoRA of the agents themselves on the team's reward, without memory."""
    with begin(config, "grpo", parts) as here:
        parts = here.parts
        if _is_finished(here, config.grpo.num_steps):
            return
        aside = parts.eval_tasks("grpo", config.grpo)
        memory = parts.parametric_memory()
        _reinforce(here, config.grpo, AgentsPolicy(memory), aside, _optimization(here, memory, config.grpo))


def _reinforce(
    here: Phase,
    section: LMPOSection | GRPOSection,
    policy: Policy,
    aside: list[Task],
    optimization: Optimization,
    carried: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Train a policy on all train tasks but those set aside."""
    parts = here.parts
    keys = {task.key for task in aside}
    trainer = LMPOTrainer(
        policy,
        parts.players,
        parts.domain.start,
        [task for task in parts.train_tasks if task.key not in keys],
        aside,
        optimization,
        here.processes,
        LMPOSettings(**_fields(LMPOSettings, section)),
        parts.sampling,
        max_turns=here.config.max_turns,
        seed=stream_seed(here.config.seed, here.name),
        carried=carried,
    )
    _train(here, trainer.train, section.num_steps, "reward")


def _optimization(
    here: Phase,
    trained: Trained,
    section: SFTSection | LMPOSection | GRPOSection,
    projection_rate: float = 1.0,
) -> Optimization:
    return Optimization(
        trained,
        here.processes,
        num_steps=section.num_steps,
        learning_rate=section.learning_rate,
        projection_rate=projection_rate,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        max_grad_norm=section.max_grad_norm,
        weight_decay=section.weight_decay,
    )


def _is_finished(here: Phase, num_steps: int, earlier_steps: int = 0) -> bool:
    """Whether a training is done, which is told; `earlier_steps` were done in a folder of their own."""
    folder = checkpoints_of(here.config, here.name)
    if newest_checkpoint(folder) is None or steps_done(folder) < num_steps:
        return False
    if here.is_first:
        remove_others(folder)
    total = earlier_steps + num_steps
    here.say(f"{here.name}: finished already, {total} steps; {selected_checkpoint(folder)} is selected")
    return True


def _train(
    here: Phase,
    train: Callable[[Path, Callable[[dict[str, Any]], None], Callable[[int], None]], object],
    num_steps: int,
    shown: str,
    done: int | None = None,
) -> None:
    folder = checkpoints_of(here.config, here.name)
    begun = steps_done(folder) if done is None else done
    with progress(num_steps, here.name, "step", begun, shown=here.is_first) as bar:

        def log(metrics: dict[str, Any]) -> None:
            here.run.log(metrics)
            figures = {key: f"{metrics[key]:.3f}" for key in (shown, "eval_loss", "eval_reward") if key in metrics}
            bar.set_postfix(figures, refresh=False)
            bar.update(min(metrics["step"], num_steps) - bar.n)

        def rewind(step: int) -> None:
            here.run.rewind_metrics(here.name, step)
            here.run.rewind_details(DEV_ROWS, step)

        train(folder, log, rewind)
    here.say(f"{here.name}: {num_steps} steps done; {selected_checkpoint(folder)} is selected")


def _fields(
    settings: type[LMPOSettings] | type[SFTSettings] | type[WarmupSettings], section: OptimizerFields | WarmupSection
) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in fields(settings)}
