"""How teams play and what is trained: sampling, collecting, and a section for each training."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from latentmem.config.section import AsTuple, NonNegativeFloat, PathText, PositiveFloat, PositiveInt, Section


class Sampling(Section):
    """How responses are drawn: the temperature first, then top-k, then top-p."""

    temperature: NonNegativeFloat = 0.7
    """Sampling temperature; 0 is greedy. The log-probabilities that training uses are taken at this temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draws from the smallest set of most likely tokens whose probabilities add up to this; 1 keeps all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draws from this many of the most likely tokens; 0 keeps the whole vocabulary."""
    max_response_tokens: PositiveInt = 64
    """Longest response of one agent, its end-of-sequence token (EOS) included."""


class CollectSection(Section):
    """How the bank is filled: the team plays, and its episodes are stored."""

    num_tasks: PositiveInt | None = None
    """Number of tasks to play, from the start of the experience split, or of the train split if there is none; null:
    all."""
    rollouts_per_task: PositiveInt = 1
    """Number of episodes of each task."""
    batch_size: PositiveInt = 16
    """Number of episodes played side by side and stored in one transaction."""
    memory: Literal["none", "text", "latent", "metagpt", "voyager", "generative", "oagents", "gmemory"] = "none"
    """Memory of the team while it collects; `latent` has an untrained composer."""


class OptimizerFields(Section):
    """What all trainers share."""

    learning_rate: PositiveFloat = 2e-4
    """Learning rate of the LoRA matrices and, in a composer, of `query_latents`."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate changes after `warmup_steps`; `linear` and `cosine` end at zero."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    """Number of steps in which the learning rate rises from zero."""
    max_grad_norm: PositiveFloat = 1.0
    """Larger gradients are scaled down to this L2 norm."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    micro_batch_positions: PositiveInt = 512
    """Number of positions with gradients in one forward pass; it changes the memory used, not the result (except for
    `bnpo`)."""
    eval_every: PositiveInt | None = None
    """Number of steps between evaluations on the `eval_tasks` tasks set aside; the best checkpoint is selected. null:
    no evaluation, and the last checkpoint is selected."""
    eval_tasks: PositiveInt = 32
    """Number of tasks set aside if `eval_every` is set. They are the first tasks of the dev split, or all that it has.
    If the data have no dev split, they are the last tasks of the train split and are not trained on. `sft` from the
    bank always takes the last train tasks."""
    save_every: PositiveInt = 5
    """Number of steps between checkpoints."""


class ComposerOptimizerFields(OptimizerFields):
    """What the trainers of a composer share."""

    projection_rate: PositiveFloat = 0.2
    """Learning rate of the projection, as a multiple of `learning_rate`. The projection's weights are small, and each
    number of a latent sums over all of d_composer, so at the full rate one step may move the latents by several times
    their size. docs/results/tried.md says what was tried."""


class GroupFields(Section):
    """Reinforcement learning on groups of rollouts that are compared with each other."""

    num_steps: PositiveInt = 100
    """Number of optimizer steps."""
    tasks_per_step: PositiveInt = 8
    """Number of tasks played for one step, over all processes."""
    group_size: int = 8
    """G, the number of rollouts of one task that are compared with each other."""
    num_iterations: PositiveInt = 1
    """Number of update passes over one batch of rollouts."""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "dapo"
    """Decides what the loss is divided by; see `training.losses.lmpo_loss`."""
    scale_advantages: bool = True
    """Whether advantages are divided by the group's standard deviation."""
    epsilon_low: NonNegativeFloat = 0.2
    """A ratio below 1 - epsilon_low is clipped."""
    epsilon_high: NonNegativeFloat = 0.2
    """A ratio above 1 + epsilon_high is clipped."""
    delta: PositiveFloat | None = None
    """Two-sided clip: the largest ratio that counts where the advantage is negative; null: no bound."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the composer, or the agents, as they were before this training."""
    importance_cap: PositiveFloat | None = None
    """Largest weight of a token in truncated importance sampling; 2 is usual. It corrects for sampling probabilities
    that differ slightly from those that training computes, as in bfloat16, and costs one forward pass a step. null: 2
    if servers sample (`model.engine`) and the model is in bfloat16, else no correction."""
    max_resamples: Annotated[int, Field(ge=0)] = 0
    """Largest number of extra draws of `tasks_per_step` tasks while fewer than that many groups have rewards that
    differ (dynamic sampling)."""

    @field_validator("group_size")
    @classmethod
    def _at_least_two(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"is {value}; advantages need at least 2 rollouts per task, set it to 4 or more")
        return value

    @model_validator(mode="after")
    def _delta_above_band(self) -> Self:
        if self.delta is not None and self.delta <= 1 + self.epsilon_high:
            raise ValueError(f"has delta {self.delta}; it must be above 1 + epsilon_high = {1 + self.epsilon_high}")
        return self


