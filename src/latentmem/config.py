"""A whole experiment in one YAML file, read strictly: one frozen section a part, each default written once, here.

Classes elsewhere take plain arguments; only the recipes see a whole `Config`. Paths in it are relative to the folder a
command is started in, not to the file, so that the overrides and the file mean the same. Loads no torch.
"""

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from latentmem.errors import ConfigError, suggest
from latentmem.memory_names import DEFAULT_MEMORIES, MemoryName, known_memory
from latentmem.templates import check_template

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys forbidden, numbers never read from strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


AnySection = TypeVar("AnySection", bound=Section)
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""YAML has lists; a frozen section holds tuples."""


def _named(value: Any) -> Any:
    """Names of memories as a user writes them, taken apart; what is no list is left to the type."""
    if not isinstance(value, tuple):
        return value
    for name in value:
        if not isinstance(name, str | MemoryName):
            raise ValueError(f"has {name!r}; expected the names of memories")
    names = tuple(name if isinstance(name, MemoryName) else known_memory(name) for name in value)
    if len(set(names)) != len(names):
        raise ValueError("names one memory twice")
    return names


MemoryNames = Annotated[
    tuple[MemoryName, ...],
    BeforeValidator(_named),
    AsTuple,
    Field(min_length=1),
    PlainSerializer(lambda names: [str(name) for name in names]),
]
"""As `evaluate.memories`; written down as texts again."""


class ModelSection(Section):
    """The agents' frozen language model."""

    name: Text = "smollm2-135m"
    """`smollm2-135m` (embedded), a hub id, a local folder, or a .gguf file."""
    device: str = "auto"
    """`auto` takes the GPU of this process if there is one, else the CPU; or a torch device."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 on the CPU."""
    max_batch_size: PositiveInt = 64
    """Responses sampled at once; a matter of memory, not of the result."""


class ComposerSection(Section):
    """The network that turns retrieved trajectories into latent tokens."""

    model: str | None = None
    """Base model of the composer, named as in `model.name`; null shares the agents' backbone in memory."""
    num_latents: PositiveInt = 8
    """K, the latent tokens given to one agent."""
    rank: PositiveInt = 16
    """r of LoRA."""
    alpha: PositiveFloat = 32.0
    """Scale of LoRA, applied as alpha / rank."""
    target_modules: Annotated[tuple[str, ...], AsTuple] = ("q_proj", "v_proj")
    """Linear layers that get an adapter."""
    template: str | None = None
    """Text the composer reads; fields {task} {memory} {role} {role_messages} {num_latents}. null: the built-in one."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest composer text, in tokens; the retrieved trajectories are shortened to fit, and counted."""
    initial_scale: PositiveFloat = 0.1
    """Root mean square of what the hidden states add to the untrained latents, relative to that of the agents' token
    embeddings; without it they are K line breaks."""
    slots: PositiveInt | None = None
    """The first so many latents are slots for words: what the composer would say next, as a soft token of the agents,
    in a frame that `train warmup` teaches them to read. null: the paper's form, a projection with one bias for all."""
    sharpness: PositiveFloat = 2.0
    """Logits of a slot's word are multiplied by it: more is nearer to one token, and leaves less to learn from."""
    cue: Text | None = None
    """What the composer reads after its text, but for its last token: as that token each query begins. A phrase that a
    remembered word would follow, such as "The answer is". null: queries begin at random."""


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

    path: str | None = None
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
    path: str | None = None
    """A folder in AgentBoard's layout, whose problems are the test split; null generates them."""
    instructions: str | None = None
    """What the team is told in place of each world's rules and commands; null: those."""


Share = Annotated[float, Field(ge=0, le=1)]


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


DataSection = Annotated[
    ReasoningSection | QASection | CodeSection | PDDLSection | HiddenFactsSection | MixSection,
    Field(discriminator="kind"),
]


