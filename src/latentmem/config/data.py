"""Where tasks come from: a section for each kind of data."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from latentmem.config.section import (
    AsTuple,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Text,
    WebAddress,
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
    """The families whose tasks are mixed."""
    train_size: PositiveInt = 512
    """Tasks to learn from."""
    test_size: PositiveInt = 128
    """Tasks to evaluate on."""
    seed: int = 0
    """Decides which tasks are generated; the `seed` of the run does not change them."""
    instructions: str | None = None
    """Tells the team how to answer; null: the built-in words. It does not change how an answer is read."""


class Rows(Section):
    """Where the rows of a split come from: a local file or folder, or a data set of the hub."""

    path: PathText | None = None
    """A file of rows (JSON Lines, a JSON array, CSV, parquet, also compressed), a folder of them, read in the order of
    their names, or a folder of `save_to_disk`."""
    hub: str | None = None
    """A data set's id on the hub, read by `datasets`."""
    name: str | None = None
    """The hub data set's configuration."""
    split: str | None = None
    """The hub data set's split."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Number of rows to leave out at the start; with `limit` it cuts train and test from one split."""
    limit: PositiveInt | None = None
    """Number of rows to use; null: all."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be used: it is no JSON object in UTF-8; or a field is missing, null, of the
    wrong type, blank or longer than 200,000 characters; or there is no accepted answer; or its id occurred before.
    `error` ends the command and names the row. `skip` leaves the row out and counts it by reason, in a warning and in
    run.json; `-v` names each."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError(
                "needs either path or hub, and not both; to replace the whole section, give it as {path: rows.jsonl}"
            )
        if self.hub is not None and self.split is None:
            raise ValueError("names a hub data set without its split; add split")
        return self


class SearchSection(Section):
    """The search tool: a server of the Search-R1 protocol, such as `latentmem retriever serve`."""

    url: WebAddress
    """Address of the server, such as `http://127.0.0.1:8000`; if it has no path, `/retrieve` is added."""
    topk: PositiveInt = 3
    """Passages asked for in one search."""
    max_passage_characters: PositiveInt = 600
    """Number of characters of each passage that the team sees."""
    timeout_seconds: PositiveFloat = 10.0
    """Longest time for one attempt, in seconds of wall clock."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Further attempts after the first one: the first after half a second, each later one after twice that wait. If the
    last one fails, the episode fails."""
    instructions: Text | None = None
    """Tells the team how to search and to answer; null: the built-in text."""


class QASection(Section):
    """Questions with short answers: from what the model knows, or with a search tool."""

    kind: Literal["qa"]
    """Chooses this kind of data."""
    schema_: Literal["popqa", "triviaqa", "strategyqa", "gsm8k"] = Field(alias="schema")
    """Field names of the rows."""
    train: Rows
    """Rows to learn from."""
    test: Rows
    """Rows to evaluate on; a row of `train` that also occurs here is left out of `train`."""
    instructions: str | None = None
    """Tells the team how to answer; null: the built-in words. It does not change how an answer is read."""
    search: SearchSection | None = None
    """A search tool; it needs a `max_turns` of 2 or more. null: the team answers from what the model knows."""


class SandboxSection(Section):
    """Limits on model-written code."""

    level: Literal["auto", "none"] = "auto"
    """`auto` takes bubblewrap, else Landlock with seccomp, else runs nothing. `none` runs programs unprotected, at your
    own risk."""
    timeout_seconds: PositiveFloat = 10.0
    """Longest time for one program, in seconds of wall clock; then its whole process group is killed."""
    max_memory_mb: PositiveInt = 512
    """Largest address space of one process, in MB."""
    max_processes: PositiveInt = 16
    """Largest number of processes and threads of one program."""
    max_file_mb: PositiveInt = 16
    """Largest file, in MB."""
    max_output_kb: PositiveInt = 64
    """How much output of one program is kept, in kB."""


class CodeSection(Section):
    """Programming tasks, scored by running their tests in the sandbox."""

    kind: Literal["code"]
    """Chooses this kind of data."""
    schema_: Literal["humaneval", "mbpp", "kodcode", "bigcodebench"] = Field(alias="schema")
    """Field names of the rows."""
    prompt: Literal["instruct", "complete"] = "instruct"
    """For BigCodeBench only: `instruct` gives the task in words, `complete` a function to complete, with its
    docstring."""
    train: Rows
    """Rows to learn from."""
    test: Rows
    """Rows to evaluate on; a row of `train` that also occurs here is left out of `train`."""
    instructions: str | None = None
    """Tells the team how to answer; null: the built-in words. It does not change how an answer is read."""
    sandbox: SandboxSection = SandboxSection()
    """How the programs are confined."""


class PDDLSection(Section):
    """Worlds described in PDDL, a language for planning problems, in which the team acts turn by turn. Set `max_turns`
    at the top; AgentBoard has 30.
    """

    kind: Literal["pddl"]
    """Chooses this kind of data."""
    worlds: Annotated[
        tuple[Literal["gripper", "blockworld", "barman", "tyreworld"], ...], AsTuple, Field(min_length=1)
    ] = ("gripper", "blockworld", "barman", "tyreworld")
    """The worlds to play, in AgentBoard's shares of 2 : 1 : 2 : 1."""
    size: Literal["small", "medium"] = "small"
    """Size of generated problems: `small` ones take up to 19 actions, `medium` ones up to 30."""
    train_size: PositiveInt = 120
    """Tasks to learn from. They are always generated; AgentBoard has none."""
    test_size: PositiveInt = 60
    """Tasks to evaluate on, if they are generated; AgentBoard has 60."""
    seed: int = 0
    """Decides which problems are generated; the `seed` of the run does not change them."""
    path: PathText | None = None
    """A folder in AgentBoard's layout; its problems are the test split. null: the test split is generated."""
    instructions: str | None = None
    """Told to the team in place of each world's rules and commands; null: the team is told these."""


