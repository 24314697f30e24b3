"""Find out whether servers sample as the model in this process would: the same tokens, the same log-probabilities.

Each server is asked one prompt with two different latents, greedily and at a temperature, and what it answers is scored
here. So a wrong model, wrong flags and a broken cache show before any work begins. A failure names the flag that mends
it.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentmem.config import Sampling
from latentmem.engines.answers import BadAnswer, served_models
from latentmem.engines.servers import Call, Servers
from latentmem.engines.vllm import VLLMEngine
from latentmem.errors import EngineError
from latentmem.models.agent import Prompt, Sampled
from latentmem.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

SYSTEM, USER = "You are a careful assistant.", "Say in one sentence what the lamp of the old tower is for."
NUM_LATENTS = 4
NUM_TOKENS = 12
"""Longest response of the probe."""
TEMPERATURE = 0.5
FLOAT32, ROUNDED = 1e-3, 0.15
"""Largest difference of one log-probability in float32, and of their mean in a lower precision, in nats."""
_FIRST_SECONDS = 30.0
"""How long a server may take to say which models it has."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    text: str
    """What was found; if it is wrong, also what mends it."""
    is_fine: bool
    is_needed: bool = True
    """Whether a run would be wrong without it."""


class Unreachable(EngineError):  # noqa: N818 - names what the server is
    """A server does not even say which models it has."""


