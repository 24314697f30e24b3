"""How `latentmem serve` serves agent programs: its address, memory, roles, sessions and limits."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from latentmem.config.section import (
    AsTuple,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)
from latentmem.config.training import Sampling


def _is_pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is {value!r}, which is no regular expression ({error})") from None
    return value


def _is_served(value: str) -> str:
    kind, colon, rest = value.partition(":")
    if value in ("none", "text") or (kind == "latent" and colon and rest):
        return value
    raise ValueError(f"is {value!r}; expected none, text, or latent:CHECKPOINT such as latent:lmpo")


ServedMemory = Annotated[PathText, AfterValidator(_is_served)]
"""A memory that can be served."""


class ServedRole(Section):
    """A role that the server knows, and how its requests are recognised where they do not name it."""

    name: Text
    """The role's name, as in `X-LatentMem-Role`."""
    profile: Text
    """Describes the role to the composer."""
    pattern: Annotated[Text, AfterValidator(_is_pattern)] | None = None
    """A regular expression that is searched for in the system message of a request that names no role; null: only
    requests that name the role have it."""


class ServeSection(Section):
    """Serving agent programs over HTTP; see docs/serving.md."""

    host: Text = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs API keys."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port to listen on; 0 takes a free one, which is announced."""
    memory: ServedMemory = "none"
    """The memory of the agents: `none`, `text`, or `latent:` followed by untrained, warmup, sft, lmpo (checkpoints of
    this run) or a folder."""
    choose_memory: bool = False
    """Whether a request may name one of `memory`, `text` and `none` for itself, as `memory` in its `latentmem`
    object."""
    roles: Annotated[tuple[ServedRole, ...], AsTuple] = ()
    """Roles that are known by name; any other system message makes a role of its own. Empty: the roles of `team`, if
    that is a program."""
    team: Text = "program"
    """The team's name, as written into the trajectories."""
    domain: Text = "served"
    """The domain of tasks whose program names none."""
    session_seconds: PositiveFloat = 3600.0
    """A session ends when nothing was asked or told in it for so long."""
    unjudged: Literal["store", "drop"] = "store"
    """What happens to an episode without a reward: `store` keeps it for its own tenant, marked as unjudged; `drop` does
    not put it into the bank."""
    parallel: PositiveInt = 32
    """Largest number of requests that are answered at the same time."""
    queue: NonNegativeInt = 256
    """Largest number of requests that wait; further ones are answered 429."""
    kept_prompt_tokens: NonNegativeInt = 4096
    """Tokens of prompts whose keys and values are kept for prompts that begin alike, such as the next ones of the same
    chat; of the model in this process, not of `model.engine`. 4,096 take 190 MB with SmolLM2-135M in float32."""
    text_budget: PositiveInt = 1024
    """Longest text of a memory that is told as text, in tokens."""
    defaults: Sampling = Sampling(max_response_tokens=512)
    """How responses are drawn where a request does not say. It may ask for shorter responses, and gets no longer
    ones."""
    keys: PathText | None = None
    """The file of API keys, made by `latentmem keys`; null: `serve/keys.sqlite` in the run's folder."""
    audit: PathText | None = None
    """The audit log; null: `serve/audit.jsonl` in the run's folder."""
    log: Literal["none", "requests", "texts"] = "requests"
    """What is logged of each request, as one line of JSON on standard error: nothing, its figures, or also its
    texts."""

    @model_validator(mode="after")
    def _each_role_once(self) -> Self:
        names = [role.name for role in self.roles]
        if len(set(names)) < len(names):
            raise ValueError("roles names one role twice")
        return self
