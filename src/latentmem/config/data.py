"""Where tasks come from: a section for each kind of data."""

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from latentmem.config.section import (
    AsTuple,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Text,
)
from latentmem.own import is_own


class Family(Section):
    """One reasoning-gym family of tasks."""

    name: Text
    """As reasoning-gym calls it, such as `chain_sum`."""
    weight: PositiveFloat = 1.0
    """Share in the mix, relative to the other families."""
    params: dict[str, JsonValue] = {}
    """Arguments of the family, as reasoning-gym names them."""


class ReasoningSection(Section):
    """Generated tasks of reasoning-gym; train and test come from different seeds and share no task text."""

    kind: Literal["reasoning_gym"]
    """Chooses this kind of data."""
    families: Annotated[tuple[Family, ...], AsTuple, Field(min_length=1)]
    """What is mixed."""
    train_size: PositiveInt = 512
    """Tasks to learn from."""
    test_size: PositiveInt = 128
    """Tasks to evaluate on."""
    seed: int = 0
    """Of the tasks; `seed` above leaves them as they are."""
    instructions: str | None = None
    """How the team is told to answer; null: the built-in words. What is read from an answer stays as it is."""


class Rows(Section):
    """Where the rows of a split come from: a local JSONL file or folder, or a data set of the hub."""

    path: PathText | None = None
    """A .jsonl file, or a folder of them, read in the order of their names."""
    hub: str | None = None
    """A data set's id on the hub, read by `datasets`."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str | None = None
    """The hub data set's split."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Leave out the first so many rows; with `limit` it cuts train and test from one split."""
    limit: PositiveInt | None = None
    """Use so many rows."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used (no JSON object in UTF-8, a field missing, null, of the wrong type, blank or of more
    than 200,000 characters, no accepted answer, an id that occurred before): `error` ends the command and names the
    row; `skip` leaves it out, counts it by reason in a warning and in run.json, and names each with `-v`."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError(
                "needs exactly one of path and hub; a section given whole replaces it, as {path: rows.jsonl}"
            )
        if self.hub is not None and self.split is None:
            raise ValueError("names a hub data set, which needs its split")
        return self


class SearchSection(Section):
    """The search tool: a server of the Search-R1 protocol, such as `latentmem retriever serve`."""

    url: Text
    """Of the server, such as `http://127.0.0.1:8000`; without a path `/retrieve` is added."""
    topk: PositiveInt = 3
    """Passages asked for in one search."""
    max_passage_characters: PositiveInt = 600
    """Characters of each passage that the team is shown."""
    timeout_seconds: PositiveFloat = 10.0
    """Wall clock of one attempt, in seconds."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Attempts after the first: half a second later, then after twice as long each time. The episode fails with the
    last of them."""
    instructions: Text | None = None
    """How to search and to answer, told to the team; null: the built-in text."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.query or parts.fragment or parts.username:
            raise ValueError(f"is {value!r}; expected a web address such as http://127.0.0.1:8000")
        return value


class QASection(Section):
    """Questions with short answers: from what the model knows, or with a search tool."""

    kind: Literal["qa"]
    """Chooses this kind of data."""
    schema_: Literal["popqa", "triviaqa", "strategyqa", "gsm8k"] = Field(alias="schema")
    """Field names of the rows."""
    train: Rows
    """Rows to learn from."""
    test: Rows
    """Rows to evaluate on; what also occurs here is left out of `train`."""
    instructions: str | None = None
    """How the team is told to answer; null: the built-in words. What is read from an answer stays as it is."""
    search: SearchSection | None = None
    """A search tool, for which `max_turns` has to be 2 or more; null is closed book."""


