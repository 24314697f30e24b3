"""The data types that everything else is built on, and the one JSON form in which they are stored.

A trajectory is one episode of a team on one task. Each message keeps the token ids that were sampled, their
log-probabilities and what ended them, so that training never tokenises a response again. It also keeps, as text, the
memory it was given, so that training composes from exactly what the rollout composed from.
"""

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from latentmem.errors import DataError
from latentmem.parsing import parse_json

SCHEMA_VERSION = 2
"""Version of the trajectory's JSON form; a reader refuses a newer one. Version 1 has the same fields, but its ids do
not depend on observations."""

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
    finish: Literal["stop", "length"]
    """`stop`: the last token is an EOS. `length`: the limit cut the response, so it has no EOS."""
    temperature: Finite
    """Temperature of the log-probabilities; 0 means greedy sampling, with the log-probabilities of temperature 1."""
    num_prompt_tokens: int
    reads: tuple[int, ...] = ()
    """Positions, within the step's messages, of the messages that this prompt quotes."""
    recalled: Recalled

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

    @model_validator(mode="after")
    def _success_is_full_reward(self) -> Self:
        if self.success != (self.reward == 1):
            raise ValueError(f"success is {self.success} but reward is {self.reward}; success means reward 1")
        return self

    @cached_property
    def id(self) -> str:
        """Content hash of the task, the messages' texts and the observations; equal for duplicates.

        Log-probs do not count. Observations count from schema version 2 on, and only where there are any. So a stored
        trajectory keeps the id it was stored under, and one without observations has the same id in both versions.
        """
        said = [[(m.role, m.system, m.user, m.response) for m in step.messages] for step in self.steps]
        observed = [step.observation for step in self.steps]
        told = [observed] if self.schema_version >= 2 and any(observed) else []
        content = json.dumps([self.task.key, said, *told], ensure_ascii=False, separators=(",", ":"))
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
