"""The composer C_phi: a network from the text of what was retrieved, for one role, to K latent tokens.

A causal LM with LoRA reads the text and then K learned query vectors. The final hidden states at the queries, projected
to the agents' width, are the latent memory (arXiv 2602.03036, section 3). With `slots`, the first latents are slots for
words: each holds what the composer would say next, as a soft token of the agents, in a frame that tells them to read
it. A slot can copy any word that the composer can copy, while a projection has to learn a code for each word. By
default the composer runs on the agents' own backbone, with an adapter that is on only while the composer reads.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentmem.config import ComposerSection, MemorySection, parse_section
from latentmem.errors import CheckpointError, ConfigError
from latentmem.memory.checkpoints import fill_parameters, read_checkpoint, write_checkpoint
from latentmem.memory.memory import describe, said_by
from latentmem.models.attention import has_plain_head
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefix import check_window, pad
from latentmem.templates import check_template, fill
from latentmem.trajectory import Role, Task, Trajectory

logger = logging.getLogger(__name__)

TEMPLATE = """A team of agents works on a task. One of its members needs to remember what past episodes teach.

The task at hand:
{task}

The member:
{role}

Past episodes of the team:
{memory}

What this member said in them:
{role_messages}

In {num_latents} latent tokens, what helps this member with the task at hand:"""
FIELDS = ("task", "memory", "role", "role_messages", "num_latents")

DEFAULTS = ComposerSection()
_MUST_AGREE = (
    "num_latents",
    "d_composer",
    "d_agent",
    "rank",
    "alpha",
    "target_modules",
    "template",
    "words",
    "slots",
    "sharpness",
    "cue",
)
"""Settings that decide what the tensors of a checkpoint mean."""
_LATER = {"slots": None, "sharpness": 2.0, "cue": None}
"""Settings that older checkpoints lack, with the values that applied then."""


class Composer(nn.Module):
    """LoRA on a causal LM, `query_latents` [K, d_composer] and a projection d_composer -> d_agent.

    Without `slots`, a latent is the paper's `projection(h[k])`. With slots, `frame` [K, d_agent] replaces the one bias
    that all latents share, and the first `slots` latents are `gate[k] * word[k] + frame[k]`. Here `word` is the mean of
    the agents' token embeddings, weighted by the composer's own probabilities of the next token, sharpened.
    """

    def __init__(
        self,
        backbone: LanguageModel,
        agents: LanguageModel | None = None,
        *,
        num_latents: int = DEFAULTS.num_latents,
        rank: int = DEFAULTS.rank,
        alpha: float = DEFAULTS.alpha,
        target_modules: Sequence[str] = DEFAULTS.target_modules,
        template: str | None = DEFAULTS.template,
        max_prompt_tokens: int = DEFAULTS.max_prompt_tokens,
        initial_scale: float = DEFAULTS.initial_scale,
        slots: int | None = DEFAULTS.slots,
        sharpness: float = DEFAULTS.sharpness,
        cue: str | None = DEFAULTS.cue,
        seed: int = 0,
        words: MemorySection = MemorySection(),  # noqa: B008 - it is frozen
    ) -> None:
        """Put a new composer on a backbone.

        Args:
            backbone: the LM that gets the adapter; its own weights stay frozen.
            agents: the LM that will be given the latents; None if it is the backbone.
            num_latents: K.
            rank: LoRA's r.
            alpha: LoRA's scale is alpha / rank.
            target_modules: names of the linear layers that get an adapter.
            template: text the composer reads, with the fields of `FIELDS`; None is `TEMPLATE`.
            max_prompt_tokens: longest text; the retrieved trajectories are shortened to fit.
            initial_scale: root mean square of what the hidden states add to the untrained latents, relative to that of
                the agents' token embeddings.
            slots: number of latents, from the first, that hold words. None is the paper's form, without slots and
                frames.
            sharpness: logits of a slot's word are multiplied by it; a higher value comes nearer to a single token.
            cue: words that follow the composer's text. The composer reads all but the last token; each query starts as
                the embedding of that one. None adds nothing, and queries start at random.
            seed: seed of the initial weights.
            words: how episodes and roles are written into the text.

        Raises:
            ConfigError: the backbone lacks a target module, a template field is unknown, there are more slots than
                latents, or the cue has no token.
        """
        super().__init__()
        agents = agents or backbone
        self._backbone = [backbone]  # in a list: torch would save the frozen weights of a sub-module with ours
        self.agents_name = agents.name
        self.d_agent = agents.width
        self.d_composer = backbone.width
        self.num_latents = num_latents
        self.rank = rank
        self.alpha = alpha
        self.target_modules = tuple(target_modules)
        self.template = TEMPLATE if template is None else template
        self.words = words
        self.max_prompt_tokens = max_prompt_tokens
        self.num_shortened = 0
        """Number of texts so far whose trajectories had to be shortened."""
        self.slots = slots
        self.sharpness = sharpness
        self.cue = cue
        check_template(self.template, FIELDS, "composer.template")
        if slots is not None and not 0 < slots <= num_latents:
            raise ConfigError(
                f"composer.slots is {slots}, but there are {num_latents} latents; give 1 to {num_latents}"
            )
        if slots is not None and not has_plain_head(backbone.model):
            raise ConfigError(
                f"composer.slots needs a base whose logits are one matrix times its last state; {backbone.name} scales "
                "or caps its logits: set composer.slots to null, or take another base"
            )
        cue_ids = [] if cue is None else backbone.encode(cue)
        if cue is not None and not cue_ids:
            raise ConfigError("composer.cue is empty; give it some words, or null")
        self._cue_ids = cue_ids[:-1]
        # Trained in float32, or in the backbone's dtype where that is wider.
        self.dtype = torch.promote_types(backbone.model.dtype, torch.float32)
        with torch.random.fork_rng(devices=[backbone.device] if backbone.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._adapter = backbone.adapters.add(
                rank=rank, alpha=alpha, target_modules=target_modules, key="composer.target_modules"
            )
            queries = torch.randn(num_latents, self.d_composer)
            place: dict[str, Any] = {"device": backbone.device, "dtype": self.dtype}
            self.projection = nn.Linear(self.d_composer, self.d_agent, bias=slots is None, **place)
        embeddings = backbone.model.get_input_embeddings().weight.to(self.dtype)
        scale = embeddings.std()
        started = embeddings[cue_ids[-1]].expand(num_latents, -1) if cue_ids else queries.to(scale) * scale
        self.query_latents = nn.Parameter(started.clone())
        self._agents = [agents]
        if slots is not None:
            self.gate = nn.Parameter(torch.ones(slots, **place))
            self.frame = nn.Parameter(torch.zeros(num_latents, self.d_agent, **place))
            self._said_as = torch.tensor(first_tokens(backbone, agents), device=agents.device)
        self.eval()
        self._initialise_projection(agents, initial_scale)

    @property
    def adapter(self) -> str:
        """The name of the composer's adapter on the backbone."""
        return self._adapter.name

    @property
    def backbone(self) -> LanguageModel:
        """The LM that carries the adapter."""
        return self._backbone[0]

    def _initialise_projection(self, agents: LanguageModel, initial_scale: float) -> None:
        """Initialise latents as line breaks, which surprise a frozen model least, plus a little of the hidden states.

        The bias, or each frame, is the agents' embedding of a line break. The weight is a scaled identity, cut or
        filled up where widths differ. Measured in docs/results/tried.md: latents made of hidden states alone, as large
        as embeddings, double the agents' surprise at their own responses, most of all at the first token.
        """
        with torch.no_grad():
            embeddings = agents.model.get_input_embeddings().weight.to(self.dtype)
            self.projection.weight.copy_(torch.eye(self.d_agent, self.d_composer))
            if self.slots is None:
                self.projection.bias.zero_()
            hidden = self.read([fill(self.template, **dict.fromkeys(FIELDS, self.words.nothing))])
            spread = self.projection(hidden).square().mean().sqrt()
            wanted = embeddings.square().mean().sqrt().to(spread.device) * initial_scale
            self.projection.weight.mul_(wanted / spread)
            constant = self.projection.bias if self.slots is None else self.frame
            constant.copy_(embeddings[agents.encode("\n")[-1]])

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name: query_latents, projection, gates and frames, and LoRA matrices."""
        own = {"query_latents": self.query_latents}
        own |= {f"projection.{name}": parameter for name, parameter in self.projection.named_parameters()}
        if self.slots is not None:
            own |= {"gate": self.gate, "frame": self.frame}
        return own | {f"lora.{name}": matrix for name, matrix in self._adapter.matrices.items()}

    def detach(self) -> None:
        """Take the adapter off the backbone; this composer cannot be used afterwards."""
        self.backbone.adapters.remove(self.adapter)

    def prompt(self, task: Task, role: Role, trajectories: Sequence[Trajectory]) -> str:
        """Return the text to compose from; all trajectories are shortened until it fits `max_prompt_tokens`.

        Raises:
            ConfigError: the task and the role alone are too long for the composer.
        """
        episodes = [describe(trajectory, self.words) for trajectory in trajectories]
        said = [said_by(trajectory, role) for trajectory in trajectories]
        text = self._fill(task, role, episodes, said)
        length = len(self.backbone.encode(text))
        if length <= self.max_prompt_tokens:
            return text
        self.num_shortened += 1
        if self.num_shortened == 1:
            logger.warning(
                "composer texts are shortened to %d tokens (composer.max_prompt_tokens); the first had %d",
                self.max_prompt_tokens,
                length,
            )
        limit = min(length // max(1, len(episodes) * 2), self.max_prompt_tokens)
        while limit and length > self.max_prompt_tokens:
            text = self._fill(task, role, self._shorten(episodes, limit), self._shorten(said, limit))
            length = len(self.backbone.encode(text))
            limit = limit * 3 // 4
        if length > self.max_prompt_tokens:
            raise ConfigError(
                f"composer.max_prompt_tokens is {self.max_prompt_tokens}, but the text of task "
                f"{task.key[:80]!r} has {length} tokens even without its trajectories; raise it"
            )
        return text

    def _fill(self, task: Task, role: Role, episodes: Sequence[str], said: Sequence[str]) -> str:
        words = self.words

        def numbered(texts: Sequence[str]) -> str:
            entries = [fill(words.entry, number=str(i), text=text or words.silent) for i, text in enumerate(texts, 1)]
            return "\n\n".join(entries) or words.nothing

        return fill(
            self.template,
            task=task.text.strip(),
            memory=numbered(episodes),
            role=fill(words.member, role=role.name, profile=role.profile),
            role_messages=numbered(said),
            num_latents=str(self.num_latents),
        )

    def _shorten(self, texts: Sequence[str], limit: int) -> list[str]:
        return [self.backbone.decode(self.backbone.encode(text)[:limit]) for text in texts]

    def compose(self, prompts: list[str]) -> Tensor:
        """Compose latent memories [B, K, d_agent] from B texts, differentiable in the parameters of `trainable`.

        They are float32, or float64 on a float64 backbone.

        Raises:
            ModelError: a text does not fit the backbone's context window.
        """
        hidden = self.read(prompts)
        if self.slots is None:
            latents: Tensor = self.projection(hidden)
            return latents
        words = self.gate[:, None] * self.words_held(hidden[:, : self.slots])
        return torch.cat([words, self.projection(hidden[:, self.slots :])], dim=1) + self.frame

    def word_shares(self, hidden: Tensor) -> Tensor:
        """Return how the word of each slot is distributed over the agents' vocabulary.

        hidden: [B, S, d_composer], final states at the queries -> [B, S, V] float32; each row adds up to 1.
        """
        head = self.backbone.model.get_output_embeddings()
        logits = functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
        shares = (self.sharpness * logits[..., : len(self._said_as)]).softmax(-1).to(self._said_as.device)
        num_tokens = len(self._agents[0].model.get_input_embeddings().weight)
        return shares.new_zeros(*shares.shape[:-1], num_tokens).index_add(-1, self._said_as, shares)

    def words_held(self, hidden: Tensor) -> Tensor:
        """Return the words of slots as soft tokens: hidden [B, S, d_composer] -> [B, S, d_agent]."""
        embeddings = self._agents[0].model.get_input_embeddings().weight
        held: Tensor = self.word_shares(hidden).to(embeddings.dtype) @ embeddings
        return held.to(hidden)

    def read(self, prompts: list[str]) -> Tensor:
        """Return hidden states [B, K, d_composer] at the queries, after the final norm, for B composer texts.

        Raises:
            ModelError: a text does not fit the backbone's context window.
        """
        model = self.backbone.model
        rows = [[*self.backbone.encode(prompt), *self._cue_ids] for prompt in prompts]
        check_window(model, max(map(len, rows)) + self.num_latents, "the composer's text")
        ids, real = pad(rows, self.backbone.device)
        embeddings = model.get_input_embeddings()(ids)
        queries = self.query_latents.to(embeddings.dtype).expand(len(prompts), -1, -1)
        embeddings = torch.cat([embeddings, queries], dim=1)  # [B, L + K, d_composer]
        real = torch.cat([real, real.new_ones(len(prompts), self.num_latents)], dim=1)
        with self.backbone.as_agent(self.adapter) as reader:
            hidden = reader.last_states(embeddings, real)[:, -self.num_latents :]  # [B, K, d_composer]
        return hidden.to(self.dtype)

    def settings(self) -> dict[str, Any]:
        """Return the settings that are stored in a checkpoint, as JSON values."""
        return {
            "base_model": self.backbone.name,
            "agents": self.agents_name,
            "num_latents": self.num_latents,
            "d_composer": self.d_composer,
            "d_agent": self.d_agent,
            "rank": self.rank,
            "alpha": self.alpha,
            "target_modules": list(self.target_modules),
            "template": self.template,
            "words": composer_words(self.words),
            "max_prompt_tokens": self.max_prompt_tokens,
            "slots": self.slots,
            "sharpness": self.sharpness,
            "cue": self.cue,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write this composer to a folder as one file; an older one there is replaced as a whole.

        Raises:
            CheckpointError: the disk is full or not writable; an older checkpoint is untouched.
        """
        tensors = {name: parameter.detach() for name, parameter in self.trainable().items()}
        write_checkpoint(Path(folder), self.settings(), tensors)

    def load_weights(self, folder: str | Path) -> None:
        """Read a checkpoint into this composer, strictly; an error leaves the composer unchanged.

        Raises:
            CheckpointError: a setting in `_MUST_AGREE` differs, such as K, a width or the template; a tensor is
                missing, unexpected or of another shape.
        """
        self._load(Path(folder), *_read(folder))

    def _load(self, folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        fill_parameters(
            folder,
            settings,
            tensors,
            self.trainable(),
            self.settings(),
            must_agree=_MUST_AGREE,
            told=("base_model", "agents"),
            owner="this composer",
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backbone: LanguageModel | None = None, agents: LanguageModel | None = None
    ) -> Self:
        """Load a composer from a folder.

        Args:
            folder: a folder that `save_pretrained` wrote.
            backbone: the LM to put it on; None loads the one it was trained on.
            agents: the LM that will be given the latents. None takes the backbone if that was so in training, and
                otherwise loads the LM of training.

        Raises:
            CheckpointError: the folder holds no checkpoint, or one that is damaged or made for other models.
            ModelError: a model it was trained with cannot be loaded.
        """
        settings, tensors = _read(folder)
        named = ("base_model", "agents", "max_prompt_tokens", *_MUST_AGREE)
        if absent := [key for key in named if key not in settings]:
            raise CheckpointError(f"{folder}: the checkpoint does not say its {', '.join(absent)}; save it again")
        backbone = backbone or LanguageModel.from_pretrained(settings["base_model"])
        if agents is None and settings["agents"] != settings["base_model"]:
            agents = LanguageModel.from_pretrained(settings["agents"])
        arguments = ("num_latents", "rank", "alpha", "target_modules", "template", "max_prompt_tokens", *_LATER)
        words = parse_section(MemorySection, settings["words"], f"{folder}: words")
        composer = cls(backbone, agents, words=words, **{key: settings[key] for key in arguments})
        composer._load(Path(folder), settings, tensors)
        return composer


def first_tokens(composer: LanguageModel, agents: LanguageModel) -> list[int]:
    """Return, for each token of the composer, [V_composer], the first token of an agents' response with its text.

    A composer that continues a text puts a blank before a word; an agent that begins to speak does not. So leading
    blanks are dropped, unless the text is nothing but blanks. A token that ends a text maps to the end of a response.
    """
    texts = composer.tokenizer.batch_decode([[token] for token in range(len(composer.tokenizer))])
    bare = [text.lstrip() for text in texts]
    said = [stripped or text or "." for text, stripped in zip(texts, bare, strict=True)]
    encoded = agents.tokenizer(said, add_special_tokens=False)["input_ids"]
    end = int(agents.tokenizer.eos_token_id)
    if composer.tokenizer is agents.tokenizer:  # a token stands for itself, even one that is half a character
        return [
            ids[0] if stripped != text and stripped and len(ids) == 1 else token
            for token, (text, stripped, ids) in enumerate(zip(texts, bare, encoded, strict=True))
        ]
    return [end if token in composer.eos_ids or not ids else ids[0] for token, ids in enumerate(encoded)]


def composer_words(words: MemorySection) -> dict[str, str]:
    """Return the configured words that the composer reads."""
    return words.model_dump(exclude={"text"})


def _read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint; settings that older checkpoints lack get the values that applied then."""
    settings, tensors = read_checkpoint(Path(folder))
    return {"words": composer_words(MemorySection()), **_LATER, **settings}, tensors
