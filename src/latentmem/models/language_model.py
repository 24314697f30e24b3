"""The agents' frozen language model: prompts in, sampled tokens out.

Text from outside (tasks, other agents, memories) is encoded as plain text: a control token written in it becomes
ordinary characters. Each response draws from its own random stream, so it does not depend on its neighbours in the
batch. `ScriptedModel` has the same interface, for tests and for trying a team out without a model.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Literal, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from latentmem.config import ModelSection, Sampling
from latentmem.errors import ModelError
from latentmem.models.adapters import Adapters
from latentmem.models.agent import AgentModel, Prompt, Sampled
from latentmem.models.chat import Chat
from latentmem.models.decoding import Continued, decode, draw_uniform, stack_latents
from latentmem.models.ending import Ending
from latentmem.models.fused import pays
from latentmem.models.loading import load
from latentmem.models.prefilling import Kept
from latentmem.models.prefix import check_window
from latentmem.models.reader import Reader
from latentmem.models.running import Row, Running
from latentmem.models.self_test import choose_reader

DEFAULTS = ModelSection()


class LanguageModel:
    """A Hugging Face causal LM with its tokenizer, frozen."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_batch_size: int = DEFAULTS.max_batch_size,
        fused: bool = False,
        today: date = DEFAULTS.date,
        thinking: bool = DEFAULTS.thinking,
    ):
        """Take a loaded model, and find out how it is read.

        Args:
            model: the causal LM.
            tokenizer: its tokenizer.
            name: its name, written into trajectories.
            max_batch_size: responses sampled at once.
            fused: whether fast operations may stand in for the model's own small ones.
            today: the date that a chat template is told which asks for it.
            thinking: whether a chat template that knows `enable_thinking` lets the model think.

        Raises:
            ModelError: the chat template cannot be used, or the model cannot be read.
        """
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.max_batch_size = max_batch_size
        self.eos_ids = _eos_ids(model, tokenizer)
        self.chat = Chat(tokenizer, name, today, thinking)
        self._reader = choose_reader(self.model, name, fused)
        self.adapters = Adapters(self.model, name)
        self.engine: AgentModel | None = None
        """Samples in place of the weights here, which then only compose and score; None: the weights here sample."""

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        device: str = DEFAULTS.device,
        dtype: str = DEFAULTS.dtype,
        max_batch_size: int = DEFAULTS.max_batch_size,
        fused: Literal["auto", "never"] = DEFAULTS.fused,
        place: Callable[[PreTrainedModel, torch.device], object] | None = None,
        today: date = DEFAULTS.date,
        thinking: bool = DEFAULTS.thinking,
    ) -> Self:
        """Load a model by embedded name, hub id, local folder or GGUF file.

        Args:
            name: see `models.assets.resolve_model`.
            device: `auto` is the current GPU if there is one, else the CPU; or a torch device.
            dtype: `auto` (bfloat16 on a GPU, else float32), `float32` or `bfloat16`.
            max_batch_size: responses sampled at once.
            fused: `auto` replaces the model's small operations by fast ones where that was measured to pay, on a CPU in
                float32; `never` leaves the model as it is.
            place: brings the finished model from the CPU to its device, as `sharding.shard` does; None moves it whole.
            today: the date that a chat template is told which asks for it.
            thinking: whether a chat template that knows `enable_thinking` lets the model think.

        Raises:
            ModelError: the model is unknown, files are missing, or the device is not there.
        """
        try:
            where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
            torch.empty(0, device=where).cpu()  # `meta` has no values
        except (RuntimeError, AssertionError):  # AssertionError: torch was built without that kind of device
            raise ModelError(f"device {device!r} is not there; use auto, cpu or a GPU such as cuda:0") from None
        if dtype == "auto":
            dtype = "bfloat16" if where.type == "cuda" else "float32"
        model, tokenizer = load(name, dtype)
        fast = fused == "auto" and pays(where, model.dtype)
        if place is None:
            return cls(model.to(where), tokenizer, name, max_batch_size, fast, today, thinking)
        loaded = cls(model, tokenizer, name, max_batch_size, fast, today, thinking)
        place(loaded.model, where)
        return loaded

    @property
    def concurrent(self) -> bool:
        """Whether several threads may ask for responses at the same time; the weights here serve one at a time."""
        return self.engine is not None and self.engine.concurrent

    @property
    def width(self) -> int:
        """d_agent, the width of the token embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        where: torch.device = self.model.device
        return where

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text; control tokens written in it are encoded as ordinary characters."""
        return self.chat.encode(text)

    def encode_prompt(self, system: str, user: str) -> list[int]:
        """Return the token ids of the chat prompt, generation prompt included; see `Chat.encode_prompt`."""
        return self.chat.encode_prompt(system, user)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, whichever form it has."""
        if prompt.conversation is not None:
            return self.chat.encode_conversation(prompt.conversation)
        return self.encode_prompt(prompt.system, prompt.user)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, without control tokens."""
        return self.chat.decode(token_ids)

    def spell(self, token_ids: Sequence[int]) -> str:
        """Return the text of any tokens, with control tokens written out."""
        return self.chat.spell(token_ids)

    @contextmanager
    def as_agent(self, adapter: str | None = None) -> Iterator[Reader]:
        """Yield the backbone's reader with the named adapter on and no other; None: with no adapter."""
        with self.adapters.only(adapter):
            yield self._reader

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling, kept: Kept | None = None) -> list[Sampled]:
        """Sample one response per prompt, in batches of at most `max_batch_size`.

        Args:
            prompts: what the agents are asked.
            sampling: how responses are drawn.
            kept: receives the common beginnings of each group's prompts, as the frozen model has read them; with an
                engine it receives none.

        Raises:
            ModelError: a prompt does not fit the context window, or the model's values are not finite.
            EngineError: the engine cannot be reached, or answers something else than was asked.
        """
        return self.sample(prompts, sampling, kept) if self.engine is None else self.engine.respond(prompts, sampling)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, kept: Kept | None = None) -> list[Sampled]:
        """Sample with the weights here, even if there is an engine; otherwise the same as `respond`."""
        sampled: list[Sampled] = []
        for start in range(0, len(prompts), self.max_batch_size):
            rows = [self.begun(prompt, sampling) for prompt in prompts[start : start + self.max_batch_size]]
            sampled += self._sample(rows, sampling, kept)
        return sampled

    def begun(self, prompt: Prompt, sampling: Sampling) -> Row:
        """Return the beginning of a response.

        Raises:
            ModelError: the prompt does not fit the context window.
        """
        ids, limit = self.prompt_ids(prompt), prompt.most_tokens(sampling)
        ending = Ending(limit, self.eos_ids, self.decode, prompt.stop, prompt.on_tokens)
        row = Row(prompt, ids, sampling, limit, ending)
        check_window(self.model, len(ids) + row.num_latents + limit, f"the prompt of {_named(prompt)}")
        return row

    @torch.no_grad()
    def read(self, rows: Sequence[Row], reader: Reader, kept: Kept | None = None, whole: bool = False) -> Continued:
        """Let the model read the prompts and latents of rows; all have latents of one shape, or none has any.

        Args:
            rows: responses that begin now.
            reader: reads with the adapter that is on.
            kept: is searched for what was read before, and receives what is read.
            whole: whether it receives whole prompts, for those that go on from them; else what each group shares.
        """
        ids = [row.ids for row in rows]
        latents = stack_latents([row.prompt.latents for row in rows])
        room = max(row.num_latents + row.limit for row in rows)
        # Rollouts of one task ask the same with the same latents; they differ from the first draw on.
        places: dict[tuple[tuple[int, ...], int, str], int] = {}
        asked = [(tuple(row.ids), id(row.prompt.latents), row.prompt.owner) for row in rows]
        again = [places.setdefault(kind, len(places)) for kind in asked]
        firsts = [again.index(place) for place in range(len(places))]  # the first of each kind
        once, groups = [ids[row] for row in firsts], [rows[row].prompt.group for row in firsts]
        prefix: Continued
        if kept is not None and whole:
            prefix, num_kept = reader.prefill_kept(once, [rows[row].prompt.owner for row in firsts], room, kept)
            for row, place in zip(rows, again, strict=True):
                row.num_kept = num_kept[place]
        else:
            begun = reader.read_beginnings(ids, [row.prompt.group for row in rows], kept)
            prefix = reader.prefill(once, groups, room, begun)
        if latents is not None:
            latents = latents[firsts].to(self.device, self.model.dtype)
            real = torch.ones(latents.shape[:2], dtype=torch.bool, device=self.device)
            prefix.extend(self.model, latents, real)
        return prefix if len(firsts) == len(rows) else prefix.select(torch.tensor(again, device=self.device))

    @torch.no_grad()
    def _sample(self, rows: Sequence[Row], sampling: Sampling, kept: Kept | None) -> list[Sampled]:
        (adapter,) = {row.prompt.adapter for row in rows}
        with self.as_agent(adapter) as reader:
            # Scoring reads a trained agent's prompts again, with gradients.
            prefix = self.read(rows, reader, kept if adapter is None else None)
            if any(row.prompt.is_watched for row in rows):
                running = Running(self.model)
                running.join(rows, prefix)
                while running:
                    running.step()
            else:
                draws = draw_uniform([row.prompt.seed for row in rows], sampling.max_response_tokens).to(self.device)
                tokens, logps = decode(self.model, prefix, draws, sampling, self.eos_ids)
                for row, row_tokens, row_logps in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
                    for token, logp in zip(row_tokens, row_logps, strict=True):
                        if row.is_ended:
                            break
                        row.add(token, logp)
        return [self.sampled(row) for row in rows]

    def sampled(self, row: Row) -> Sampled:
        """Return the response of a row that has ended.

        Raises:
            ModelError: the model's values are not finite.
            Exception: whatever the prompt's `on_tokens` raised.
        """
        if row.error is not None:
            raise row.error
        if not row.is_finite:
            raise ModelError(
                f"model {self.name!r} gave values that are not finite for {_named(row.prompt)}; with "
                "latents, take an earlier checkpoint of the composer, without, set model.dtype to float32"
            )
        assert row.ending.finish is not None, "the row has not ended"
        return Sampled(
            text=row.ending.text.strip(),
            token_ids=tuple(row.ending.tokens),
            logps=tuple(row.logps),
            finish=row.ending.finish,
            num_prompt_tokens=len(row.ids),
            prompt_ids=tuple(row.ids),
            weights=self.weights if row.prompt.adapter is None else "",
            num_kept=row.num_kept,
        )

    @cached_property
    def weights(self) -> str:
        """Version of the weights: a hash of the model's name, configuration and precision."""
        config = self.model.config.to_json_string(use_diff=False)
        return hashlib.sha256(f"{self.name}\n{self.model.dtype}\n{config}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class KeepingModel:
    """A language model that keeps the beginnings of its prompts, so that scoring the responses need not read them."""

    model: LanguageModel
    kept: Kept = field(default_factory=Kept)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def concurrent(self) -> bool:
        """Whether several threads may ask at the same time."""
        return self.model.concurrent

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        """Return the model's responses."""
        return self.model.respond(prompts, sampling, self.kept)


def _named(prompt: Prompt) -> str:
    return f"{prompt.role!r} ({prompt.group})"


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)
