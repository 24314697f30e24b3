"""The data types that everything else is built on, and the one JSON form in which they are stored.

A trajectory is one episode of a team on one task. Each message keeps the token ids that were sampled, their
log-probabilities and what ended them, so that training never tokenises a response again. It also keeps, as text, the
memory it was given, so that training composes from exactly what the rollout composed from.
"""

import hashlib
import json
from collections.abc import Mapping, Sized
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from latentmem.errors import DataError
from latentmem.parsing import parse_json

SCHEMA_VERSION = 3
"""Version of the trajectory's JSON form; a reader refuses a newer one. Version 2 lacks `origin`, `rewards` and what is
known of messages that came over HTTP. Version 1 has the fields of version 2, but its ids do not depend on
observations."""


def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: Sized) -> bool:
    return not len(value)


Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """A frozen record that is read strictly: unknown fields are errors, and no field is silently converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Task(Record):
    """One problem. `data` is what the environment needs to score an answer; no agent ever sees it."""

    id: str | None
    """Unique within its data set; None where the data set has no ids (then tasks are compared by their text)."""
    domain: str
    text: str
    data: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key that identifies the task: domain and id, or the exact text where there is no id."""
        return f"{self.domain}:{self.id}" if self.id is not None else f"text:{self.text}"

    def same_as(self, other: "Task") -> bool:
        """Return whether both are the same problem: equal ids in one domain, or equal texts if either has no id."""
        if self.id is not None and other.id is not None:
            return self.key == other.key
        return self.text == other.text


class Role(Record):
    """A member of a team: its name there, and the text that describes it to the composer."""

    name: str
    profile: str


class Recalled(Record):
    """The memory that a message was given, kept as text so that it can be composed again exactly."""

    kind: str
    """Name of the memory: none, text, latent, parametric."""
    text: str = ""
    """For latent memory the text that the composer read; for text memory the text put before the user's text."""
    sources: tuple[str, ...] = ()
    """Ids of the trajectories that the memory was made from, best first."""
    num_latents: int = 0
    """K for latent memory; 0 for memory that is text in the prompt, and where there is none."""

    def before(self, user: str) -> str:
        """Return the user's text as the model read it: with the memory's text before it, if the memory is text."""
        return f"{self.text}\n\n{user}" if self.text and not self.num_latents else user


class Conversation(Record):
    """A chat of any form, as a program sent it: its messages and tools, in the form of OpenAI's chat completions."""

    messages: tuple[dict[str, JsonValue], ...]
    """Messages with `role` and `content`; content is text, or a list of parts of text."""
    tools: tuple[dict[str, JsonValue], ...] = ()
    """Tools that the agent may call: `{"type": "function", "function": {...}}`."""
    must_call: str = Field(default="", exclude_if=_is_empty)
    """The tool that the response has to call: its name, or `*` for any; empty: the agent decides."""

    @property
    def system(self) -> str:
        """The texts of all system and developer messages."""
        return "\n\n".join(text_of(m) for m in self.messages if m.get("role") in SYSTEM_ROLES)

    @property
    def user(self) -> str:
        """All other messages as text: the only one as it is, several with their roles before them."""
        others = [m for m in self.messages if m.get("role") not in SYSTEM_ROLES]
        if len(others) == 1 and others[0].get("role") == "user":
            return text_of(others[0])
        return "\n\n".join(f"{m.get('role')}: {told(m)}" for m in others)

    def before(self, memory: str) -> "Conversation":
        """Return the chat with a memory's text before its first user message; a chat without one gets one."""
        if not memory:
            return self
        messages = list(self.messages)
        first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), None)
        if first is None:
            messages.append({"role": "user", "content": memory})
        else:
            messages[first] = {**messages[first], "content": f"{memory}\n\n{text_of(messages[first])}"}
        return self.model_copy(update={"messages": tuple(messages)})


SYSTEM_ROLES = ("system", "developer")


def text_of(message: Mapping[str, JsonValue]) -> str:
    """Return the text of a chat message; of a list of parts, the text of all of them."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def told(message: Mapping[str, JsonValue]) -> str:
    """Return the text of a chat message, and the tools that it calls."""
    calls = message.get("tool_calls")
    named = [json.dumps(call, ensure_ascii=False, sort_keys=True) for call in calls] if isinstance(calls, list) else []
    return "\n".join(part for part in (text_of(message), *named) if part)


class Served(Record):
    """What is known of a message that a program asked for over HTTP."""

    call: str
    """Id of the request's answer."""
    conversation: Conversation
    """The chat that was sent, without any memory."""
    prompt_ids: tuple[int, ...]
    """The prompt's tokens as the model read them, a memory's text included and latents left out; empty if a server of
    another model was asked, which tells no tokens."""
    lineage: str
    """Names the conversation within the episode: a request belongs to the longest earlier one that it continues."""
    weights: str = ""
    """Version of the agents' weights."""
    composer: str = ""
    """Version of the composer's weights; empty without latents."""
    latents: str = ""
    """Digest of the latents that were given; empty without latents."""


