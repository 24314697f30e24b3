"""The phases of a run, part by part: what one process holds at its peak while it plays, and while it trains.

A phase's peak is the sum of its parts. Parts that are never there together are compared, and the larger ones count.
"""

from dataclasses import dataclass
from math import ceil

from latentmem.planning.memory import Backbone

_FLOAT = 4
_KEPT_POSITIONS = 4096
"""Positions of prompts' beginnings that a step of LMPO keeps; see `models.prefix.Kept`."""
_COMPOSED_TOGETHER = 8
"""Texts that a latent memory composes at once; see `memory.latent.LatentMemory`."""
_STAY = 0.75
"""Largest share of rows that is copied, beside all rows, when some have ended; see `models.decoding.decode`."""


@dataclass(frozen=True)
class Work:
    """What is played in one process; lengths are in tokens."""

    prompt: int
    """Longest prompt of an agent."""
    response: int
    """Longest response, `sampling.max_response_tokens`."""
    composer_text: int
    """Longest text that the composer reads."""
    num_latents: int
    """K."""
    calls: int
    """Largest number of agents of one episode that speak at the same time."""
    messages: int
    """Messages of one turn of an episode."""
    turns: int
    """Turns of an episode, `max_turns`."""
    batch: int
    """`model.max_batch_size`, the number of responses sampled at once."""
    truncated: bool = False
    """Whether sampling uses top-k or top-p."""
    slots: int = 0
    """Number of latents that are slots for words."""


@dataclass(frozen=True)
class Trained:
    """LoRA, and what is trained besides, on a backbone; all of it in float32."""

    base: Backbone
    parameters: int
    """Number of trained parameters."""
    rank: int
    target_modules: tuple[str, ...]

    @property
    def weights(self) -> int:
        """Bytes of the trained parameters."""
        return self.parameters * _FLOAT

    def graph(self, rows: int, length: int, slots: int = 0) -> int:
        """Return the bytes that reading [rows, length] columns keeps for the backward pass."""
        a_position = self.base.kept_by_position(self.target_modules, self.rank) + self.base.column
        words = 5 * rows * slots * self.base.shape.vocabulary * _FLOAT
        return rows * length * a_position + self.base.mask(rows, length, length) + words


