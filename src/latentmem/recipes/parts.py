"""The parts that the phases of a run share; costly ones are made once, when they are first asked for.

Cheap parts are made at once, so that a mistake in them is reported before a model is loaded.
"""

import logging
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from transformers import PreTrainedModel

from latentmem.bank import ExperienceBank, bank_exists
from latentmem.bank_place import Place, bank_place
from latentmem.config import (
    Config,
    EngineSection,
    LocalEngineSection,
    ModelSection,
    OpenAIEngineSection,
    OptimizerFields,
    SFTSection,
    VLLMEngineSection,
)
from latentmem.engines.probe import CheckedEngine
from latentmem.engines.upstream import UpstreamEngine
from latentmem.engines.vllm import VLLMEngine
from latentmem.environments.environment import Demonstrator, Domain, Split
from latentmem.errors import BankError, ConfigError, DataError
from latentmem.folders import checkpoints_of, composer_folder, steps_done, trained_checkpoint
from latentmem.memory.composer import FIELDS, Composer
from latentmem.memory.parametric import ParametricMemory
from latentmem.memory.rating import check_rating_template
from latentmem.memory_names import TRAININGS
from latentmem.models.embedder import Embedder, HashingEmbedder, load_embedder
from latentmem.models.language_model import LanguageModel
from latentmem.models.sharding import shard
from latentmem.processes import Processes, sharding_asked
from latentmem.recipes.domains import DOMAINS, check_roles, unshown, with_experience
from latentmem.recipes.teams import Open, team_of
from latentmem.seeds import stream_seed
from latentmem.teams.turn import Players, Teams
from latentmem.templates import check_template
from latentmem.training.tasks import last_tasks, tasks_aside
from latentmem.trajectory import Role, Task

logger = logging.getLogger(__name__)
T = TypeVar("T")
_PHASES = (*TRAININGS, "grpo")


