"""How teams play and what is trained: sampling, collecting, and a section for each training."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from latentmem.config.section import AsTuple, NonNegativeFloat, PathText, PositiveFloat, PositiveInt, Section


class Sampling(Section):
    """How responses are drawn: the temperature first, then top-k, then top-p."""

    temperature: NonNegativeFloat = 0.7
    """0 is greedy. It is part of the log-probabilities that training uses."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest most likely tokens that have this much probability together; 1 keeps all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 keeps the whole vocabulary."""
    max_response_tokens: PositiveInt = 64
    """Longest response of one agent, its EOS included."""


class CollectSection(Section):
    """Filling the bank."""

    num_tasks: PositiveInt | None = None
    """Tasks to play, from the start of the experience split, or of the train split where there is none; null is all."""
    rollouts_per_task: PositiveInt = 1
    """Episodes of each task."""
    batch_size: PositiveInt = 16
    """Episodes played side by side, and stored as one transaction."""
    memory: Literal["none", "text", "latent", "metagpt", "voyager", "generative", "oagents", "gmemory"] = "none"
    """Memory of the team while it collects; `latent` is with an untrained composer."""


class OptimizerFields(Section):
    """What all trainers share."""

    learning_rate: PositiveFloat = 2e-4
    """Of the LoRA matrices and, in a composer, `query_latents`."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Of the learning rate after the warm-up; linear and cosine end at zero."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    """Steps in which the rate rises from zero."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this L2 norm."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW."""
    micro_batch_positions: PositiveInt = 512
    """Positions with gradients in one forward pass; a matter of memory, not of the result (but for `bnpo`)."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations on `eval_tasks` tasks set aside; the best checkpoint is selected. null: never, and the
    last one is."""
    eval_tasks: PositiveInt = 32
    """Tasks set aside if `eval_every` is set: the first of the dev split, or all that it has; where the data have none,
    the last of the train split, which then are not trained on. `sft` from the bank takes the last train tasks
    always."""
    save_every: PositiveInt = 5
    """Steps between checkpoints."""


class ComposerOptimizerFields(OptimizerFields):
    """What the trainers of a composer share."""

    projection_rate: PositiveFloat = 0.2
    """Learning rate of the projection, as a multiple of `learning_rate`; its weights are small, and each latent number
    sums over all of d_composer, so at the full rate one step may move the latents by several times their size. What
    was tried: docs/results/tried.md."""


class GroupFields(Section):
    """Reinforcement learning on groups of rollouts that are compared with each other."""

    num_steps: PositiveInt = 100
    """Optimizer steps."""
    tasks_per_step: PositiveInt = 8
    """Tasks rolled out for one step, over all processes."""
    group_size: int = 8
    """G, rollouts of one task that are compared with each other."""
    num_iterations: PositiveInt = 1
    """Update passes over one batch of rollouts."""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "dapo"
    """What the loss is divided by; see `training.losses.lmpo_loss`."""
    scale_advantages: bool = True
    """Divide by the group's standard deviation."""
    epsilon_low: NonNegativeFloat = 0.2
    """A ratio below 1 - epsilon_low is clipped."""
    epsilon_high: NonNegativeFloat = 0.2
    """A ratio above 1 + epsilon_high is clipped."""
    delta: PositiveFloat | None = None
    """Two-sided clip: largest ratio that counts where the advantage is negative; null is no bound."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence to what is trained as it was before."""
    importance_cap: PositiveFloat | None = None
    """Largest weight of a token in truncated importance sampling, which corrects for responses that were sampled with
    slightly other probabilities than training computes, as in bfloat16; 2 is usual. Costs a forward pass a step. null:
    no correction."""
    max_resamples: Annotated[int, Field(ge=0)] = 0
    """Extra draws of `tasks_per_step` tasks while fewer than that many groups carry signal (dynamic sampling)."""

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
    """Before any data: the agents learn to read the slots of a composer, and the composer to fill them with words."""

    frame_steps: PositiveInt = 50
    """Steps in which constants around the embedding of a random word are trained until the agents say that word."""
    frame_rate: PositiveFloat = 1e-2
    """Learning rate of these steps."""
    copy_steps: Annotated[int, Field(ge=0)] = 20
    """Steps in which the composer reads made-up episodes and the agents have to say a word that these told."""
    learning_rate: PositiveFloat = 1e-3
    """Of the LoRA matrices and `query_latents` in these steps."""
    projection_rate: PositiveFloat = 0.1
    """Learning rate of projection, gates and frames, as a multiple of `learning_rate`."""
    lessons_per_step: PositiveInt = 16
    """Examples in one step, over all processes."""
    words_per_prompt: PositiveInt = 8
    """Words tried after one prompt while the frame is trained; the prompt is read once for them."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this L2 norm."""
    micro_batch_positions: PositiveInt = 512
    """Positions with gradients in one forward pass; a matter of memory, not of the result."""
    eval_every: PositiveInt | None = 20
    """Steps between evaluations on words that are never trained on."""
    save_every: PositiveInt = 20
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _whole_prompts(self) -> Self:
        if self.lessons_per_step % self.words_per_prompt:
            raise ValueError(
                f"has lessons_per_step {self.lessons_per_step}; make it a multiple of words_per_prompt, "
                f"{self.words_per_prompt}"
            )
        return self


class SFTSection(ComposerOptimizerFields):
    """Supervised warm start on successful trajectories, or on demonstrated ones."""

    initial: PathText = "untrained"
    """Where training starts: `untrained`, `warmup` (this run's), or a composer's folder."""
    demonstrations: PathText = "bank"
    """What is learned: `bank` (the successes in it), `domain` (what the data itself demonstrates, as `hidden_facts`
    does), or a .jsonl file of demonstrated responses, rows of `task` and `responses`; see docs/training.md."""
    num_steps: PositiveInt = 50
    """Optimizer steps."""
    trajectories_per_step: PositiveInt = 8
    """Episodes learned from in one step, over all processes."""

    @field_validator("initial")
    @classmethod
    def _starts_before(cls, value: str) -> str:
        if value in ("sft", "lmpo", "grpo"):
            raise ValueError(
                f"is {value!r}, which is no start of sft; expected untrained, warmup or a composer's folder"
            )
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


class GRPOSection(GroupFields, OptimizerFields):
    """The parametric rival: the same reinforcement learning on one LoRA of the agents themselves, without any memory
    (arXiv 2402.03300).
    """

    rank: PositiveInt = 16
    """r of LoRA."""
    alpha: PositiveFloat = 32.0
    """Scale of LoRA, applied as alpha / rank."""
    target_modules: Annotated[tuple[str, ...], AsTuple, Field(min_length=1)] = ("q_proj", "v_proj")
    """Linear layers that get an adapter."""
    micro_batch_positions: PositiveInt = 1024
    """Positions with gradients in one forward pass, those of prompts included, shared beginnings counted once; a matter
    of memory, not of the result (but for `bnpo`)."""