class SandboxSection(Section):
    """Limits on model-written code."""

    level: Literal["auto", "none"] = "auto"
    """`auto`: bubblewrap, else Landlock with seccomp, else refuse. `none` runs unprotected, on your own word."""
    timeout_seconds: PositiveFloat = 10.0
    """Wall clock for one program; then its whole process group is killed."""
    max_memory_mb: PositiveInt = 512
    """Address space of one process, in MB."""
    max_processes: PositiveInt = 16
    """Processes and threads of one program."""
    max_file_mb: PositiveInt = 16
    """Largest file, in MB."""
    max_output_kb: PositiveInt = 64
    """Output kept of one program, in kB."""


class CodeSection(Section):
    """Programming tasks, scored by running their tests in the sandbox."""

    kind: Literal["code"]
    """Chooses this kind of data."""
    schema_: Literal["humaneval", "mbpp", "kodcode", "bigcodebench"] = Field(alias="schema")
    """Field names of the rows."""
    prompt: Literal["instruct", "complete"] = "instruct"
    """Of BigCodeBench only: a task in words, or a function to complete, with its docstring."""
    train: Rows
    """Rows to learn from."""
    test: Rows
    """Rows to evaluate on; what also occurs here is left out of `train`."""
    instructions: str | None = None
    """How the team is told to answer; null: the built-in words. What is read from an answer stays as it is."""
    sandbox: SandboxSection = SandboxSection()
    """What contains the programs."""


class PDDLSection(Section):
    """Worlds described in PDDL, acted in turn by turn; set `max_turns` above, which AgentBoard has at 30."""

    kind: Literal["pddl"]
    """Chooses this kind of data."""
    worlds: Annotated[
        tuple[Literal["gripper", "blockworld", "barman", "tyreworld"], ...], AsTuple, Field(min_length=1)
    ] = ("gripper", "blockworld", "barman", "tyreworld")
    """What is played, in AgentBoard's shares of 2 : 1 : 2 : 1."""
    size: Literal["small", "medium"] = "small"
    """Of generated problems: they take up to 19 actions, or up to 30."""
    train_size: PositiveInt = 120
    """Tasks to learn from, always generated; AgentBoard has none."""
    test_size: PositiveInt = 60
    """Tasks to evaluate on, where they are generated; AgentBoard has 60."""
    seed: int = 0
    """Of the generated problems; `seed` above leaves them as they are."""
    path: PathText | None = None
    """A folder in AgentBoard's layout, whose problems are the test split; null generates them."""
    instructions: str | None = None
    """What the team is told in place of each world's rules and commands; null: those."""