class Shared:
    """What the runs of one process share: models, embedders and domains with equal settings are made once."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def parts(self, config: Config) -> "Parts":
        """Make the parts of a run; closing them takes their adapters off the backbone again.

        Raises:
            LatentMemError: a mistake in a cheap part: the team, the templates, the data.
        """
        return Parts(config, self)

    def get(self, make: Callable[[], T], *settings: Any) -> T:
        """Return what was made with equal settings before, or make it now."""
        key = repr(settings)
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


class Parts:
    """The parts that the phases of one run use."""

    def __init__(self, config: Config, shared: Shared | None = None) -> None:
        self.config = config
        self.shared = shared or Shared()
        self.sharding = sharding_asked()
        self._adapted: list[Composer | ParametricMemory] = []
        """Parts that have put an adapter on a backbone."""
        made = {team: team_of(config, team, lambda: self.model) for team in (config.team, *config.train_teams)}
        self.team = made[config.team]
        self.train_teams = tuple(made[team] for team in config.train_teams) or (self.team,)
        self.players: Players = Teams(self.train_teams, config.seed) if config.train_teams else self.team
        check_roles(config.data, (self.team, *self.train_teams))
        for team in {team.name: team for team in (self.team, *self.train_teams)}.values():
            for field, so in unshown(config.data, team, config.max_turns).items():
                logger.warning("team %s shows {%s} to none of its agents: %s", team.name, field, so)
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
        self.tasks = with_experience(found, config.bank.experience_tasks)
        """The tasks of each split; experience and dev may be empty."""
        self.train_tasks = self.tasks["train"]
        self.has_warned = False
        """Whether the user was warned that the bank holds important episodes that are never recalled."""
        self.sampling = config.sampling

    def known_roles(self, what: str) -> tuple[Role, ...]:
        """Return the roles of the team that is evaluated.

        Raises:
            ConfigError: it is a program that lists none; `what` needs them.
        """
        if not self.team.roles:
            raise ConfigError(
                f"{what} needs the roles beforehand, and program {self.team.name} lists none; add them to team.roles, "
                "as in [{name: planner, profile: plans the work}]; `latentmem bank info` names those that spoke"
            )
        return self.team.roles

    # Tasks

    @property
    def collected_split(self) -> Split:
        """The split that is played to fill the bank."""
        return "experience" if self.tasks["experience"] else "train"

    @property
    def collected_tasks(self) -> list[Task]:
        """The tasks of `collected_split`."""
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
        return last_tasks(self.train_tasks, self.config.lmpo.eval_tasks, "lmpo.eval_tasks", "train")

    def eval_tasks(self, name: str, section: OptimizerFields) -> list[Task]:
        """Return tasks for choosing checkpoints: the first dev tasks, or the last train tasks without a dev split."""
        return tasks_aside(self.train_tasks, self.tasks["dev"], section, name)

    def held_out_tasks(self, section: SFTSection) -> list[Task]:
        """Return the last train tasks: SFT needs episodes of what it holds out, and dev tasks are never collected."""
        count = section.eval_tasks if section.eval_every else 0
        return last_tasks(self.train_tasks, count, "sft.eval_tasks", "train")

    # Models

    @cached_property
    def agents(self) -> LanguageModel | UpstreamEngine:
        """What speaks for the agents: their model, or a server of a model that is not here."""
        section = self.config.model.engine
        if isinstance(section, OpenAIEngineSection):
            name = self.config.model.name
            return self.shared.get(lambda: upstream_of(name, section), "upstream", name, section)
        return self.model

    @cached_property
    def model(self) -> LanguageModel:
        """The agents' model, with the engine that samples for it.

        Raises:
            ConfigError: a server speaks for the agents whose weights are not here.
        """
        if isinstance(self.config.model.engine, OpenAIEngineSection):
            raise ConfigError(
                "model.engine is openai, so the weights of the agents are not here: nothing can be composed, rated, "
                "scored or trained with them; use the memories none and text, or set model.engine to local or vllm"
            )
        model = self._load("agents", self.config.model.name)
        if model.engine is None and (engine := engine_of(model, self.config.model.engine)) is not None:
            model.engine = CheckedEngine(engine)
        return model

    def _load(self, use: str, name: str) -> LanguageModel:
        section = self.config.model
        place = _spread if self.sharding == "fsdp" else None
        return self.shared.get(lambda: load_model(section, name, place), use, name, section)

    @cached_property
    def embedder(self) -> Embedder | HashingEmbedder:
        """The embedder that the bank searches with."""
        name = self.config.bank.embedder
        return self.shared.get(lambda: load_embedder(name), "embedder", name)

    def composer(self) -> Composer:
        """Make a new, untrained composer, which `close` takes off its backbone."""
        composer = self.loose_composer()
        self._adapted.append(composer)
        return composer

    def loose_composer(self) -> Composer:
        """Make a new, untrained composer for whoever takes it off its backbone again."""
        section = self.config.composer
        base = self.model if section.model is None else self._load("composer", section.model)
        return Composer(
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

    def parametric_memory(self) -> ParametricMemory:
        """Make a parametric memory: the agents with a new, untrained adapter.

        Raises:
            ConfigError: servers sample for the agents; they would have to be sent the adapter after each step.
        """
        if not isinstance(self.config.model.engine, LocalEngineSection):
            raise ConfigError(
                f"grpo trains the agents themselves, and model.engine {self.config.model.engine.kind} samples from "
                "agents that do not change; set model.engine={kind: local}, or leave grpo out"
            )
        section = self.config.grpo
        memory = ParametricMemory(
            self.model,
            rank=section.rank,
            alpha=section.alpha,
            target_modules=section.target_modules,
            seed=stream_seed(self.config.seed, "grpo"),
        )
        self._adapted.append(memory)
        return memory

    def initial(self, which: str) -> Path | None:
        """Return the checkpoint that a composer starts from; None if it starts untrained.

        Raises:
            CheckpointError: there is no such checkpoint or folder.
        """
        if which == "untrained":
            return None
        return self.checkpoint(which) if which in _PHASES else composer_folder(which)

    def checkpoint(self, which: str) -> Path:
        """Return the checkpoint that a phase of this run selected; take any other name as a folder."""
        if which not in _PHASES:
            return Path(which)
        folder = checkpoints_of(self.config, which)
        found = trained_checkpoint(self.config, which)
        sections = self.config
        lengths = {
            "warmup": sections.warmup.copy_steps,
            "sft": sections.sft.num_steps,
            "lmpo": sections.lmpo.num_steps,
            "grpo": sections.grpo.num_steps,
        }
        steps, wanted = steps_done(folder), lengths[which]
        if steps < wanted:
            logger.warning("%s has done %d of its %d steps; its checkpoint so far is used", which, steps, wanted)
        return found

    # The bank

    @property
    def bank_place(self) -> Place:
        """Where the run's own bank is, or the one that the configuration names."""
        return bank_place(self.config.bank.path or Path(self.config.run) / "bank.sqlite")

    @property
    def has_bank(self) -> bool:
        """Whether that bank has been begun."""
        return bank_exists(self.bank_place)

    @cached_property
    def bank(self) -> ExperienceBank:
        """The run's own bank, or the one that the configuration names."""
        return self._open_bank(self.bank_place)

    def bank_copy(self, path: Path) -> ExperienceBank:
        """Open a copy of the bank at `path`, made if it does not exist yet.

        Raises:
            BankError: the bank cannot be copied.
        """
        if not path.exists():
            fresh = path.with_suffix(".fresh")
            for tail in ("", "-wal", "-shm", "-journal"):  # of a copy that was killed; SQLite would believe its log
                fresh.with_name(fresh.name + tail).unlink(missing_ok=True)
            try:
                self.bank.copy_to(fresh)
            except BankError as error:
                raise BankError(
                    f"{fresh}: the bank cannot be copied here; free some space and run the same command again ({error})"
                ) from None
            fresh.rename(path)
        return self._open_bank(path)

    def _open_bank(self, path: Place) -> ExperienceBank:
        section = self.config.bank
        return ExperienceBank(
            path, self.embedder, embedder=self.embedder.name, index=section.index, tenants=section.tenants
        )

    def end_programs(self) -> None:
        """End the programs of teams, and what they are served by."""
        for team in (self.team, *self.train_teams):
            if isinstance(team, Open):
                team.close()

    def close(self) -> None:
        """Close the bank, end programs and free the backbone; these parts cannot be used afterwards."""
        self.end_programs()
        if "bank" in vars(self):
            self.bank.close()
        for adapted in self._adapted:
            adapted.detach()
        self._adapted.clear()


