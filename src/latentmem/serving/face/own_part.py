"""What answers of both endpoints tell beyond OpenAI's: where the memory came from, and where the time went."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from latentmem.serving.asks import Answer, Ask, Choice, Timings, Turn
from latentmem.serving.reading import TextOf, token_texts
from latentmem.trajectory import Recalled

_MAX_SOURCES = 32
"""Ids in a header; all stand in the body."""


def own_part(answer: Answer, ask: Ask) -> dict[str, Any]:
    """Return the object `latentmem` of an answer."""
    message = answer.choices[0].message
    recalled = message.recalled
    own: dict[str, Any] = {
        "session": answer.session,
        "role": message.role,
        "role_is_known": answer.role_is_known,
        "memory": recalled.kind,
        "sources": list(recalled.sources),
        "latent_tokens": recalled.num_latents,
        "timings": asdict(answer.timings),
        "warnings": list(answer.warnings),
    }
    if ask.with_tokens:
        served = message.served
        own["prompt_token_ids"] = [] if served is None else list(served.prompt_ids)
        own["choices"] = [
            {"token_ids": list(each.message.token_ids), "logprobs": list(each.message.logps)} for each in answer.choices
        ]
    return own


def headers_of(turn: Turn, answer: Answer | None, call: str) -> Mapping[str, str]:
    """Return the headers of an answer; a stream's are written before all is known."""
    recalled: Recalled | None = answer.choices[0].message.recalled if answer is not None else turn.recalled
    headers = {"X-Request-ID": call, "X-LatentMem-Session-ID": _in_header(turn.session)}
    if turn.speaker.warning is not None:
        headers["X-LatentMem-Warning"] = _in_header(turn.speaker.warning)
    if recalled is not None:
        headers["X-LatentMem-Sources"] = ",".join(recalled.sources[:_MAX_SOURCES])
        headers["X-LatentMem-Memory"] = _in_header(recalled.kind)
    if answer is not None:
        headers["X-LatentMem-Timings"] = _written(answer.timings)
    return headers


@dataclass(frozen=True)
class Usage:
    """The tokens of an answer."""

    prompt: int
    """Latents left out."""
    cached: int
    """Those of the prompt that were kept from earlier prompts."""
    latents: int
    completion: int
    """Of all responses."""

    @property
    def total(self) -> int:
        """What OpenAI calls the total, so without latents."""
        return self.prompt + self.completion


def usage_of(answer: Answer) -> Usage:
    """Return the tokens of an answer.

    Each choice reads the prompt, those that come later from what the first one has left. The fewest that any choice
    found are those that were kept before the request.
    """
    first = answer.choices[0].message
    return Usage(
        prompt=first.num_prompt_tokens,
        cached=min(choice.counted.kept for choice in answer.choices),
        latents=first.recalled.num_latents,
        completion=sum(choice.counted.tokens_of(choice.message) for choice in answer.choices),
    )


def token_entries(choice: Choice, text_of: TextOf) -> list[dict[str, Any]]:
    """Return the log-probabilities of the tokens of a response, the one that ends it left out."""
    ids = choice.message.token_ids[:-1] if choice.message.finish == "stop" else choice.message.token_ids
    return [
        {"token": text, "logprob": logp, "bytes": list(text.encode("utf-8", "replace")), "top_logprobs": []}
        for text, logp in zip(token_texts(text_of, ids), choice.message.logps, strict=False)
    ]


def _in_header(name: str) -> str:
    """Return a name as a header may hold it; blanks at its ends are no part of a header."""
    return _ENDS.sub(lambda blanks: "%20" * len(blanks[0]), quote(name, safe=_SAFE))


_ENDS = re.compile(r"^ +| +$")
_SAFE = " !#$&'()*+,-./:;<=>?@[]^_`{|}~"


def _written(timings: Timings) -> str:
    return ", ".join(f"{part}={seconds:.6f}" for part, seconds in asdict(timings).items())