class HiddenFactsSection(Section):
    """Invented places whose facts only past episodes tell, so that nothing but memory helps."""

    kind: Literal["hidden_facts"]
    """Chooses this kind of data."""
    train_entities: PositiveInt = 64
    """Places that are trained on; no place is in two splits. With few of them a memory learns the places by heart; with
    many it has to learn how to carry any."""
    dev_entities: PositiveInt = 32
    """Places for choosing settings and checkpoints: what is found there tells nothing about test."""
    test_entities: PositiveInt = 100
    """Places that are evaluated on: whether a memory carries what it was never trained on."""
    values: Annotated[int, Field(ge=2)] = 32
    """Words that facts are drawn from; guessing is right once in so many. Few words can be told apart by a code, many
    make copying the easier way."""
    held_out_values: NonNegativeInt = 0
    """Further words, which every second place of dev and test has and no place of train: whether a memory copies what
    it reads, or has learned a code for the words that it was trained on. 0, or 2 and more."""
    attributes: Annotated[int, Field(ge=1, le=8)] = 1
    """Facts of each place, all told in one experience: whether a memory picks what is asked for (RULER's
    multi-value)."""
    asks: Literal["one", "all"] = "one"
    """`one` fact in a task, or `all` of them in the order of the question: whether a few latents hold several facts."""
    questions: PositiveInt = 1
    """Tasks about each place of train, on its facts in turn and then in further words; dev and test have one. More of
    them train reading, not remembering."""
    experiences: PositiveInt = 1
    """Episodes about each place. Its facts are dealt out over them: whether a memory joins several episodes. Where
    there are more episodes than facts, facts are told again."""
    outcomes: dict[Literal["corrected", "success", "wrong"], PositiveFloat] = {"corrected": 1.0}
    """Weights of what an experience brings: `corrected`, the reply tells the facts, so that a memory has to learn from
    failures; `success`, the task's text tells them too, so that the team can be right; `wrong`, the reply is a bare yes
    or no, and what no other episode tells is unknown."""
    distractors: Annotated[int, Field(ge=0, le=9)] = 0
    """Places with nearly the same name and other facts, for each place that is asked about, in experience only: whether
    the right episode is found and told from its like (RULER's multi-key)."""
    revised: Share = 0.0
    """Share of places whose facts change; the day stands in the text and the newest counts: whether a memory knows old
    from new (RULER's variable tracking)."""
    withdrawn: Share = 0.0
    """Share of places whose facts are taken back later, so that `unknown` is right: whether a memory can forget."""
    untold: Share = 0.0
    """Share of places whose facts are never told, so that `unknown` is right: whether a memory makes things up."""
    joined: Share = 0.0
    """Share of places whose facts are those of a sister, told in an episode of hers: whether a memory combines two
    episodes (MQuAKE's multi-hop)."""
    phrasings: Annotated[int, Field(ge=1, le=4)] = 3
    """Wordings of a question, none of them used in an experience: whether a memory depends on the words."""
    needs: dict[Text, Annotated[tuple[Text, ...], AsTuple, Field(min_length=1)]] = {}
    """The facts that each role has to say, by the role's name, such as {scout: [password], porter: [emblem]}; they may
    overlap. The task then names the place only: whether each role is given what it needs. Empty: the team's answer
    is judged."""
    seed: int = 0
    """Of the places, the wordings and the splits; `seed` above leaves them as they are."""
    facts_seed: int = 0
    """Which word each fact has. Another one asks the same tasks about another truth."""
    other_facts_seed: int | None = None
    """Counts, as `says_other`, answers that are right under this `facts_seed`: whether a memory follows the bank when
    another world's experience is put into it."""
    instructions: str | None = None
    """How the team is told to answer; null: the built-in words. What is read from an answer stays as it is."""


class MixPart(Section):
    """One benchmark of a mix."""

    data: Annotated[
        ReasoningSection | QASection | CodeSection | PDDLSection | HiddenFactsSection, Field(discriminator="kind")
    ]
    """Its tasks."""
    max_turns: PositiveInt = 1
    """Turns with the environment before an episode of this part ends."""


class MixSection(Section):
    """Several benchmarks in one: their train splits shuffled together, and the test splits of the same or of others."""

    kind: Literal["mix"]
    """Chooses this kind of data."""
    train: Annotated[tuple[MixPart, ...], AsTuple, Field(min_length=1)]
    """Benchmarks whose train splits are learned from; what also occurs in a test split here is left out."""
    test: Annotated[tuple[MixPart, ...], AsTuple, Field(min_length=1)]
    """Benchmarks whose test splits are evaluated on, one after the other. `max_turns` above is the largest of all."""


class OwnDataSection(Section):
    """Tasks and environments of a class of one's own; all keys but `kind` are its parameters."""

    model_config = ConfigDict(extra="allow")

    kind: Text
    """`module:Name` of the class; see docs/environments.md."""

    @property
    def parameters(self) -> dict[str, Any]:
        """What the class is made with."""
        return dict(self.model_extra or {})


def _kind_of(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "own" if isinstance(kind, str) and is_own(kind) else kind


DataSection = Annotated[
    Annotated[ReasoningSection, Tag("reasoning_gym")]
    | Annotated[QASection, Tag("qa")]
    | Annotated[CodeSection, Tag("code")]
    | Annotated[PDDLSection, Tag("pddl")]
    | Annotated[HiddenFactsSection, Tag("hidden_facts")]
    | Annotated[MixSection, Tag("mix")]
    | Annotated[OwnDataSection, Tag("own")],
    Discriminator(_kind_of),
]