def load_model(
    section: ModelSection, name: str, place: Callable[[PreTrainedModel, torch.device], object] | None = None
) -> LanguageModel:
    """Load a model as the agents' section says, under a name that may be another."""
    return LanguageModel.from_pretrained(
        name,
        section.device,
        section.dtype,
        section.max_batch_size,
        section.fused,
        place,
        section.date,
        section.thinking,
    )


def engine_of(model: LanguageModel, section: EngineSection) -> VLLMEngine | None:
    """Return what samples in place of the model's weights here; None: these sample. Nothing is asked yet."""
    if not isinstance(section, VLLMEngineSection):
        return None
    return VLLMEngine(model, section.urls, section.parallel, section.timeout_seconds, section.retries)


def upstream_of(name: str, section: OpenAIEngineSection) -> UpstreamEngine:
    """Return the engine of a server whose model is not here. Nothing is asked yet.

    Raises:
        ConfigError: the key is missing, or is none.
    """
    key = None
    if section.key_variable is not None:
        key = os.environ.get(section.key_variable, "").strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            found = "is not set" if not key else "holds what no key is: blanks, or signs that no header takes"
            raise ConfigError(
                f"model.engine.key_variable: the environment variable {section.key_variable} {found}; put the server's "
                "key into it, or set key_variable to null"
            )
    return UpstreamEngine(
        name, section.url, key, section.limit_key, section.parallel, section.timeout_seconds, section.retries
    )


def _spread(model: PreTrainedModel, device: torch.device) -> None:
    Processes().wait()  # a process that could not load its model reports it here, before the others rely on it
    shard(model, device)