class CheckedEngine:
    """An engine whose servers are checked when it is first asked, so that phases that sample nothing need none."""

    concurrent = True

    def __init__(self, engine: VLLMEngine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._is_checked = False

    @property
    def name(self) -> str:
        """The model's name."""
        return self.engine.name

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        """Return the engine's responses.

        Raises:
            EngineError: as for `check_servers` and `VLLMEngine.respond`.
            ModelError: as for `VLLMEngine.respond`.
        """
        with self._lock:
            if not self._is_checked:
                check_servers(self.engine)
            self._is_checked = True
        return self.engine.respond(prompts, sampling)


def check_servers(engine: VLLMEngine) -> None:
    """Refuse servers that sample otherwise than the model here; leave out, with a warning, those that are down.

    Raises:
        EngineError: all servers are down, or one of them answers wrongly.
    """
    down: list[Unreachable] = []
    for url in engine.servers.urls:
        try:
            wrong = [finding for finding in check_server(engine, url) if finding.is_needed and not finding.is_fine]
        except Unreachable as error:
            down.append(error)
            continue
        if wrong:
            raise EngineError(f"{url}: {wrong[0].text}")
    if len(down) == len(engine.servers.urls):
        raise down[0]
    for cause in down:
        logger.warning("%s; the other servers are used", cause)


def check_server(engine: VLLMEngine, url: str, max_response_tokens: int = NUM_TOKENS) -> list[Finding]:
    """Return what was found out about one server, up to the first thing that is wrong.

    Args:
        engine: its model is compared with.
        url: the server's address.
        max_response_tokens: the longest response that will be asked for.

    Raises:
        Unreachable: there is no server.
    """
    asked = VLLMEngine(engine.model, [url], 2, engine.servers.timeout_seconds, engine.servers.retries)
    found: list[Finding] = []
    try:
        for finding in _findings(asked, asked.servers.urls[0], max_response_tokens):
            found.append(finding)
            if finding.is_needed and not finding.is_fine:
                break
    except Unreachable:
        raise
    except EngineError as error:
        found.append(Finding(str(error).removeprefix(f"{url}: "), is_fine=False))
    return found


def _findings(engine: VLLMEngine, url: str, max_response_tokens: int) -> Iterator[Finding]:
    model = engine.model
    prompt_ids = model.encode_prompt(SYSTEM, USER)
    yield _served(engine, url, len(prompt_ids) + NUM_LATENTS + max_response_tokens)
    first, second = _latents(model)
    is_exact = model.model.dtype == torch.float32
    (greedy,) = _ask(engine, 0.0, first)
    if is_exact:
        (ours,) = model.sample([_prompt(first)], Sampling(temperature=0, max_response_tokens=NUM_TOKENS))
        yield Finding(
            "greedy tokens are those of the model here"
            if greedy.token_ids == ours.token_ids
            else f"greedy tokens differ from those of the model here, {greedy.text!r} and {ours.text!r}; start the "
            "server with --model and --dtype as in the configuration",
            greedy.token_ids == ours.token_ids,
        )
    one, other = _ask(engine, TEMPERATURE, first, second)
    yield _compared(model, "tempered log-probabilities", prompt_ids, first, one)
    yield _compared(model, "log-probabilities with other latents", prompt_ids, second, other)
    differ = (one.token_ids, one.logps) != (other.token_ids, other.logps)
    yield Finding(
        "two different latents give different results"
        if differ
        else "two different latents give the same result: the server does not read them, or its cache mixes them up; "
        "start it with --enable-prompt-embeds --no-enable-prefix-caching",
        differ,
    )
    again, _ = _ask(engine, TEMPERATURE, first, second)
    yield _compared(model, "log-probabilities out of the server's cache", prompt_ids, first, again)
    repeats = again.token_ids == one.token_ids
    yield Finding(
        "a seed gives the same tokens again"
        if repeats
        else "a seed gave other tokens the second time: runs are valid, but cannot be repeated to the token",
        repeats,
        is_needed=False,
    )


def _served(engine: VLLMEngine, url: str, num_needed: int) -> Finding:
    servers = Servers([url], min(_FIRST_SECONDS, engine.servers.timeout_seconds), 0)
    try:
        served = served_models(servers.once(url, "/v1/models", None, Call()))
    except BadAnswer as error:
        raise Unreachable(
            f"{url}: no server of vLLM answers ({error}); start one with `latentmem engine start CONFIG`, or mend "
            "model.engine.urls"
        ) from None
    if engine.name not in served:
        names = ", ".join(map(repr, served)) or "none"
        return Finding(
            f"the server has the models {names}; start it with --served-model-name {engine.name}", is_fine=False
        )
    longest = served[engine.name]
    if longest is not None and longest < num_needed:
        return Finding(
            f"the server takes {longest} tokens at most, and the shortest prompt with its latents and its response has "
            f"{num_needed}; start it with a larger --max-model-len",
            is_fine=False,
        )
    return Finding(f"serves {engine.name}, {longest or 'an unknown number of'} tokens at most", is_fine=True)


def _compared(model: LanguageModel, what: str, prompt_ids: list[int], latents: Tensor, answer: Sampled) -> Finding:
    """Compare the log-probabilities of an answer with those that the model here gives to the same tokens."""
    ours = _logps(model, prompt_ids, latents, answer, TEMPERATURE)
    theirs = torch.tensor(answer.logps)
    if _is_near(model, ours, theirs):
        return Finding(f"{what} agree: they differ by {_largest(ours, theirs):.1e} at most", is_fine=True)
    if _is_near(model, _logps(model, prompt_ids, latents, answer, 1.0), theirs):
        return Finding(
            f"{what} are those of temperature 1; start the server with --logprobs-mode processed_logprobs",
            is_fine=False,
        )
    return Finding(
        f"{what} differ from those of the model here by up to {_largest(ours, theirs):.2g} nats; start the server with "
        "--model and --dtype as in the configuration, and with --generation-config vllm; if only cached prompts are "
        "wrong, with --no-enable-prefix-caching",
        is_fine=False,
    )


def _is_near(model: LanguageModel, ours: Tensor, theirs: Tensor) -> bool:
    if model.model.dtype == torch.float32:
        return _largest(ours, theirs) <= FLOAT32
    return float((ours - theirs).abs().mean()) <= ROUNDED


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


@torch.no_grad()
def _logps(model: LanguageModel, prompt_ids: list[int], latents: Tensor, answer: Sampled, temperature: float) -> Tensor:
    """Return the log-probabilities [T] that the model here gives to an answer's tokens."""
    ids = torch.tensor([answer.token_ids], device=model.device)
    with model.as_agent() as agent:
        prefix = agent.prefill([prompt_ids], ["probe"], len(latents) + ids.shape[1] - 1)
        given = latents[None].to(model.device)
        return agent.response_logps(prefix, given, ids, torch.ones_like(ids, dtype=torch.bool), temperature)[0].cpu()


def _ask(engine: VLLMEngine, temperature: float, *latents: Tensor) -> list[Sampled]:
    sampling = Sampling(temperature=temperature, max_response_tokens=NUM_TOKENS)
    return engine.respond([_prompt(latent) for latent in latents], sampling)


def _prompt(latents: Tensor) -> Prompt:
    return Prompt("probe", SYSTEM, USER, "probe", seed=17, latents=latents)


def _latents(model: LanguageModel) -> tuple[Tensor, Tensor]:
    """Return two latents [K, d]: embeddings of tokens spread over the vocabulary."""
    table = model.model.get_input_embeddings().weight.detach()
    places = torch.linspace(0, len(table) - 1, 2 * NUM_LATENTS + 2)[1:-1].long()
    rows = table[places.to(table.device)]
    return rows[0::2], rows[1::2]