class BankSection(Section):
    """The experience bank and what is retrieved from it."""

    path: str | None = None
    """An existing bank to read and fill; null keeps one in the run's folder."""
    embedder: str = "all-minilm-l6-v2"
    """`all-minilm-l6-v2` (embedded), or any sentence-transformers id or folder."""
    index: Literal["exact", "approximate"] = "exact"
    """`approximate`, for a million trajectories and more, may miss some of the nearest; needs `latentmem[ann]`."""
    num_retrieved: PositiveInt = 3
    """Trajectories recalled for a task."""
    only_successes: bool = True
    """Recall successful trajectories only. What failed may hold the correction: where episodes end in feedback, set it
    to false. A warning tells when most of a bank is left out."""
    experience_tasks: Annotated[int, Field(ge=0)] = 0
    """Train tasks, from the start of the split, that are played into the bank and neither trained on nor asked, where
    the data have no experience split of their own; 0: the train split itself is collected, as in the paper."""
    rating: Literal["none", "logits"] = "none"
    """`none` recalls the nearest; `logits` finds twice as many and recalls those that the agents' model rates as most
    helpful, from 1 to 10, by the expected value of its answer."""
    rating_template: str | None = None
    """What the model is asked for a rating; fields {task} and {episode}, best in this order. null: the built-in one."""
    rating_system: str | None = None
    """The system prompt that goes with it. null: the built-in one."""
    rating_max_tokens: PositiveInt = 1024
    """Longest rating prompt, in tokens; the episode is shortened to fit, and counted."""


class Worded(Section):
    """A section with texts of which some are templates; their fields are checked when it is read."""

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The fields that each template may have."""
    NEEDED: ClassVar[tuple[str, ...]] = ()
    """Templates that may lack none of theirs: a prompt without them would ask about nothing."""

    @field_validator("*")
    @classmethod
    def _known_fields(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        name = info.field_name or ""
        fields = cls.FIELDS.get(name, ())
        try:
            check_template(value, fields, "is a template")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for field in fields if name in cls.NEEDED else ():
            if f"{{{field}}}" not in value:
                raise ValueError(f"is a template: the field {{{field}}} is missing, and this prompt needs it; add it")
        return value.rstrip("\n")  # editors and YAML's blocks add it


class MemorySection(Worded):
    """The words around what is remembered, in text memory and in what the composer reads; an episode is told line by
    line, and a line that is set to nothing is left out.
    """

    text: str = (
        "Here is how the team handled similar tasks before:\n\n{memory}\n\nThat was the past. Now the task at hand:"
    )
    """Text memory, put before the user's text; fields {memory}."""
    task: str = "Task: {task}"
    """First line of an episode; fields {task}."""
    step: str = "Answer: {action}"
    """What the team did in a turn; fields {action}."""
    reply: str = "Feedback: {observation}"
    """What came back, where something did; fields {observation}."""
    solved: str = "Outcome: solved"
    """Last line of an episode with reward 1."""
    unsolved: str = "Outcome: not solved"
    """Last line of any other."""
    entry: str = "[{number}] {text}"
    """One of several episodes or sayings in the composer's text; fields {number} {text}."""
    member: str = "{role}: {profile}"
    """The role in the composer's text; fields {role} {profile}."""
    nothing: str = "(none so far)"
    """Stands in the composer's text where nothing was retrieved."""
    silent: str = "(said nothing)"
    """Stands in the composer's text for a role that had no part in an episode."""

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("memory",),
        "task": ("task",),
        "step": ("action",),
        "reply": ("observation",),
        "entry": ("number", "text"),
        "member": ("role", "profile"),
    }


class VoyagerSection(Worded):
    """Voyager (arXiv 2305.16291): successes found by what a language model says they are good for."""

    system: str = "You write index cards for a library of solved tasks."
    """System prompt of `summary`."""
    summary: str = (
        "{episode}\n\nSay in one or two sentences what kind of task this was and how it was solved, so that it is "
        "found again when a task of this kind comes up. Leave out the particular numbers and names."
    )
    """Asked once of each success; the reply is its key. Fields {episode}."""

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {"summary": ("episode",)}
    NEEDED: ClassVar[tuple[str, ...]] = ("summary",)


