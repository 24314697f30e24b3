"""One experiment: the models, what is compared, and all sections as one configuration."""

from datetime import date as Date  # noqa: N812 - a field is called date
from typing import Annotated, Any, Literal, Self

from pydantic import model_validator

from latentmem.config.data import DataSection, QASection
from latentmem.config.engine import EngineSection, LocalEngineSection
from latentmem.config.memory import BankSection, MemorySection, RivalsSection
from latentmem.config.section import (
    AsTuple,
    Day,
    MemoryNames,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)
from latentmem.config.serve import ServeSection
from latentmem.config.team import ProgramSection, TeamChoice, TeamChoices
from latentmem.config.training import (
    CollectSection,
    GRPOSection,
    LMPOSection,
    Sampling,
    SFTSection,
    WarmupSection,
)
from latentmem.errors import suggest
from latentmem.memory_names import DEFAULT_MEMORIES
from latentmem.own import is_own


class ModelSection(Section):
    """The agents' frozen language model."""

    name: PathText = "smollm2-135m"
    """`smollm2-135m` (embedded), a hub id, a local folder, or a .gguf file."""
    device: str = "auto"
    """A torch device, or `auto`: the GPU of this process if there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 on the CPU."""
    max_batch_size: PositiveInt = 64
    """Number of responses sampled at once; it changes the memory used, not the result."""
    fused: Literal["auto", "never"] = "auto"
    """`auto` replaces small operations of the model by faster ones that compute the same, on a CPU in float32, where
    measurements showed a gain; `never` leaves the model as it is."""
    date: Day = Date(2026, 1, 1)
    """The date, as YYYY-MM-DD, that a chat template gets if it asks for today's. It is fixed, so that prompts do not
    depend on the day of the run."""
    thinking: bool = False
    """Whether the model may think before it answers; only for chat templates that know `enable_thinking`."""
    engine: EngineSection = LocalEngineSection()
    """What samples the responses: `{kind: local}`, the model in this process; `{kind: vllm, urls: [...]}`, servers; or
    `{kind: openai, url: ...}`, any server of OpenAI's form, without latents and training."""


class ComposerSection(Section):
    """The network that turns retrieved trajectories into latent tokens."""

    model: PathText | None = None
    """Base model of the composer, named as in `model.name`; null: the composer and the agents share one copy of the
    agents' model."""
    num_latents: PositiveInt = 8
    """K, the number of latent tokens given to one agent."""
    rank: PositiveInt = 16
    """Rank r of LoRA."""
    alpha: PositiveFloat = 32.0
    """Scale of LoRA, applied as alpha / rank."""
    target_modules: Annotated[tuple[str, ...], AsTuple] = ("q_proj", "v_proj")
    """Linear layers that get an adapter."""
    template: str | None = None
    """The text that the composer reads; fields {task} {memory} {role} {role_messages} {num_latents}. null: the built-in
    text."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest text for the composer, in tokens; retrieved trajectories are shortened to fit, and the shortened ones are
    counted."""
    initial_scale: PositiveFloat = 0.1
    """Untrained latents are K line breaks plus a little of the composer's hidden states. This is the root mean square
    of that addition, relative to that of the agents' token embeddings."""
    slots: PositiveInt | None = None
    """Number of latents, from the first, that are slots for words. A slot holds the word that the composer would say
    next, as a mean of the agents' token embeddings, inside a frame that `train warmup` trains until the agents read the
    slot. null: the paper's form, a projection with one bias for all latents."""
    sharpness: PositiveFloat = 2.0
    """Factor on the logits of a slot's word: a larger one makes the slot more like a single token, and leaves less to
    learn from."""
    cue: Text | None = None
    """A phrase that a remembered word would follow, such as "The answer is". The composer reads it after its text,
    except for its last token; each query vector starts as the embedding of that token. null: query vectors start at
    random."""


