"""What answers of both endpoints tell beyond OpenAI's: where the memory came from, and where the time went."""

import re
from collections.abc import Mapping
from dataclasses import asdict
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
        "memory": recalled.kind,
        "sources": list(recalled.sources),
        "latent_tokens": recalled.num_latents,
        "timings": asdict(answer.timings),
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
    if recalled is not None:
        headers["X-LatentMem-Sources"] = ",".join(recalled.sources[:_MAX_SOURCES])
        headers["X-LatentMem-Memory"] = _in_header(recalled.kind)
    if answer is not None:
        headers["X-LatentMem-Timings"] = _written(answer.timings)
    return headers


def num_tokens(answer: Answer) -> tuple[int, int, int]:
    """Return the tokens of the prompt, latents left out; the latents; and the tokens of all responses."""
    first = answer.choices[0].message
    generated = sum(len(choice.message.token_ids) for choice in answer.choices)
    return first.num_prompt_tokens, first.recalled.num_latents, generated


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