class GenerativeSection(Worded):
    """Generative agents (arXiv 2304.03442): the best of recency, importance and relevance. Relevance is asked for with
    `bank.rating_template`, whatever `bank.rating` is.
    """

    recency_weight: NonNegativeFloat = 1.0
    """Of how lately a success was stored."""
    importance_weight: NonNegativeFloat = 1.0
    """Of what it was rated by itself, when it was learned from."""
    relevance_weight: NonNegativeFloat = 1.0
    """Of what it is rated for the task at hand. With the other two at 0 this is the form that memories of teams are
    usually compared in."""
    recency_decay: Annotated[float, Field(gt=0, le=1)] = 0.995
    """What is left of recency with each success stored later."""
    importance_system: str = (
        "You rate how instructive a record is. You reply with a number from 1 to 10 and nothing else."
    )
    """System prompt of `importance`."""
    importance: str = (
        "{episode}\n\nRate from 1 (everyday, nothing to learn from it) to 10 (rare and instructive) how much a team "
        "that solves tasks of many kinds gains from remembering this record.\n\n"
        "Importance, as one whole number from 1 to 10:"
    )
    """Asked once of each success. Fields {episode}."""

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {"importance": ("episode",)}
    NEEDED: ClassVar[tuple[str, ...]] = ("importance",)


class InsightsSection(Worded):
    """Lists of insights, as OAgents (arXiv 2506.15741) and G-Memory keep them, with ExpeL's operations (2308.10144)."""

    max_insights: PositiveInt = 20
    """Kept; beyond that those of the lowest score go, the older ones first."""
    episodes_per_round: PositiveInt = 4
    """Episodes shown in one prompt, in the order they were stored."""
    system: str = (
        "You keep a short list of insights for a team that solves tasks, and mend it as experience comes in. You reply "
        "with lines that change the list and nothing else."
    )
    """System prompt of `revise`."""
    revise: str = (
        "The list as it stands:\n{insights}\n\nNew episodes of the team:\n\n{episodes}\n\n"
        "Compare what was solved with what was not, and change the list by at most four lines of these forms:\n"
        "ADD: an insight that is not on the list and helps with other tasks as well\n"
        "EDIT 2: insight 2, put better\nAGREE 2\nREMOVE 2\n"
        "An insight is one sentence. The list holds at most {max_insights}."
    )
    """Asked for each round. Fields {insights} {episodes} {max_insights}."""
    told: str = "What the team has learned so far:\n{insights}"
    """Insights put before an agent's text. Fields {insights}."""

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "revise": ("insights", "episodes", "max_insights"),
        "told": ("insights",),
    }
    NEEDED: ClassVar[tuple[str, ...]] = ("revise", "told")


class GMemorySection(Worded):
    """G-Memory (arXiv 2506.07398): a graph of tasks, insights that its nodes support, and what each role needs of them.
    Candidates are rated with `bank.rating_template`; insights are learned as `rivals.insights` says.
    """

    nearest: PositiveInt = 2
    """Nodes of the graph that a recall starts from."""
    hops: Annotated[int, Field(ge=0)] = 1
    """Edges that it follows from there."""
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.7
    """Least cosine between two tasks that are joined by an edge."""
    max_links: PositiveInt = 5
    """Edges from a new node to older ones, the most similar."""
    max_candidates: PositiveInt = 10
    """Successes rated for a task, those fewest hops away first; `bank.num_retrieved` of them are told."""
    num_insights: PositiveInt = 3
    """Insights for a task: the best of those that a node which was reached supports."""
    opening: str = "[{number}] {role}: {response}"
    """A message that reads none, in the text that is condensed. Fields {number} {role} {response}."""
    reading: str = "[{number}] {role}, having read {reads}: {response}"
    """Any other. Fields {number} {role} {reads} {response}."""
    condense_system: str = "You cut records of a team's work down to what mattered."
    """System prompt of `condense`."""
    condense: str = (
        "{episode}\n\nIn at most four short lines: which messages decided how this ended, and what did they say or get "
        "wrong?"
    )
    """Asked once of each episode. Fields {episode}."""
    project_system: str = "You brief one member of a team before a task."
    """System prompt of `project`."""
    project: str = (
        "The task:\n{task}\n\nThe member:\n{role}\n\nWhat the team has learned so far:\n{insights}\n\n"
        "In at most three short lines, what of this should the member keep in mind in that part?"
    )
    """Asked for each role of each task that there are insights for. Fields {task} {role} {insights}."""

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "opening": ("number", "role", "response"),
        "reading": ("number", "role", "reads", "response"),
        "condense": ("episode",),
        "project": ("task", "role", "insights"),
    }
    NEEDED: ClassVar[tuple[str, ...]] = ("condense", "project")