class EvaluateSection(Section):
    """Comparing memories on the test split, or on the dev split."""

    memories: MemoryNames = DEFAULT_MEMORIES
    """The memories to compare: none; text; latent:untrained, latent:warmup, latent:sft, latent:lmpo (checkpoints of
    this run) or latent:FOLDER; the rivals metagpt, voyager, generative, oagents, gmemory; grpo (the agents that this
    run trained, without memory) or grpo:FOLDER; `module:Name`, a class of your own. A control is text, metagpt or a
    latent memory followed by :empty, :shuffle, :irrelevant, :corrupt or :filler; :other-role, :random and :zero are
    controls of latent memories only."""
    split: Literal["test", "dev"] = "test"
    """The split to evaluate on. Use `dev` to choose settings, and look at `test` only once. If the data have no dev
    split, `dev` is the last `lmpo.eval_tasks` train tasks, which `lmpo` sets aside. Results of `dev` go to
    results-dev.json."""
    num_tasks: PositiveInt | None = None
    """Number of tasks, from the start of the split; null: all."""
    batch_size: PositiveInt = 32
    """Number of episodes played side by side; an interrupted evaluation repeats the last batch."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the evaluated agents; 0 is greedy."""
    max_response_tokens: PositiveInt | None = None
    """Longest response of one agent, its end-of-sequence token included; null: as in `sampling`. If a memory was
    trained to give short answers, leave room for the longer answers of the others; otherwise the comparison is
    unfair."""
    online: bool = False
    """Whether each memory stores its test trajectories while it plays, in a copy of the bank."""
    num_bootstraps: PositiveInt = 10_000
    """Number of resamples of the tasks, for intervals and p-values."""


class Config(Section):
    """One experiment."""

    run: PathText
    """Folder of the run. It is created if it does not exist; otherwise the run in it continues."""
    seed: int = 0
    """Seed of all randomness except that of the tasks."""
    team: TeamChoice = "autogen"
    """autogen, camel, macnet, dylan, pair, solo, the path of a team's YAML file, `module:Name` of a class of your own,
    or a section of kind `program`."""
    train_teams: TeamChoices = ()
    """Teams that collect and train in place of `team`; `team` is then only evaluated. Each task goes to one of these
    teams. Empty: `team` does everything."""
    max_turns: PositiveInt = 1
    """Largest number of turns with the environment in an episode."""
    own: dict[str, dict[str, Any]] = {}
    """Parameters of teams and memories of your own, by their `module:Name`; parameters of your own data go into
    `data`."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], AsTuple] = ()
    """Trackers that receive every number of metrics.jsonl, the configuration and the comparison, besides the run's own
    files. Each needs an extra of the same name: `pip install 'latentmem[tensorboard]'`. The key does not change any
    result, and may change when a phase continues."""
    data: DataSection
    model: ModelSection = ModelSection()
    composer: ComposerSection = ComposerSection()
    bank: BankSection = BankSection()
    memory: MemorySection = MemorySection()
    rivals: RivalsSection = RivalsSection()
    sampling: Sampling = Sampling()
    collect: CollectSection = CollectSection()
    warmup: WarmupSection = WarmupSection()
    sft: SFTSection = SFTSection()
    lmpo: LMPOSection = LMPOSection()
    grpo: GRPOSection = GRPOSection()
    evaluate: EvaluateSection = EvaluateSection()
    serve: ServeSection = ServeSection()

    @model_validator(mode="after")
    def _own_is_named(self) -> Self:
        teams = [team for team in (self.team, *self.train_teams) if isinstance(team, str)]
        named = [name for name in (*teams, *map(str, self.evaluate.memories)) if is_own(name)]
        for name in self.own:
            if name not in named:
                raise ValueError(
                    f"own has parameters for {name!r}, which is not a team or memory of this configuration; "
                    f"{suggest(name, named) if named else 'this configuration names none of your own'}"
                )
        return self

    @model_validator(mode="after")
    def _turns_to_search_and_answer(self) -> Self:
        if isinstance(self.data, QASection) and self.data.search is not None and self.max_turns < 2:
            raise ValueError(
                "max_turns is 1; data.search needs a turn to search and one to answer, set it to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _programs_play_one_turn(self) -> Self:
        for team in (self.team, *self.train_teams):
            if isinstance(team, ProgramSection) and self.max_turns > 1:
                raise ValueError(
                    f"max_turns is {self.max_turns}, but team {team.label} is a program, which plays an episode in one "
                    "turn; set max_turns to 1"
                )
        return self


FILLS_BANK = ("seed", "team", "train_teams", "max_turns", "data", "model", "sampling", "collect")
"""Sections and keys that, with some of `bank`, decide what collecting without memory leaves in a bank."""
FILLS_BANK_IN_BANK = ("embedder", "experience_tasks")
"""Those of `bank`."""
