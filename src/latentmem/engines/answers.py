"""What a server of vLLM answers, read strictly; a refusal names the flag of the server that mends it."""

import json
import math
from dataclasses import dataclass
from typing import Any

from latentmem.outside import one_line

FLAGS = {
    "prompt_embeds": "start the server with --enable-prompt-embeds",
    "prompt embeds": "start the server with --enable-prompt-embeds",
    "maximum context length": "start the server with a larger --max-model-len, or shorten prompts or responses",
    "max_model_len": "start the server with a larger --max-model-len, or shorten prompts or responses",
    "does not exist": "start the server with --served-model-name as in model.name",
    "max_logprobs": "start the server with --max-logprobs 1 or more",
    "hidden": "start the server with --model as in model.name",
    "return_token_ids": "take a newer vLLM, 0.11 or later",
}
"""What mends a refusal, by words in it; the first that is found counts."""


class BadAnswer(Exception):  # noqa: N818
    """One attempt failed; another may succeed."""


class Refused(BadAnswer):
    """The server refuses this request, and will refuse it again."""


@dataclass(frozen=True)
class Answer:
    """The tokens that a server sampled."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    is_finished: bool
    """Whether the last token is one that ends a response."""


@dataclass(frozen=True)
class Expected:
    """What an answer has to fit."""

    model: str
    vocab_size: int
    eos_ids: frozenset[int]
    max_tokens: int
    num_prompt_rows: int
    """Number of tokens and latents in the prompt."""


def read_answer(body: bytes, expected: Expected) -> Answer:
    """Read the answer to a request for one completion.

    Raises:
        BadAnswer: it is not the JSON of a completion, or does not fit what was asked.
    """
    ids, logps, finish = _read_tokens(_parsed(body), expected)
    ends = [i for i, token in enumerate(ids) if token in expected.eos_ids]
    is_finished = ends == [len(ids) - 1]
    if (ends and not is_finished) or not (is_finished or len(ids) == expected.max_tokens) or not ids:
        raise BadAnswer(
            f"the answer has {len(ids)} tokens, of which {len(ends)} end a response ({finish!r}); expected "
            f"{expected.max_tokens}, or fewer with such a token at the end"
        )
    if len(ids) > expected.max_tokens:
        raise BadAnswer(f"the answer has {len(ids)} tokens; {expected.max_tokens} were asked for")
    return Answer(tuple(ids), tuple(map(float, logps)), is_finished)


def read_piece(data: bytes, expected: Expected) -> tuple[list[int], list[float]]:
    """Read one piece of a streamed completion: token ids and their log-probabilities; the last piece may hold none.

    Raises:
        BadAnswer: it is not such a piece, or does not fit what was asked.
    """
    said = _parsed(data)
    if isinstance(said, dict) and "error" in said:
        raise BadAnswer(f"the server failed: {refusal(data)}")
    if isinstance(said, dict) and said.get("choices") == []:
        return [], []
    ids, logps, _ = _read_tokens(said, expected)
    return ids, list(map(float, logps))


def _read_tokens(said: Any, expected: Expected) -> tuple[list[int], list[float], object]:
    try:
        (choice,) = said["choices"]
        ids, logps, finish = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        name, num_rows = said["model"], said["usage"]["prompt_tokens"]
    except (KeyError, TypeError, ValueError):
        raise BadAnswer(
            f"the answer is not a completion with token ids and log-probabilities: {str(said)[:80]!r}"
        ) from None
    if name != expected.model:
        raise BadAnswer(f"the answer is of the model {one_line(str(name))!r}, not of {expected.model!r}")
    if num_rows != expected.num_prompt_rows:
        raise BadAnswer(f"the server read {num_rows} tokens and latents; {expected.num_prompt_rows} were sent")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < expected.vocab_size for i in ids):
        raise BadAnswer(
            f"the answer has token ids that are not whole numbers below {expected.vocab_size}; start the server with "
            "--model as in model.name"
        )
    if not isinstance(logps, list) or len(logps) != len(ids):
        raise BadAnswer("the answer has not as many log-probabilities as token ids")
    if not all(isinstance(logp, int | float) and math.isfinite(logp) for logp in logps):
        raise BadAnswer("the answer has log-probabilities that are not finite")
    return ids, logps, finish


def served_models(body: bytes) -> dict[str, int | None]:
    """Read which models a server has: the longest sequence of each, by its name.

    Raises:
        BadAnswer: the answer is not such a list.
    """
    said = _parsed(body)
    try:
        return {str(row["id"]): row.get("max_model_len") for row in said["data"]}
    except (KeyError, TypeError, AttributeError):
        raise BadAnswer(f"the answer is not a list of models: {body[:80]!r}") from None


def refusal(body: bytes) -> str:
    """Return what a server says when it refuses, in one line, with the flag that mends it where that is known."""
    text = body[:4000].decode("utf-8", "replace")
    try:
        said = json.loads(body)
        found = said.get("error", said) if isinstance(said, dict) else said
        text = str(found["message"]) if isinstance(found, dict) and "message" in found else text
    except (ValueError, RecursionError):
        pass
    remedy = next((flag for words, flag in FLAGS.items() if words in text.lower()), "")
    return one_line(text) + (f"; {remedy}" if remedy else "")


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswer(f"the answer is not JSON: {body[:80]!r}") from None