class RivalsSection(Section):
    """The memories that latent memory is compared with and that learn with a language model's help; the agents' own
    model is asked, greedily. They tell `bank.num_retrieved` successes, in the words of `memory`.
    """

    batch_size: PositiveInt = 16
    """Trajectories learned from between two saves."""
    max_response_tokens: PositiveInt = 256
    """Longest reply, in tokens."""
    max_episode_characters: PositiveInt = 4000
    """Longest text of one episode in a prompt; the middle of a longer one is left out, and counted."""
    voyager: VoyagerSection = VoyagerSection()
    """Of the memory `voyager`."""
    generative: GenerativeSection = GenerativeSection()
    """Of the memory `generative`."""
    insights: InsightsSection = InsightsSection()
    """Of the memories `oagents` and `gmemory`."""
    gmemory: GMemorySection = GMemorySection()
    """Of the memory `gmemory`."""


class SamplingSection(Section):
    """How responses are sampled while collecting and training."""

    temperature: NonNegativeFloat = 0.7
    """0 is greedy. It is part of the log-probabilities that training uses."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest most likely tokens that have this much probability together; 1 keeps all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 keeps the whole vocabulary."""
    max_response_tokens: PositiveInt = 64
    """Longest response of one agent, its EOS included."""


class CollectSection(Section):
    """Filling the bank."""

    num_tasks: PositiveInt | None = None
    """Tasks to play, from the start of the experience split, or of the train split where there is none; null is all."""
    rollouts_per_task: PositiveInt = 1
    """Episodes of each task."""
    batch_size: PositiveInt = 16
    """Episodes played side by side, and stored as one transaction."""
    memory: Literal["none", "text", "latent", "metagpt", "voyager", "generative", "oagents", "gmemory"] = "none"
    """Memory of the team while it collects; `latent` is with an untrained composer."""


class OptimizerFields(Section):
    """What all trainers share."""

    learning_rate: PositiveFloat = 2e-4
    """Of the LoRA matrices and, in a composer, `query_latents`."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Of the learning rate after the warm-up; linear and cosine end at zero."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    """Steps in which the rate rises from zero."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this L2 norm."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW."""
    micro_batch_positions: PositiveInt = 512
    """Positions with gradients in one forward pass; a matter of memory, not of the result (but for `bnpo`)."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations on `eval_tasks` tasks set aside; the best checkpoint is selected. null: never, and the
    last one is."""
    eval_tasks: PositiveInt = 32
    """Tasks set aside if `eval_every` is set: the first of the dev split, or all that it has; where the data have none,
    the last of the train split, which then are not trained on. `sft` from the bank takes the last train tasks
    always."""
    save_every: PositiveInt = 5
    """Steps between checkpoints."""


class ComposerOptimizerFields(OptimizerFields):
    """What the trainers of a composer share."""

    projection_rate: PositiveFloat = 0.2
    """Learning rate of the projection, as a multiple of `learning_rate`; its weights are small, and each latent number
    sums over all of d_composer, so at the full rate one step may move the latents by several times their size. What
    was tried: docs/results/tried.md."""


class GroupFields(Section):
    """Reinforcement learning on groups of rollouts that are compared with each other."""

    num_steps: PositiveInt = 100
    """Optimizer steps."""
    tasks_per_step: PositiveInt = 8
    """Tasks rolled out for one step, over all processes."""
    group_size: int = 8
    """G, rollouts of one task that are compared with each other."""
    num_iterations: PositiveInt = 1
    """Update passes over one batch of rollouts."""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "dapo"
    """What the loss is divided by; see `training.losses.lmpo_loss`."""
    scale_advantages: bool = True
    """Divide by the group's standard deviation."""
    epsilon_low: NonNegativeFloat = 0.2
    """A ratio below 1 - epsilon_low is clipped."""
    epsilon_high: NonNegativeFloat = 0.2
    """A ratio above 1 + epsilon_high is clipped."""
    delta: PositiveFloat | None = None
    """Two-sided clip: largest ratio that counts where the advantage is negative; null is no bound."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence to what is trained as it was before."""
    importance_cap: PositiveFloat | None = None
    """Largest weight of a token in truncated importance sampling, which corrects for responses that were sampled with
    slightly other probabilities than training computes, as in bfloat16; 2 is usual. Costs a forward pass a step. null:
    no correction."""
    max_resamples: Annotated[int, Field(ge=0)] = 0
    """Extra draws of `tasks_per_step` tasks while fewer than that many groups carry signal (dynamic sampling)."""

    @field_validator("group_size")
    @classmethod
    def _at_least_two(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"is {value}; advantages need at least 2 rollouts per task, set it to 4 or more")
        return value

    @model_validator(mode="after")
    def _delta_above_band(self) -> Self:
        if self.delta is not None and self.delta <= 1 + self.epsilon_high:
            raise ValueError(f"has delta {self.delta}; it must be above 1 + epsilon_high = {1 + self.epsilon_high}")
        return self


