"""The interface of a model that a rollout uses, and a scripted stand-in; loads no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from latentmem.config import Sampling
from latentmem.models.ending import Ending, Finish
from latentmem.outside import well_formed
from latentmem.trajectory import Conversation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One agent's request for a response."""

    role: str
    system: str
    user: str
    group: str
    """Prompts of one group are expected to begin alike; the model reads the common part once."""
    seed: int
    latents: "Tensor | None" = None
    """The latents [K, d_agent], placed after the prompt."""
    adapter: str | None = None
    """The adapter to respond with; None for the frozen model alone."""
    conversation: Conversation | None = None
    """The chat to encode in place of `system` and `user`, which then only describe it; a memory's text is in it."""
    limit: int | None = None
    """Longest response, if that is less than the sampling's `max_response_tokens`."""
    stop: tuple[str, ...] = ()
    """Texts that end the response where the first of them begins."""
    on_tokens: Callable[[Sequence[int]], bool] | None = field(default=None, compare=False)
    """Called with new tokens of the response as they are sampled; False: nobody waits for the rest any more. It gets
    all tokens, those of a stop text too. The thread that samples calls it, so it should not wait for anything."""
    owner: str = ""
    """Whose prompt it is. What was read for one owner is not used for another."""

    @property
    def is_watched(self) -> bool:
        """Whether it has to be seen after each token if the response ends with it."""
        return self.limit is not None or bool(self.stop) or self.on_tokens is not None

    def most_tokens(self, sampling: Sampling) -> int:
        """Return the longest response, in tokens."""
        most = sampling.max_response_tokens
        return most if self.limit is None else max(1, min(self.limit, most))


@dataclass(frozen=True)
class Sampled:
    """A response with the tokens that were sampled."""

    text: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    finish: Finish
    num_prompt_tokens: int
    prompt_ids: tuple[int, ...] = ()
    """The prompt's tokens, latents left out; empty if the model does not tell."""
    weights: str = ""
    """Version of the weights that sampled; empty if it is not known."""
    queue_seconds: float = field(default=0.0, compare=False)
    """How long the prompt waited until the model began with it."""
    num_kept: int = field(default=0, compare=False)
    """How many of the prompt's tokens were kept from earlier prompts, so that they were not read again."""
    num_sampled: int | None = None
    """Tokens of the response as a server counts them that does not tell the tokens; None: `token_ids` has them all."""


class AgentModel(Protocol):
    """The interface of a model that a rollout uses."""

    @property
    def name(self) -> str:
        """The model's name, as written into the trajectories."""

    @property
    def concurrent(self) -> bool:
        """Whether several threads may ask at the same time."""

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        """Sample one response per prompt, in the order of the prompts."""


class ScriptedModel:
    """A model that follows a script: each role has a list of responses, used in turn and then again from the start.

    A response's tokens are its UTF-8 bytes followed by 256 as EOS, each with log-probability 0.
    """

    name = "scripted"
    concurrent = False

    def __init__(self, responses: Mapping[str, Sequence[str]]) -> None:
        self.responses = {role: list(texts) for role, texts in responses.items()}
        self.prompts: list[Prompt] = []
        """All prompts seen, for assertions."""
        self._used = dict.fromkeys(self.responses, 0)

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        """Return the next scripted response for each prompt's role, cut to `max_response_tokens`."""
        results = []
        for prompt in prompts:
            self.prompts.append(prompt)
            texts = self.responses[prompt.role]
            text = well_formed(texts[self._used[prompt.role] % len(texts)])
            self._used[prompt.role] += 1
            ending = Ending(prompt.most_tokens(sampling), {256}, _spelled, prompt.stop, prompt.on_tokens)
            for token in [*text.encode("utf-8"), 256]:
                if ending.add(token):
                    break
            assert ending.finish is not None
            results.append(
                Sampled(
                    text=text if ending.finish == "stop" else ending.text,
                    token_ids=tuple(ending.tokens),
                    logps=(0.0,) * len(ending.tokens),
                    finish=ending.finish,
                    num_prompt_tokens=len(well_formed(prompt.system + prompt.user).encode("utf-8")),
                )
            )
        return results


def _spelled(token_ids: Sequence[int]) -> str:
    return bytes(i for i in token_ids if i < 256).decode("utf-8", "replace")