class Origin(Record):
    """Where a served episode came from."""

    tenant: str
    """Whose it is; empty for the common pool, which every tenant recalls."""
    session: str
    is_judged: bool
    """Whether its reward was told; else the reward says nothing."""


class Message(Record):
    """One agent's turn: its prompt, its response and the tokens the response was sampled as."""

    role: str
    system: str
    user: str
    """The user's text without any memory; `recalled.before(user)` is what the model read."""
    response: str
    token_ids: tuple[int, ...]
    """The sampled tokens, including the closing EOS if there was one."""
    logps: tuple[Finite, ...]
    """Natural log-probability of each token when it was sampled, at `temperature`."""
    finish: Literal["stop", "length", "cut"]
    """`stop`: the last token is an EOS. `length`: the limit cut the response, so it has no EOS. `cut`: a text that the
    program had named to stop at cut it."""
    temperature: Finite
    """Temperature of the log-probabilities; 0 means greedy sampling, with the log-probabilities of temperature 1."""
    num_prompt_tokens: int
    reads: tuple[int, ...] = ()
    """Positions, within the step's messages, of the messages that this prompt quotes."""
    recalled: Recalled
    served: Served | None = Field(default=None, exclude_if=_is_none)
    """Of a message that a program asked for over HTTP; then `system` and `user` only show its chat as text."""

    @model_validator(mode="after")
    def _tokens_match(self) -> Self:
        if len(self.token_ids) != len(self.logps):
            raise ValueError(f"{len(self.token_ids)} token_ids but {len(self.logps)} logps")
        return self


class Step(Record):
    """One turn with the environment: the team's messages, its action and the observation."""

    messages: tuple[Message, ...]
    action: str
    observation: str
    info: dict[str, JsonValue] = Field(default_factory=dict)
    """What the environment recorded about the action: the extracted answer, parts of the score, the sandbox level.
    Under `team`, what a team that decides as it goes recorded about how it came to the action."""

    @model_validator(mode="after")
    def _reads_backwards(self) -> Self:
        for i, message in enumerate(self.messages):
            if any(not 0 <= j < i for j in message.reads):
                raise ValueError(f"message {i} reads {message.reads}; it can read earlier messages only")
        return self


class Trajectory(Record):
    """One episode of a team on one task."""

    schema_version: int = SCHEMA_VERSION
    task: Task
    team: str
    model: str
    """Name of the agents' language model; the token ids have a meaning only for its tokenizer."""
    steps: tuple[Step, ...]
    reward: Annotated[Finite, Field(ge=0, le=1)]
    success: bool
    """reward == 1."""
    error: str | None = None
    """Why the episode failed if not because of its answer, such as a crashed environment."""
    seed: int
    rewards: dict[str, Annotated[Finite, Field(ge=0, le=1)]] = Field(default_factory=dict, exclude_if=_is_empty)
    """Rewards of single roles, by name; they stand in place of the team's `reward` for that role's messages."""
    origin: Origin | None = Field(default=None, exclude_if=_is_none)
    """Of a served episode; None for an episode that this package's own loop played."""

    def reward_of(self, role: str) -> float:
        """Return the reward that counts for a role's messages: its own, or the team's."""
        return self.rewards.get(role, self.reward)

    @model_validator(mode="after")
    def _success_is_full_reward(self) -> Self:
        if self.success != (self.reward == 1):
            raise ValueError(f"success is {self.success} but reward is {self.reward}; success means reward 1")
        return self

    @cached_property
    def id(self) -> str:
        """Content hash of the task, the messages' texts and the observations; equal for duplicates.

        Log-probs do not count. Observations count from schema version 2 on, and only where there are any. So a stored
        trajectory keeps the id it was stored under, and one without observations has the same id in both versions. The
        session of a served episode counts too, so that nobody's episode passes for a duplicate of somebody else's.
        """
        said = [[(m.role, m.system, m.user, m.response) for m in step.messages] for step in self.steps]
        observed = [step.observation for step in self.steps]
        seen = [observed] if self.schema_version >= 2 and any(observed) else []
        # An object, so that it is no list of observations.
        whose = [] if self.origin is None else [{"tenant": self.origin.tenant, "session": self.origin.session}]
        content = json.dumps([self.task.key, said, *seen, *whose], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages of all steps, in the order in which they were sampled."""
        return tuple(message for step in self.steps for message in step.messages)

    def to_json(self) -> str:
        """Return one line of canonical JSON: equal trajectories give equal bytes."""
        return json.dumps(
            self.model_dump(mode="json"), ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
        )

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "trajectory") -> "Trajectory":
        """Read what `to_json` wrote.

        Raises:
            DataError: not JSON, of a newer version, or not of the schema; the message begins with `where`.
        """
        try:
            record: Any = parse_json(text)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
        version = record.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise DataError(
                f"{where}: trajectory schema {version} is newer than {SCHEMA_VERSION}, the newest this version reads; "
                "upgrade latentmem"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "record"
            raise DataError(f"{where}: {field}: {first['msg']}") from None