class WarmupSection(Section):
    """Before any data: the agents learn to read the slots of a composer, and the composer to fill them with words."""

    frame_steps: PositiveInt = 50
    """Steps in which constants around the embedding of a random word are trained until the agents say that word."""
    frame_rate: PositiveFloat = 1e-2
    """Learning rate of these steps."""
    copy_steps: Annotated[int, Field(ge=0)] = 20
    """Steps in which the composer reads made-up episodes and the agents have to say a word that these told."""
    learning_rate: PositiveFloat = 1e-3
    """Of the LoRA matrices and `query_latents` in these steps."""
    projection_rate: PositiveFloat = 0.1
    """Learning rate of projection, gates and frames, as a multiple of `learning_rate`."""
    lessons_per_step: PositiveInt = 16
    """Examples in one step, over all processes."""
    words_per_prompt: PositiveInt = 8
    """Words tried after one prompt while the frame is trained; the prompt is read once for them."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this L2 norm."""
    micro_batch_positions: PositiveInt = 512
    """Positions with gradients in one forward pass; a matter of memory, not of the result."""
    eval_every: PositiveInt | None = 20
    """Steps between evaluations on words that are never trained on."""
    save_every: PositiveInt = 20
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _whole_prompts(self) -> Self:
        if self.lessons_per_step % self.words_per_prompt:
            raise ValueError(
                f"has lessons_per_step {self.lessons_per_step}; make it a multiple of words_per_prompt, "
                f"{self.words_per_prompt}"
            )
        return self


class SFTSection(ComposerOptimizerFields):
    """Supervised warm start on successful trajectories, or on demonstrated ones."""

    initial: Text = "untrained"
    """Where training starts: `untrained`, `warmup` (this run's), or a composer's folder."""
    demonstrations: Text = "bank"
    """What is learned: `bank` (the successes in it), `domain` (what the data itself can demonstrate: `hidden_facts`
    only), or a .jsonl file of demonstrated responses, rows of `task` and `responses`; see docs/training.md."""
    num_steps: PositiveInt = 50
    """Optimizer steps."""
    trajectories_per_step: PositiveInt = 8
    """Episodes learned from in one step, over all processes."""

    @field_validator("initial")
    @classmethod
    def _starts_before(cls, value: str) -> str:
        if value in ("sft", "lmpo", "grpo"):
            raise ValueError(
                f"is {value!r}, which is no start of sft; expected untrained, warmup or a composer's folder"
            )
        return value

    @field_validator("demonstrations")
    @classmethod
    def _known_source(cls, value: str) -> str:
        if value not in ("bank", "domain") and not value.endswith(".jsonl"):
            raise ValueError(f"is {value!r}; expected bank, domain or the path of a .jsonl file")
        return value


class LMPOSection(GroupFields, ComposerOptimizerFields):
    """Reinforcement learning through the latents (arXiv 2602.03036, section 4)."""

    initial: str = "sft"
    """Where training starts: `sft` or `warmup` (this run's), `untrained`, or a composer's folder."""


class GRPOSection(GroupFields, OptimizerFields):
    """The parametric rival: the same reinforcement learning on one LoRA of the agents themselves, without any memory
    (arXiv 2402.03300).
    """

    rank: PositiveInt = 16
    """r of LoRA."""
    alpha: PositiveFloat = 32.0
    """Scale of LoRA, applied as alpha / rank."""
    target_modules: Annotated[tuple[str, ...], AsTuple, Field(min_length=1)] = ("q_proj", "v_proj")
    """Linear layers that get an adapter."""
    micro_batch_positions: PositiveInt = 1024
    """Positions with gradients in one forward pass, those of prompts included, shared beginnings counted once; a matter
    of memory, not of the result (but for `bnpo`)."""