class HiddenFactsSection(Section):
    """Questions about invented places. Only past episodes tell the facts, so nothing but memory helps."""

    kind: Literal["hidden_facts"]
    """Chooses this kind of data."""
    train_entities: PositiveInt = 64
    """Number of places to train on; no place is in two splits. With few places a memory learns them by heart; with many
    it has to learn how to carry any fact."""
    dev_entities: PositiveInt = 32
    """Number of places for choosing settings and checkpoints; their facts say nothing about the test places."""
    test_entities: PositiveInt = 100
    """Number of places to evaluate on. Tests whether a memory carries what it was never trained on."""
    values: Annotated[int, Field(ge=2)] = 32
    """Number of words that facts are drawn from; a guess is right once in that many cases. A memory can learn a code
    for few words; with many words, copying is easier."""
    held_out_values: NonNegativeInt = 0
    """Number of further words that every second place of dev and test has, and no place of train: 0, or 2 and more.
    Tests whether a memory copies what it reads, or has learned a code for the words that it was trained on."""
    attributes: Annotated[int, Field(ge=1, le=8)] = 1
    """Number of facts of each place, all told in one experience. Tests whether a memory picks the fact that is asked
    for (RULER's multi-value)."""
    asks: Literal["one", "all"] = "one"
    """A task asks for `one` fact, or for `all` of them in the order of the question. Tests whether a few latents hold
    several facts."""
    questions: PositiveInt = 1
    """Number of tasks about each place of train; they ask for its facts in turn, and then again in other words. Dev and
    test have one task a place. More tasks train reading, not remembering."""
    experiences: PositiveInt = 1
    """Number of episodes about each place. Its facts are spread over them; if there are more episodes than facts, facts
    are told again. Tests whether a memory joins several episodes."""
    outcomes: dict[Literal["corrected", "success", "wrong"], PositiveFloat] = {"corrected": 1.0}
    """How often each kind of experience occurs, as weights. `corrected`: the reply tells the facts, so a memory has to
    learn from failures. `success`: the task's text tells them too, so the team can be right. `wrong`: the reply is a
    bare yes or no, and a fact that no other episode tells is unknown."""
    distractors: Annotated[int, Field(ge=0, le=9)] = 0
    """Number of places with nearly the same name and other facts, for each place that is asked about; they occur in
    experience only. Tests whether retrieval finds the right one of several similar episodes (RULER's multi-key)."""
    revised: Share = 0.0
    """Share of places whose facts change. The text gives the day, and the newest fact counts. Tests whether a memory
    tells old from new (RULER's variable tracking)."""
    withdrawn: Share = 0.0
    """Share of places whose facts are taken back later, so that `unknown` is right. Tests whether a memory can
    forget."""
    untold: Share = 0.0
    """Share of places whose facts are never told, so that `unknown` is right. Tests whether a memory makes things
    up."""
    joined: Share = 0.0
    """Share of places that have the facts of a sister place, which an episode about the sister tells. Tests whether a
    memory combines two episodes (MQuAKE's multi-hop)."""
    phrasings: Annotated[int, Field(ge=1, le=4)] = 3
    """Number of wordings of a question; no experience uses any of them. Tests whether a memory depends on the words."""
    needs: dict[Text, Annotated[tuple[Text, ...], AsTuple, Field(min_length=1)]] = {}
    """The facts that each role has to say, by the role's name, such as {scout: [password], porter: [emblem]}; they may
    overlap. The task then names the place only. Tests whether a memory gives each role what it needs. Empty: the team's
    answer is judged."""
    seed: int = 0
    """Decides the places, the wordings and the splits; the `seed` of the run does not change them."""
    facts_seed: int = 0
    """Decides which word each fact has. Another value asks the same tasks about other facts."""
    other_facts_seed: int | None = None
    """If set, `says_other` counts the answers that would be right under this `facts_seed`. Tests whether a memory
    follows the bank when the bank holds another world's experience."""
    instructions: str | None = None
    """Tells the team how to answer; null: the built-in words. It does not change how an answer is read."""


class MixPart(Section):
    """One benchmark of a mix."""

    data: Annotated[
        ReasoningSection | QASection | CodeSection | PDDLSection | HiddenFactsSection, Field(discriminator="kind")
    ]
    """Its tasks."""
    max_turns: PositiveInt = 1
    """Turns with the environment before an episode of this part ends."""


class MixSection(Section):
    """Several benchmarks in one: their train splits, shuffled together, and the test splits of the same benchmarks or
    of others.
    """

    kind: Literal["mix"]
    """Chooses this kind of data."""
    train: Annotated[tuple[MixPart, ...], AsTuple, Field(min_length=1)]
    """Benchmarks whose train splits are learned from; a task that also occurs in a test split here is left out."""
    test: Annotated[tuple[MixPart, ...], AsTuple, Field(min_length=1)]
    """Benchmarks whose test splits are evaluated on, one after the other. Set `max_turns` at the top to the largest of
    all."""


class OwnDataSection(Section):
    """Tasks and environments of a class of your own; all keys but `kind` are its parameters."""

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