@dataclass(frozen=True)
class Peak:
    """What one process holds at the peak of a phase, in bytes, besides the embedder and the libraries."""

    weights: int
    """The frozen weights: agents, and a composer's base of its own."""
    trained: int
    """Trained parameters; where they are trained, with gradients, AdamW's moments and copies."""
    columns: int
    """Keys and values."""
    kept: int
    """What is kept for a backward pass."""
    passing: int
    """What comes and goes inside a layer, and logits."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.trained + self.columns + self.kept + self.passing


def play(agents: Backbone, work: Work, episodes: int, tasks: int, frozen: int, trained: Trained | None = None) -> Peak:
    """Return the peak of a team that plays without training, as in `collect` and `evaluate`.

    Args:
        agents: who speaks.
        work: lengths and widths.
        episodes: episodes played side by side.
        tasks: tasks among them; rollouts of one task share their prompt, and it is read once.
        frozen: bytes of all frozen weights.
        trained: the composer, if there is one.
    """
    columns, passing = _sampling(agents, work, episodes, tasks, has_latents=trained is not None, keeps=False)
    if trained is not None:
        texts = min(_COMPOSED_TOGETHER, tasks * work.messages)
        reading = _reading(trained.base, texts, work.composer_text + work.num_latents)
        if reading > columns + passing:
            columns, passing = 0, reading
    return Peak(frozen, 0 if trained is None else trained.weights, columns, 0, passing)


def train_warmup(
    agents: Backbone,
    composer: Trained,
    work: Work,
    frozen: int,
    budget: int,
    *,
    lessons: int,
    shared: int,
    copies: bool,
) -> Peak:
    """Return the peak of a step of the warm-up: of its frame, or of its copy, which is a step of SFT.

    Args:
        agents: the frozen agents.
        composer: what is trained; in the frame stage, only constants.
        work: lengths and widths; one message an episode.
        frozen: bytes of all frozen weights.
        budget: `warmup.micro_batch_positions`.
        lessons: examples that this process learns from in a step.
        shared: examples of the frame that share a prompt.
        copies: whether there are steps of the copy.
    """
    begun, columns, kept, passing = _scoring(agents, work, budget, ceil(lessons / shared), shared)
    moments = [Peak(frozen, composer.weights, begun + columns, kept, passing)]
    if copies:
        moments.append(train_sft(agents, composer, work, frozen, budget, episodes=lessons, a_task=1))
    return max(moments, key=lambda moment: moment.total)


def train_sft(
    agents: Backbone, composer: Trained, work: Work, frozen: int, budget: int, *, episodes: int, a_task: int
) -> Peak:
    """Return the peak of a step of SFT: the composer's graph stays while responses are scored.

    Args:
        agents: the frozen agents.
        composer: what is trained.
        work: lengths and widths.
        frozen: bytes of all frozen weights.
        budget: `sft.micro_batch_positions`.
        episodes: episodes that this process learns from in a step.
        a_task: episodes of one task among them; they share the composer's texts.
    """
    texts, length = _texts(work, budget, ceil(episodes / a_task))
    begun, columns, kept, passing = _scoring(agents, work, budget, texts, a_task * work.turns)
    return Peak(
        frozen,
        4 * composer.weights,  # with gradients and two moments
        begun + columns,
        kept + composer.graph(texts, length, work.slots),
        max(passing, composer.base.passing(texts * length, True)),
    )


def train_lmpo(
    agents: Backbone,
    composer: Trained,
    work: Work,
    frozen: int,
    budget: int,
    *,
    tasks: int,
    group_size: int,
    passes: int,
) -> Peak:
    """Return the peak of a step of LMPO: its rollout, its scoring or its composing, whichever is the largest.

    Args:
        agents: the frozen agents.
        composer: what is trained.
        work: lengths and widths.
        frozen: bytes of all frozen weights.
        budget: `lmpo.micro_batch_positions`.
        tasks: tasks that this process plays in a step.
        group_size: rollouts of each task.
        passes: `lmpo.num_iterations`; from the second pass on, the composer's graph stays while responses are scored.
    """
    texts, length = _texts(work, budget, tasks)
    begun, columns, kept, passing = _scoring(agents, work, budget, texts, group_size * work.turns)
    beginnings = min(_KEPT_POSITIONS, tasks * work.messages * work.prompt) * agents.column
    graph, composing = composer.graph(texts, length, work.slots), composer.base.passing(texts * length, True)
    drawn, drawing = _sampling(agents, work, tasks * group_size, tasks, has_latents=True, keeps=True)
    trained = 5 * composer.weights  # with gradients, two moments, and the parameters from before training
    moments = [Peak(frozen, trained, drawn, 0, drawing)]
    if passes > 1:
        moments.append(Peak(frozen, trained, beginnings + begun + columns, kept + graph, max(passing, composing)))
    else:
        moments.append(Peak(frozen, trained, beginnings + begun + columns, kept, passing))
        moments.append(Peak(frozen, trained, beginnings + begun, graph, composing))
    return max(moments, key=lambda moment: moment.total)


def train_grpo(lora: Trained, work: Work, frozen: int, budget: int, *, tasks: int, group_size: int) -> Peak:
    """Return the peak of a step of GRPO: its rollout, or its update, in which whole messages have gradients.

    Args:
        lora: the agents with what is trained of them.
        work: lengths and widths; there are no latents.
        frozen: bytes of the agents' frozen weights.
        budget: `grpo.micro_batch_positions`.
        tasks: tasks that this process plays in a step.
        group_size: rollouts of each task.
    """
    length = work.prompt + work.response
    rows = min(max(1, budget // length), tasks * group_size * work.messages * work.turns)
    tokens = rows * work.response
    kept = lora.graph(rows, length) + tokens * lora.base.shape.width * lora.base.item
    passing = max(lora.base.passing(rows * length, True), lora.base.scoring_logits(tokens))
    drawn, drawing = _sampling(lora.base, work, tasks * group_size, tasks, has_latents=False, keeps=False)
    trained = 5 * lora.weights
    moments = (Peak(frozen, trained, drawn, 0, drawing), Peak(frozen, trained, 0, kept, passing))
    return max(moments, key=lambda moment: moment.total)


def _texts(work: Work, budget: int, tasks: int) -> tuple[int, int]:
    """Return how many texts are composed together with gradients, and the length of each, queries included."""
    length = work.composer_text + work.num_latents
    return min(max(1, budget // length), tasks * work.messages), length


def _reading(base: Backbone, rows: int, length: int) -> int:
    """Return the bytes that come and go while [rows, length] columns are read without gradients."""
    return base.passing(rows * length, False) + 2 * base.mask(rows, length, length)


def _sampling(
    agents: Backbone, work: Work, episodes: int, tasks: int, *, has_latents: bool, keeps: bool
) -> tuple[int, int]:
    """Return the bytes of keys and values while responses are drawn, and of what comes and goes.

    `keeps` says whether the beginnings that rollouts share are kept for scoring.
    """
    rows = min(work.batch, episodes * work.calls)
    different = min(rows, tasks * work.calls)
    room = work.prompt + work.response + (work.num_latents if has_latents else 0)
    shares = rows > different
    begun = different * work.prompt if shares else 0
    # Rows that go on are copied once a quarter has ended; rollouts that share a prompt are copied from one row.
    copied = max(_STAY * rows, different if shares else 0)
    kept = min(_KEPT_POSITIONS, tasks * work.messages * work.prompt) if keeps else 0
    columns = round((begun + kept + (rows + copied) * room) * agents.column)
    return columns, max(_reading(agents, different, work.prompt), agents.drawing(rows, work.truncated))


def _scoring(agents: Backbone, work: Work, budget: int, texts: int, messages_a_text: int) -> tuple[int, int, int, int]:
    """Return the bytes of scoring one micro-batch: beginnings, prompts and responses, what is kept, what passes."""
    length = work.num_latents + work.response
    rows = min(max(1, budget // length), texts * messages_a_text)
    positions, tokens = rows * length, rows * work.response
    kept = positions * agents.kept_by_position() + agents.mask(rows, length, work.prompt + length)
    kept += tokens * agents.shape.width * agents.item  # the derivative of the log-probabilities
    passing = max(agents.passing(positions, True), agents.scoring_logits(tokens))
    return texts * work.prompt * agents.column, rows * (work.prompt + length) * agents.column, kept, passing
