"""What a run will take of memory, disk and network, from its configuration and the models' config.json alone."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch

from latentmem.bank import ExperienceBank
from latentmem.config import Config, ProgramSection, VLLMEngineSection
from latentmem.errors import LatentMemError, ModelError
from latentmem.models.fused import pays
from latentmem.planning import disk
from latentmem.planning.memory import Backbone
from latentmem.planning.phases import Peak, Trained, Work, play, train_grpo, train_lmpo, train_sft, train_warmup
from latentmem.planning.shapes import Shape, read_embedder, read_shape
from latentmem.recipes.phase import trainings
from latentmem.teams.team import load_team

ASSUMED_PROMPT = 512
"""Tokens of a prompt where nothing was measured."""
_LESSON = {"prompt": 48, "text": 152, "fact": 6}
"""Tokens of a prompt and of a composer's text in the warm-up, with one fact, and what each further one adds.

They are means of 300 lessons, with the default template, in SmolLM2's tokens: many lessons fill a pass together."""
_LIBRARIES = {"cpu": 560 * 2**20, "cuda": 600 * 2**20}
"""Bytes that a process takes before any weights: libraries and tokenizer (measured), a CUDA context (assumed)."""
_GAPS = {"cpu": (100 * 2**20, 0.35), "cuda": (0, 0.1)}
"""What an allocator holds that no tensor uses: bytes that stay from loading, and a share of what comes and goes.

On a CPU it was measured, with glibc, at several sizes (docs/performance.md); on a GPU it is assumed.
"""
_LOOKED_AT = 200
"""Episodes of the run's bank whose prompts are measured."""
_LOWERED = (
    "model.max_batch_size",
    "sft.micro_batch_positions",
    "lmpo.micro_batch_positions",
    "grpo.micro_batch_positions",
)
"""Keys that decide memory and not results."""
_MiB, _GiB = 2**20, 2**30
_TOLD = "for backward: what training keeps until gradients are made; passing: what comes and goes inside a layer"
_COLUMNS = ("weights", "trained", "keys, values", "for backward", "passing", "gaps", "embedder", "libraries", "total")


@dataclass(frozen=True)
class Plan:
    """What one process takes, phase by phase, and what the run takes of disk and network; all in bytes."""

    run: str
    device: str
    dtype: str
    peaks: dict[str, Peak]
    fixed: dict[str, int]
    """What each phase takes besides its peak: libraries and embedder."""
    disk: dict[str, int]
    wire: dict[str, int]
    """What is sent to an engine that takes embeddings; empty without one."""
    numbers: dict[str, int]
    """Counts and lengths that the plan was made with."""
    assumptions: tuple[str, ...]

    def gaps(self, phase: str) -> int:
        """Return the bytes that the allocator holds unused."""
        always, share = _GAPS[self.device]
        peak = self.peaks[phase]
        return round(always + share * (peak.columns + peak.kept + peak.passing))

    def total(self, phase: str) -> int:
        """Return the bytes of a phase, with gaps, libraries and embedder."""
        return self.peaks[phase].total + self.gaps(phase) + sum(self.fixed.values())

    @property
    def largest(self) -> str:
        """The phase that takes the most memory."""
        return max(self.peaks, key=self.total)

    def as_json(self, fit: str | None = None) -> str:
        """Return everything as JSON, bytes as whole numbers; `fit` is what was said about fitting."""
        peaks = {
            name: {**asdict(peak), "gaps": self.gaps(name), **self.fixed, "total": self.total(name)}
            for name, peak in self.peaks.items()
        }
        rest = {key: value for key, value in vars(self).items() if key not in ("peaks", "fixed")}
        return json.dumps({**rest, "memory": peaks, "largest": self.largest, "fit": fit}, indent=1)

    def table(self) -> str:
        """Return a table for people."""
        rows: list[tuple[str, ...]] = [("memory of a process, MiB", *_COLUMNS)]
        for name, peak in self.peaks.items():
            found = (*asdict(peak).values(), self.gaps(name), *self.fixed.values(), self.total(name))
            rows.append((name, *(f"{num_bytes / _MiB:,.0f}" for num_bytes in found)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(r)) for r in rows]
        lines.append(_TOLD)
        for title, figures in (("disk", self.disk), *([("network", self.wire)] if self.wire else [])):
            lines += ["", title, *(f"  {name:54} {_size(num_bytes):>10}" for name, num_bytes in figures.items())]
        return "\n".join([*lines, "", "assumed", *(f"  {line}" for line in self.assumptions)])