FILLS_BANK = ("seed", "team", "train_teams", "max_turns", "data", "model", "sampling", "collect")
"""Sections and keys that, with some of `bank`, decide what collecting without memory leaves in a bank."""
FILLS_BANK_IN_BANK = ("embedder", "experience_tasks")
"""Those of `bank`."""


class EvaluateSection(Section):
    """Comparing memories on the test split, or on the dev split."""

    memories: MemoryNames = DEFAULT_MEMORIES
    """none, text, latent:untrained, latent:warmup, latent:sft, latent:lmpo (checkpoints of this run), latent:FOLDER, or
    one of the rivals metagpt, voyager, generative, oagents, gmemory; grpo (the agents that this run trained, without
    memory) or grpo:FOLDER. text, metagpt or a latent one followed by :empty, :shuffle, :irrelevant, :corrupt or :filler
    is a control of it; :other-role, :random and :zero are controls of latent ones only."""
    split: Literal["test", "dev"] = "test"
    """What is evaluated on. `dev` is for choices: the test split is looked at once. Where the data have no dev split,
    it is the train tasks that `lmpo` sets aside, the last `lmpo.eval_tasks`. Results go to results-dev.json."""
    num_tasks: PositiveInt | None = None
    """Tasks of the split, from its start; null is all."""
    batch_size: PositiveInt = 32
    """Episodes played side by side; a batch is what an interrupted evaluation repeats."""
    temperature: NonNegativeFloat = 0.0
    """Of the evaluated agents; 0 is greedy."""
    max_response_tokens: PositiveInt | None = None
    """Longest response of one agent, its EOS included; null: as in `sampling`. A memory that was trained to short
    answers is compared fairly only with room for the longer ones of the others."""
    online: bool = False
    """Let each memory store its test trajectories as it goes, in a copy of the bank."""
    num_bootstraps: PositiveInt = 10_000
    """Resamples of the tasks, for intervals and p-values."""


class Config(Section):
    """One experiment."""

    run: Text
    """Folder of the run; made if absent, continued if present."""
    seed: int = 0
    """Of all randomness but that of the tasks."""
    team: str = "autogen"
    """autogen, camel, macnet, dylan, pair, solo, or the path of a team's YAML file."""
    train_teams: Annotated[tuple[Text, ...], AsTuple] = ()
    """Teams that collect and train in place of `team`, which then is evaluated only; each task is dealt to one of them.
    Empty: `team` does it all."""
    max_turns: PositiveInt = 1
    """Turns with the environment before an episode ends."""
    data: DataSection
    model: ModelSection = ModelSection()
    composer: ComposerSection = ComposerSection()
    bank: BankSection = BankSection()
    memory: MemorySection = MemorySection()
    rivals: RivalsSection = RivalsSection()
    sampling: SamplingSection = SamplingSection()
    collect: CollectSection = CollectSection()
    warmup: WarmupSection = WarmupSection()
    sft: SFTSection = SFTSection()
    lmpo: LMPOSection = LMPOSection()
    grpo: GRPOSection = GRPOSection()
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="after")
    def _turns_to_search_and_answer(self) -> Self:
        if isinstance(self.data, QASection) and self.data.search is not None and self.max_turns < 2:
            raise ValueError(
                "max_turns is 1; data.search needs a turn to search and one to answer, set it to 2 or more"
            )
        return self


