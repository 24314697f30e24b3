"""One experiment: the models, what is compared, and all sections as one configuration."""

from typing import Annotated, Any, Literal, Self

from pydantic import model_validator

from latentmem.config.data import DataSection, QASection
from latentmem.config.memory import BankSection, MemorySection, RivalsSection
from latentmem.config.section import (
    AsTuple,
    MemoryNames,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)
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
    """`auto` takes the GPU of this process if there is one, else the CPU; or a torch device."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 on the CPU."""
    max_batch_size: PositiveInt = 64
    """Responses sampled at once; a matter of memory, not of the result."""
    fused: Literal["auto", "never"] = "auto"
    """`auto` lets fast operations stand in for the model's small ones where that was measured to pay, on a CPU in
    float32, and only those that compute the same; `never` leaves the model as it is."""


class ComposerSection(Section):
    """The network that turns retrieved trajectories into latent tokens."""

    model: PathText | None = None
    """Base model of the composer, named as in `model.name`; null shares the agents' backbone in memory."""
    num_latents: PositiveInt = 8
    """K, the latent tokens given to one agent."""
    rank: PositiveInt = 16
    """r of LoRA."""
    alpha: PositiveFloat = 32.0
    """Scale of LoRA, applied as alpha / rank."""
    target_modules: Annotated[tuple[str, ...], AsTuple] = ("q_proj", "v_proj")
    """Linear layers that get an adapter."""
    template: str | None = None
    """Text the composer reads; fields {task} {memory} {role} {role_messages} {num_latents}. null: the built-in one."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest composer text, in tokens; the retrieved trajectories are shortened to fit, and counted."""
    initial_scale: PositiveFloat = 0.1
    """Root mean square of what the hidden states add to the untrained latents, relative to that of the agents' token
    embeddings; without it they are K line breaks."""
    slots: PositiveInt | None = None
    """The first so many latents are slots for words: what the composer would say next, as a soft token of the agents,
    in a frame that `train warmup` teaches them to read. null: the paper's form, a projection with one bias for all."""
    sharpness: PositiveFloat = 2.0
    """Logits of a slot's word are multiplied by it: more is nearer to one token, and leaves less to learn from."""
    cue: Text | None = None
    """What the composer reads after its text, but for its last token: as that token each query begins. A phrase that a
    remembered word would follow, such as "The answer is". null: queries begin at random."""


class EvaluateSection(Section):
    """Comparing memories on the test split, or on the dev split."""

    memories: MemoryNames = DEFAULT_MEMORIES
    """none, text, latent:untrained, latent:warmup, latent:sft, latent:lmpo (checkpoints of this run), latent:FOLDER, or
    one of the rivals metagpt, voyager, generative, oagents, gmemory; grpo (the agents that this run trained, without
    memory) or grpo:FOLDER; `module:Name` is a class of one's own. text, metagpt or a latent one followed by :empty,
    :shuffle, :irrelevant, :corrupt or :filler is a control of it; :other-role, :random and :zero are controls of latent
    ones only."""
    split: Literal["test", "dev"] = "test"
    """What is evaluated on. `dev` is for choices: the test split is looked at once. Where the data have no dev split,
    it is the train tasks that `lmpo` sets aside, the last `lmpo.eval_tasks`. Results go to results-dev.json."""
    num_tasks: PositiveInt | None = None
    """Tasks of the split, from its start; null is all."""
    batch_size: PositiveInt = 32
    """Episodes played side by side; a batch is what an interrupted evaluation repeats."""
    temperature: NonNegativeFloat = 0.0
    """Of the evaluated agents; 0 is greedy."""
    max_response_tokens: PositiveInt | None = None
    """Longest response of one agent, its EOS included; null: as in `sampling`. A memory that was trained to short
    answers is compared fairly only with room for the longer ones of the others."""
    online: bool = False
    """Let each memory store its test trajectories as it goes, in a copy of the bank."""
    num_bootstraps: PositiveInt = 10_000
    """Resamples of the tasks, for intervals and p-values."""


class Config(Section):
    """One experiment."""

    run: PathText
    """Folder of the run; made if absent, continued if present."""
    seed: int = 0
    """Of all randomness but that of the tasks."""
    team: PathText = "autogen"
    """autogen, camel, macnet, dylan, pair, solo, the path of a team's YAML file, or `module:Name` of a class of one's
    own."""
    train_teams: Annotated[tuple[PathText, ...], AsTuple] = ()
    """Teams that collect and train in place of `team`, which then is evaluated only; each task is dealt to one of them.
    Empty: `team` does it all."""
    max_turns: PositiveInt = 1
    """Turns with the environment before an episode ends."""
    own: dict[str, dict[str, Any]] = {}
    """Parameters of teams and memories of one's own, by their `module:Name`; those of data stand in `data`."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], AsTuple] = ()
    """Trackers that are told every number of metrics.jsonl, the configuration and the comparison, besides the run's own
    files. Each is an extra of the same name: `pip install 'latentmem[tensorboard]'`. It decides nothing and may change
    when a phase goes on."""
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

    @model_validator(mode="after")
    def _own_is_named(self) -> Self:
        named = [self.team, *self.train_teams, *map(str, self.evaluate.memories)]
        named = [name for name in named if is_own(name)]
        for name in self.own:
            if name not in named:
                raise ValueError(
                    f"own has parameters of {name!r}, which is no team and no memory of this configuration; "
                    f"{suggest(name, named) if named else 'it names none of your own'}"
                )
        return self

    @model_validator(mode="after")
    def _turns_to_search_and_answer(self) -> Self:
        if isinstance(self.data, QASection) and self.data.search is not None and self.max_turns < 2:
            raise ValueError(
                "max_turns is 1; data.search needs a turn to search and one to answer, set it to 2 or more"
            )
        return self


FILLS_BANK = ("seed", "team", "train_teams", "max_turns", "data", "model", "sampling", "collect")
"""Sections and keys that, with some of `bank`, decide what collecting without memory leaves in a bank."""
FILLS_BANK_IN_BANK = ("embedder", "experience_tasks")
"""Those of `bank`."""
