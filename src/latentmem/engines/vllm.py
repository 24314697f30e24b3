"""Servers of vLLM sample for the agents: what a prompt is sent as, and what comes back.

A prompt with latents is sent as the rows [prompt ; m] that the model would read, so control tokens in its text stay
text and the latents stand where they stand when responses are scored. A prompt without latents is sent as token ids.
Token ids come back and are never made from text again. A response that somebody listens to, or that a stop text may
end, is streamed; where it ends is found here, by the rules of the model in this process, and closing the connection
tells the server.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from latentmem.config import Sampling, VLLMEngineSection, default
from latentmem.engines.answers import BadAnswer, Expected, read_answer, read_piece
from latentmem.engines.events import DONE, Events
from latentmem.engines.servers import Call, Servers, ask_all
from latentmem.errors import EngineError, ModelError
from latentmem.models.agent import Prompt, Sampled
from latentmem.models.ending import Ending, Finish
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefix import check_window

COMPLETIONS = "/v1/completions"


class VLLMEngine:
    """An `AgentModel` that asks servers of vLLM; many threads may ask it at the same time."""

    concurrent = True

    def __init__(
        self,
        model: LanguageModel,
        urls: Sequence[str],
        parallel: int = default(VLLMEngineSection, "parallel"),
        timeout_seconds: float = default(VLLMEngineSection, "timeout_seconds"),
        retries: int = default(VLLMEngineSection, "retries"),
        backoff_seconds: float = 0.5,
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            model: the same model in this process. Its chat template, its tokenizer and its table of embeddings make the
                prompts; it is not run.
            urls: addresses of the servers.
            parallel: most requests in flight, whoever asks.
            timeout_seconds: wall-clock limit of one attempt.
            retries: attempts after the first.
            backoff_seconds: pause before the first retry at an address that just failed; each further pause is twice as
                long.
        """
        self.model = model
        self.servers = Servers(urls, timeout_seconds, retries, backoff_seconds)
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="vllm")

    @property
    def name(self) -> str:
        """The model's name; the servers serve it under this name."""
        return self.model.name

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        """Sample one response per prompt, in the order of the prompts.

        Raises:
            ModelError: a prompt does not fit the context window, its latents are not finite, or it wants an adapter.
            EngineError: a server refuses a prompt, or no server gives a usable answer to it.
        """
        ids = [self.model.prompt_ids(prompt) for prompt in prompts]
        self._check(prompts, ids, sampling)
        # Rollouts of one task ask the same with the same latents: their rows, which may be megabytes, are written once.
        first = {(tuple(row), id(prompt.latents)): i for i, (row, prompt) in enumerate(zip(ids, prompts, strict=True))}

        @lru_cache(maxsize=32)
        def rows_of(place: int) -> bytes:
            return json.dumps(self._rows(ids[place], prompts[place].latents)).encode()

        def sample(i: int, call: Call) -> Sampled:
            how = json.dumps(self._how(prompts[i], sampling)).encode()
            rows = rows_of(first[tuple(ids[i]), id(prompts[i].latents)])
            return self._sample(prompts[i], ids[i], b"%b, %b" % (rows[:-1], how[1:]), sampling, call)

        return ask_all(self._pool, sample, len(prompts))

    def _check(self, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Refuse what no server should be asked: values that are not finite spoil the requests of others too."""
        finite: dict[int, bool] = {}
        for prompt, row in zip(prompts, ids, strict=True):
            what = f"the prompt of {prompt.role!r} ({prompt.group})"
            if prompt.adapter is not None:
                raise ModelError(f"{what} wants the adapter {prompt.adapter!r}; only model.engine local has adapters")
            latents = prompt.latents
            if latents is not None and id(latents) not in finite:
                finite[id(latents)] = bool(latents.isfinite().all())
            if latents is not None and not finite[id(latents)]:
                raise ModelError(f"{what} has latents that are not finite; take an earlier checkpoint of the composer")
            num_latents = 0 if latents is None else len(latents)
            check_window(self.model.model, len(row) + num_latents + prompt.most_tokens(sampling), what)

    def _rows(self, ids: Sequence[int], latents: Tensor | None) -> dict[str, Any]:
        """Return the fields of a request that hold the prompt."""
        if latents is None:
            return {"prompt": list(ids)}
        asked = {"prompt_embeds": encoded(self.embeddings(ids, latents))}
        # A cache of prefixes that knows rows by token ids takes a row of zeros for the token 0.
        return asked if bool(latents.any()) else asked | {"cache_salt": "latents of zero"}

    @torch.no_grad()
    def embeddings(self, ids: Sequence[int], latents: Tensor) -> Tensor:
        """Return the rows [T + K, d_agent] that the model reads, on the CPU.

        Args:
            ids: T token ids of a prompt.
            latents: [K, d_agent].
        """
        table = self.model.model.get_input_embeddings()
        read = table(torch.tensor([ids], device=table.weight.device))[0]
        return torch.cat([read, latents.to(read.device, read.dtype)]).cpu()

    def _how(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """Return the other fields of a request; what a server may have defaults of its own for is written out."""
        usage = {"include_usage": True, "continuous_usage_stats": True}
        return {
            "model": self.name,
            "max_tokens": prompt.most_tokens(sampling),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": prompt.seed % 2**63,
            "stop_token_ids": sorted(self.model.eos_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
        } | ({"stream": True, "stream_options": usage} if _is_streamed(prompt) else {})

    def _sample(self, prompt: Prompt, ids: Sequence[int], request: bytes, sampling: Sampling, call: Call) -> Sampled:
        expected = Expected(
            model=self.name,
            vocab_size=len(self.model.model.get_input_embeddings().weight),
            eos_ids=self.model.eos_ids,
            max_tokens=prompt.most_tokens(sampling),
            num_prompt_rows=len(ids) + (0 if prompt.latents is None else len(prompt.latents)),
        )
        home = crc32(prompt.group.encode("utf-8", "replace"))
        if _is_streamed(prompt):
            told = _Told(prompt.on_tokens)

            def begin() -> "_Completion":
                ending = Ending(expected.max_tokens, expected.eos_ids, self.model.decode, prompt.stop, told.again())
                return _Completion(expected, ending)

            ending, logps = self.servers.insist_stream(COMPLETIONS, request, home, begin, call)
            assert ending.finish is not None
            text, token_ids = ending.text, tuple(ending.tokens)
            finish: Finish = ending.finish
        else:
            answer = self.servers.insist(COMPLETIONS, request, home, lambda body: read_answer(body, expected), call)
            text, token_ids, logps = self.model.decode(answer.token_ids), answer.token_ids, answer.logps
            finish = "stop" if answer.is_finished else "length"
        return Sampled(
            text=text.strip(),
            token_ids=token_ids,
            logps=logps,
            finish=finish,
            num_prompt_tokens=len(ids),
            prompt_ids=tuple(ids),
            weights=self.model.weights,
        )


class _Completion:
    """A streamed completion, as it comes."""

    def __init__(self, expected: Expected, ending: Ending) -> None:
        self._expected = expected
        self._ending = ending
        self._logps: list[float] = []
        self._events = Events()

    def take(self, block: bytes) -> bool:
        """Take the next bytes, and return whether the response has ended."""
        for data in self._events.feed(block):
            if data == DONE:
                return True
            for token, logp in zip(*read_piece(data, self._expected), strict=True):
                self._logps.append(logp)
                if self._ending.add(token):
                    return True
        return False

    def result(self) -> tuple[Ending, tuple[float, ...]]:
        """Return the tokens and their log-probabilities."""
        if self._ending.finish is None:
            raise BadAnswer(f"the stream ends after {len(self._logps)} tokens, which end no response")
        return self._ending, tuple(self._logps)


class _Told:
    """What a listener has been told; an attempt that is made again tells it nothing twice."""

    def __init__(self, on_tokens: Callable[[Sequence[int]], bool] | None) -> None:
        self._on_tokens = on_tokens
        self._tokens: list[int] = []

    def again(self) -> Callable[[Sequence[int]], bool] | None:
        """Return a listener for one attempt; None if nobody listens."""
        on_tokens = self._on_tokens
        if on_tokens is None:
            return None
        place = 0

        def listen(tokens: Sequence[int]) -> bool:
            nonlocal place
            (token,) = tokens
            place += 1
            if place > len(self._tokens):
                self._tokens.append(token)
                return on_tokens(tokens)
            if token != self._tokens[place - 1]:
                raise EngineError(
                    f"a server ended in mid-stream, and the next one said something else from token {place} on; what "
                    "was told already cannot be taken back: ask again"
                )
            return True

        return listen


def _is_streamed(prompt: Prompt) -> bool:
    return prompt.on_tokens is not None or any(prompt.stop)


def encoded(rows: Tensor) -> str:
    """Return rows [T, d] on the CPU in the form that servers read: a file of torch, in base64."""
    file = io.BytesIO()
    torch.save(rows.clone(), file)  # a clone, because a view would bring along all that it is a view of
    return base64.b64encode(file.getvalue()).decode("ascii")