def packaged_configs() -> dict[str, Path]:
    """Names and files of the configurations that ship with the package."""
    folder = Path(str(files("latentmem"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def packaged_grids() -> dict[str, Path]:
    """Names and files of the grids of runs that ship with the package."""
    folder = Path(str(files("latentmem"))) / "configs" / "grids"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(source: str, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, or the packaged configuration of that name, and apply `key=value` overrides.

    Raises:
        ConfigError: no such file or name, not YAML, a grid of many runs, an unknown key, a wrong type or value.
    """
    values = read_values(source, overrides)
    if "grid" in values:
        raise ConfigError(f"{source}: is a grid of many runs; start it with `latentmem evaluate`")
    return parse_config(values, source)


def read_values(source: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """What stands in a YAML file, or under a packaged name, with the overrides applied; not checked any further.

    Raises:
        ConfigError: no such file or name, or not a mapping in YAML.
    """
    packaged = packaged_configs() | packaged_grids()
    path = packaged.get(source) or Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = suggest(source, packaged)
        raise ConfigError(f"{source}: no such file, and no packaged configuration of that name; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from None
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        problem = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
        raise ConfigError(f"{source}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of keys to values, found {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    return values


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Check a mapping against the schema.

    Raises:
        ConfigError: one line naming the first wrong key, what was found and what was expected.
    """
    return parse_section(Config, values, source)


def parse_section(schema: type[AnySection], values: dict[str, Any], source: str) -> AnySection:
    """`parse_config` for another schema.

    Raises:
        ConfigError: as there.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, values, schema)}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, defaults written out; `load_config` reads it back to an equal one."""
    return yaml.dump(config.model_dump(mode="json", by_alias=True), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-4 is a number, which YAML 1.1 reads as text; a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; its keys differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override!r} is no override; write key=value, as in lmpo.group_size=8")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    section: Any = values
    for part in parents:
        if isinstance(section, list):
            section = section[_position(part, section, override)]
        else:
            if section.get(part) is None:  # absent, or written without a value
                section[part] = {}
            section = section[part]
        if not isinstance(section, dict | list):
            raise ConfigError(f"{override!r}: {part} is a value, not a section")
    section[_position(last, section, override) if isinstance(section, list) else last] = value


def _position(part: str, entries: list[Any], override: str) -> int:
    if not part.isdecimal() or int(part) >= len(entries):
        raise ConfigError(
            f"{override!r}: the list there has {len(entries)} entries; give a position from 0, below that"
        )
    return int(part)


def _explain(error: ValidationError, values: dict[str, Any], schema: type[Section]) -> str:
    # A misspelt key that is required is both missing and unknown; the second tells what to do.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # The discriminator of a union stands in the location although no user wrote it.
    location = [str(part) for part in first["loc"] if part not in _KINDS]
    key = ".".join(location)
    found = first.get("input")
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {suggest(location[-1], _known_keys(location[:-1], values, schema))}"
    if first["type"] == "invalid_key":
        return f"key {key!r} is no text; quote it, or remove it"
    if first["type"] == "missing":
        return f"{key}: missing; it has no default"
    if first["type"] == "value_error":
        return f"{key} {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kind = found.get("kind") if isinstance(found, dict) else found
        return f"{key}.kind is {kind!r}; {suggest(str(kind), _KINDS)}"
    if first["type"] == "literal_error":
        return f"{key} is {found!r}; expected {first['ctx']['expected']}"
    if first["type"] in ("model_type", "model_attributes_type") and found is None:
        return f"{key} is empty; give it keys and values, or remove the line"
    expected = _EXPECTED.get(first["type"]) or f"{first['msg'][0].lower()}{first['msg'][1:]}"
    return f"{key} is {found!r} ({type(found).__name__}); {expected}"


_KINDS: dict[str, type[Section]] = {
    "reasoning_gym": ReasoningSection,
    "qa": QASection,
    "code": CodeSection,
    "pddl": PDDLSection,
    "hidden_facts": HiddenFactsSection,
    "mix": MixSection,
}
"""The sections that `data` may be, by their kind."""

_EXPECTED = {
    "model_type": "expected a section of keys and values",
    "model_attributes_type": "expected a section of keys and values",
    "tuple_type": "expected a list",
    "too_short": "expected at least one entry",
    "string_too_short": "expected some text",
}
"""Our words where pydantic speaks of Python's types."""


def _known_keys(location: list[str], values: Any, schema: type[Section]) -> list[str]:
    """Keys of the section that a location names, found by walking the schema along with the values."""
    section: Any = schema
    for part in location:
        values = values[int(part)] if part.isdigit() else values.get(part, {})
        if part.isdigit():
            continue
        if part == "data":
            section = _KINDS[values["kind"]]
            continue
        annotation = section.model_fields[part].annotation
        arguments = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
        section = arguments[0] if arguments else annotation
    return [field.alias or name for name, field in section.model_fields.items()]