class Planner:
    """Makes plans of one run; models are read once."""

    def __init__(
        self,
        config: Config,
        prompt_tokens: int | None = None,
        composer_tokens: int | None = None,
        processes: int = 1,
    ) -> None:
        """Read what decides the plan.

        Args:
            config: the run.
            prompt_tokens: longest prompt of an agent; None takes the longest in the run's bank, or `ASSUMED_PROMPT`.
            composer_tokens: longest text of the composer; None takes `composer.max_prompt_tokens`.
            processes: processes launched together.

        Raises:
            LatentMemError: a model or a team does not exist, or a target module is no layer of it.
        """
        self.config = config
        self.composer_tokens = composer_tokens
        self.processes = processes
        self.prompt_tokens = prompt_tokens
        self.agents_shape = read_shape(config.model.name)
        own = config.composer.model
        self.base_shape = self.agents_shape if own is None else read_shape(own)
        self.embedder, self.vector = read_embedder(config.bank.embedder)
        names = config.train_teams or (config.team,)
        spoken = [_speaking(config, team) for team in dict.fromkeys((config.team, *names))]
        self.calls, self.messages = max(calls for calls, _ in spoken), max(messages for _, messages in spoken)

    def plan(self, config: Config | None = None) -> Plan:
        """Return the plan of the run, or of one that differs in numbers only."""
        config = config or self.config
        device, dtype = _place(config.model.device, config.model.dtype)
        item = 2 if dtype == "bfloat16" else 4
        fused = config.model.fused == "auto" and pays(torch.device(device), getattr(torch, dtype))
        agents, base = Backbone(self.agents_shape, item, fused), Backbone(self.base_shape, item, fused)
        section, sampling = config.composer, config.sampling
        lora = self.base_shape.lora(section.rank, section.target_modules, "composer.target_modules")
        composer = Trained(
            base, lora + _own_parameters(config, agents.shape, base.shape), section.rank, section.target_modules
        )
        rival = self.agents_shape.lora(config.grpo.rank, config.grpo.target_modules, "grpo.target_modules")
        prompt, told = self.longest_prompt
        text = self.composer_tokens or section.max_prompt_tokens
        work = Work(
            prompt=prompt,
            response=sampling.max_response_tokens,
            composer_text=text,
            num_latents=section.num_latents,
            calls=self.calls,
            messages=self.messages,
            turns=config.max_turns,
            batch=config.model.max_batch_size,
            truncated=bool(sampling.top_k) or sampling.top_p < 1,
            slots=section.slots or 0,
        )
        frozen = agents.weights + (0 if section.model is None else base.weights)
        asked = config.evaluate.batch_size
        evaluated = replace(work, response=config.evaluate.max_response_tokens or work.response)
        collected = max(1, config.collect.batch_size // config.collect.rollouts_per_task)
        shares = {name: ceil(getattr(config, name).tasks_per_step / self.processes) for name in ("lmpo", "grpo")}
        peaks = {
            "collect": play(agents, work, collected * config.collect.rollouts_per_task, collected, agents.weights),
            "train warmup": train_warmup(
                agents, composer, _lesson(work), frozen, config.warmup.micro_batch_positions,
                lessons=ceil(config.warmup.lessons_per_step / self.processes),
                shared=config.warmup.words_per_prompt, copies=config.warmup.copy_steps > 0,
            ),
            "train sft": train_sft(
                agents, composer, work, frozen, config.sft.micro_batch_positions,
                episodes=ceil(config.sft.trajectories_per_step / self.processes),
                a_task=config.collect.rollouts_per_task,
            ),
            "train lmpo": train_lmpo(
                agents, composer, work, frozen, config.lmpo.micro_batch_positions,
                tasks=shares["lmpo"], group_size=config.lmpo.group_size, passes=config.lmpo.num_iterations,
            ),
            "train grpo": train_grpo(
                Trained(agents, rival, config.grpo.rank, config.grpo.target_modules), work, agents.weights,
                config.grpo.micro_batch_positions, tasks=shares["grpo"], group_size=config.grpo.group_size,
            ),
            "evaluate": play(agents, evaluated, asked, asked, frozen, composer),
        }  # fmt: skip
        trained = {f"train {phase}" for name in config.evaluate.memories for phase in trainings(config, name.weights)}
        peaks = {name: peak for name, peak in peaks.items() if name in ("collect", "evaluate") or name in trained}
        said = self.messages * config.max_turns
        requests = config.lmpo.tasks_per_step * config.lmpo.group_size * said
        request = disk.embeds(prompt + work.num_latents, agents.shape.width, item)
        return Plan(
            run=config.run,
            device=device,
            dtype=dtype,
            peaks=peaks,
            fixed={"embedder": 4 * self.embedder, "libraries": _LIBRARIES[device]},
            disk={
                "bank, a collected episode": disk.bank_growth(said, prompt, work.response, self.vector),
                "checkpoints of a composer's training": disk.checkpoints(
                    composer.parameters, evaluates=bool(config.lmpo.eval_every or config.sft.eval_every)
                ),
                "an evaluated episode with latents": disk.kept_episode(said, prompt, evaluated.response, text),
            },
            wire={
                "a request with embeddings of [prompt ; m]": request,
                "the latents m of a request alone": disk.embeds(work.num_latents, agents.shape.width, item),
                f"a step of lmpo, {requests:,} requests": requests * request,
            }
            if isinstance(config.model.engine, VLLMEngineSection)
            else {},
            numbers={
                "agents_parameters": agents.shape.parameters,
                "composer_parameters": base.shape.parameters,
                "trained_parameters": composer.parameters,
                "trained_by_grpo": rival,
                "prompt_tokens": prompt,
                "composer_tokens": text,
                "agents_at_once": self.calls,
                "messages_a_turn": self.messages,
                "bytes_a_position": agents.column,
            },
            assumptions=tuple(_assumptions(self, config, work, told, device, dtype, "train warmup" in peaks)),
        )

    @cached_property
    def longest_prompt(self) -> tuple[int, str]:
        """The longest prompt, in tokens, and where that number comes from."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens, "as given by --prompt-tokens"
        path = Path(self.config.bank.path or Path(self.config.run) / "bank.sqlite")
        if path.is_file():
            with ExperienceBank(path) as bank:
                found = [m.num_prompt_tokens for t in islice(bank, _LOOKED_AT) for m in t.messages]
            if found:
                return max(found), f"the longest of the first {_LOOKED_AT} episodes in {path}"
        return ASSUMED_PROMPT, "assumed; measure and give --prompt-tokens"

    def to_fit(self, limit: int) -> str:
        """Say in one line whether all phases fit into `limit` bytes, and if not, with which keys they would."""
        plan, config = self.plan(), self.config
        needed, named = plan.total(plan.largest), f"{limit / _GiB:g} GiB"
        if needed <= limit:
            return f"fits {named}: the most is {needed / _GiB:.1f} GiB, in {plan.largest}"
        changed: dict[str, int] = {}
        best = needed
        while best > limit:
            smaller = [found for key in _LOWERED if (found := self._lowered(config, key, best)) is not None]
            if not smaller:
                break
            best, key, value = min(smaller)
            config, changed[key] = _with(config, key, value), value
        short = f"does not fit {named}: {plan.largest} takes {needed / _GiB:.1f} GiB"
        if best <= limit:
            return f"{short}; it fits with {' '.join(f'{key}={value}' for key, value in changed.items())}"
        return (
            f"{short}, and {best / _GiB:.1f} GiB with the smallest batches; take a smaller model, "
            "model.dtype=bfloat16, or spread the model over processes by FSDP (docs/training.md)"
        )

    def _lowered(self, config: Config, key: str, most: int) -> tuple[int, str, int] | None:
        """Return the first of a key's halves with which all phases take less than `most` bytes, after these bytes."""
        section, _, field = key.partition(".")
        value = getattr(getattr(config, section), field) // 2
        while value:
            plan = self.plan(_with(config, key, value))
            if (needed := plan.total(plan.largest)) < most:
                return needed, key, value
            value //= 2
        return None


def _place(device: str, dtype: str) -> tuple[str, str]:
    """Return the kind of device and the dtype that `auto` stands for."""
    try:
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in _LIBRARIES:
        raise ModelError(f"device {device!r} cannot be planned for; use auto, cpu or a GPU such as cuda:0")
    return kind, ("bfloat16" if kind == "cuda" else "float32") if dtype == "auto" else dtype


def _lesson(work: Work) -> Work:
    """Return the lengths of the warm-up, whose made-up lessons have one message: the words of the slots and the end."""
    further = max(0, work.slots - 1) * _LESSON["fact"]
    prompt, text = _LESSON["prompt"] + further, min(work.composer_text, _LESSON["text"] + further)
    return replace(work, prompt=prompt, composer_text=text, response=work.slots + 1, messages=1, turns=1)


def _own_parameters(config: Config, agents: Shape, base: Shape) -> int:
    """Return the number of a composer's parameters besides LoRA: queries, projection, gates and frames."""
    section = config.composer
    constants = agents.width if section.slots is None else section.slots + section.num_latents * agents.width
    return section.num_latents * base.width + agents.width * base.width + constants


def _speaking(config: Config, chosen: str | ProgramSection) -> tuple[int, int]:
    """Return how many agents of a team speak at once at most, and how many messages there are in a turn.

    A turn is played with empty words. What a program does is not known: each of its roles is taken to speak once.
    """
    if isinstance(chosen, ProgramSection):
        return 1, max(1, len(chosen.roles))
    team = load_team(chosen, **config.own.get(chosen, {}))
    turn = team.turn("", "", [])
    at_once, messages = 1, 0
    try:
        calls = next(turn)
        while True:
            at_once, messages = max(at_once, len(calls)), messages + len(calls)
            calls = turn.send(["1"] * len(calls))
    except StopIteration:
        return at_once, max(1, messages)
    except LatentMemError:
        raise
    except Exception:  # a team of the user's own may need words that mean something
        return len(team.roles), len(team.roles)


def _assumptions(
    planner: Planner, config: Config, work: Work, told: str, device: str, dtype: str, warms_up: bool
) -> Iterable[str]:
    """Yield a line for each thing that was assumed; `told` says where the length of prompts comes from."""
    given = "as given by --composer-tokens" if planner.composer_tokens else "the longest, composer.max_prompt_tokens"
    yield f"{device}, {dtype}; each of {planner.processes} processes holds the whole model (FSDP spreads it)"
    yield f"prompts of {work.prompt} tokens: {told}"
    yield f"composer texts of {work.composer_text} tokens: {given}"
    yield f"responses of {work.response} tokens, the longest allowed"
    if warms_up:
        lesson = _lesson(work)
        yield f"in the warm-up prompts of {lesson.prompt} tokens, composer texts of {lesson.composer_text}"
    yield f"{work.messages} messages in a turn of the team, at most {work.calls} of them at once"
    if device == "cuda":
        yield "a CUDA context of 600 MiB, and gaps of 10% in what comes and goes; neither was measured"
        yield "weights are read into the machine's memory first, then moved"
    else:
        yield "libraries of 560 MiB; gaps of 100 MiB and 35% of what comes and goes, as measured with glibc"
    for shape in {
        planner.agents_shape.name: planner.agents_shape,
        planner.base_shape.name: planner.base_shape,
    }.values():
        if not shape.is_fast:
            yield f"{shape.name} is read the plain way: keys, values and what is kept are rough"
        if shape.is_quantised:
            yield f"{shape.name} is quantised; its weights are counted as {dtype}"
    if config.bank.rating != "none":
        yield "rating what was retrieved is not counted"


def _with(config: Config, key: str, value: Any) -> Config:
    section, _, field = key.partition(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={field: value})})


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", _GiB), ("MiB", _MiB), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} B"