class WarmupSection(Section):
    """Training before any data: first the frame around a composer's slots, so that the frozen agents read words from
    it, then the composer, so that it fills the slots.
    """

    frame_steps: PositiveInt = 50
    """Number of steps that train the frame: constants around the embedding of a random word, with which the agents say
    that word."""
    frame_rate: PositiveFloat = 1e-2
    """Learning rate of the frame steps."""
    copy_steps: Annotated[int, Field(ge=0)] = 20
    """Number of steps in which the composer reads made-up episodes and the agents have to say a word that these
    told."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of the LoRA matrices and `query_latents` in the copy steps."""
    projection_rate: PositiveFloat = 0.1
    """Learning rate of projection, gates and frames, as a multiple of `learning_rate`."""
    lessons_per_step: PositiveInt = 16
    """Number of examples in one step, over all processes; a multiple of `words_per_prompt`."""
    words_per_prompt: PositiveInt = 8
    """Number of words tried after one prompt while the frame is trained; the prompt is read once for all of them."""
    max_grad_norm: PositiveFloat = 1.0
    """Larger gradients are scaled down to this L2 norm."""
    micro_batch_positions: PositiveInt = 512
    """Number of positions with gradients in one forward pass; it changes the memory used, not the result."""
    eval_every: PositiveInt | None = 20
    """Number of steps between evaluations on words that are never trained on. Each stage that has steps is also
    evaluated before its first and after its last. null: no evaluation, and the last checkpoint is selected."""
    eval_lessons: PositiveInt = 16
    """Number of examples in one evaluation. As many as `lessons_per_step` cost less time than one step does."""
    save_every: PositiveInt = 20
    """Number of steps between checkpoints."""

    @model_validator(mode="after")
    def _whole_prompts(self) -> Self:
        if self.lessons_per_step % self.words_per_prompt:
            raise ValueError(
                f"has lessons_per_step {self.lessons_per_step}; set it to a multiple of words_per_prompt, "
                f"{self.words_per_prompt}"
            )
        return self


class SFTSection(ComposerOptimizerFields):
    """Supervised fine-tuning of the composer, on successful trajectories or on demonstrated ones."""

    initial: PathText = "untrained"
    """Where training starts: `untrained`, `warmup` (this run's), or a composer's folder."""
    demonstrations: PathText = "bank"
    """What SFT learns from: `bank` (the successes in it), `domain` (what the data itself demonstrates, as
    `hidden_facts` does), or a .jsonl file of demonstrated responses, with rows of `task` and `responses`; see
    docs/training.md."""
    num_steps: PositiveInt = 50
    """Number of optimizer steps."""
    trajectories_per_step: PositiveInt = 8
    """Number of episodes learned from in one step, over all processes."""

    @field_validator("initial")
    @classmethod
    def _starts_before(cls, value: str) -> str:
        if value in ("sft", "lmpo", "grpo"):
            raise ValueError(f"is {value!r}; expected untrained, warmup or a composer's folder")
        return value

    @field_validator("demonstrations")
    @classmethod
    def _known_source(cls, value: str) -> str:
        if value not in ("bank", "domain") and not value.endswith(".jsonl"):
            raise ValueError(f"is {value!r}; expected bank, domain or the path of a .jsonl file")
        return value


class LMPOSection(GroupFields, ComposerOptimizerFields):
    """Reinforcement learning through the latents (arXiv 2602.03036, section 4)."""

    initial: PathText = "sft"
    """Where training starts: `sft` or `warmup` (this run's), `untrained`, or a composer's folder."""
    max_staleness: Literal[0, 1] = 0
    """1 plays the rollouts of the next step while a step updates, so their latents are one update old. It needs a
    server that samples (`model.engine`). 0 plays them after the update."""

    @model_validator(mode="after")
    def _one_draw_ahead(self) -> Self:
        if self.max_staleness and self.max_resamples:
            raise ValueError(
                f"has max_staleness 1 and max_resamples {self.max_resamples}; a step that is played ahead cannot draw "
                "further tasks, set one of the two to 0"
            )
        return self


class GRPOSection(GroupFields, OptimizerFields):
    """The parametric rival: the same reinforcement learning on one LoRA of the agents themselves, without any memory
    (arXiv 2402.03300).
    """

    rank: PositiveInt = 16
    """Rank r of LoRA."""
    alpha: PositiveFloat = 32.0
    """Scale of LoRA, applied as alpha / rank."""
    target_modules: Annotated[tuple[str, ...], AsTuple, Field(min_length=1)] = ("q_proj", "v_proj")
    """Linear layers that get an adapter."""
    micro_batch_positions: PositiveInt = 1024
    """Number of positions with gradients in one forward pass; prompts count too, and a beginning that several share
    counts once. It changes the memory used, not the result (except for `bnpo`)."""
