"""What is remembered and how it is told: the bank, the words about the past, and the rivals' prompts."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from latentmem.config.section import AsTuple, BankText, NonNegativeFloat, PathText, PositiveInt, Section
from latentmem.errors import ConfigError
from latentmem.templates import check_template


class BankSection(Section):
    """The experience bank and what is retrieved from it."""

    path: BankText | None = None
    """An existing bank to read and fill: a SQLite file, or `postgresql://USER@HOST/DATABASE?bank=NAME` for a bank that
    several hosts share. null keeps one in the run's folder. A password is better in `PGPASSWORD` or `~/.pgpass`; one in
    the URL is left out of what the run writes down."""
    embedder: PathText = "all-minilm-l6-v2"
    """`all-minilm-l6-v2` (embedded), any sentence-transformers id or folder, or `hashing`: a stand-in for tests that
    needs no model and calls two texts near if they share words."""
    index: Literal["exact", "approximate"] = "exact"
    """`approximate` is for a million trajectories and more: it is faster, may miss some of the nearest, and needs
    `latentmem[ann]`."""
    num_retrieved: PositiveInt = 3
    """Number of trajectories recalled for a task."""
    only_successes: bool = True
    """Whether only successful trajectories are recalled. Set it to false if episodes end in feedback, because a failed
    episode may hold the correction. A warning tells when most of a bank is left out."""
    tenants: Annotated[tuple[str, ...] | None, AsTuple] = ("",)
    """Whose trajectories are recalled. A server that knows tenants stores each one's episodes under the tenant's name,
    and what is shared under no name: `[""]` is this common pool, and all that `collect` stores. null recalls
    everybody's."""
    experience_tasks: Annotated[int, Field(ge=0)] = 0
    """For data without an experience split: how many train tasks, from the start of the split, are played into the
    bank, and neither trained on nor asked about. 0: the train split itself is collected, as in the paper."""
    rating: Literal["none", "logits"] = "none"
    """`none` recalls the nearest trajectories. `logits` finds twice as many, lets the agents' model rate from 1 to 10
    how helpful each is, and recalls the best; a rating is the expected value of the model's answer."""
    rating_template: str | None = None
    """The question with which the model is asked for a rating; fields {task} and {episode}, best in this order. null:
    the built-in question."""
    rating_system: str | None = None
    """The system prompt before that question. null: the built-in one."""
    rating_max_tokens: PositiveInt = 1024
    """Longest rating prompt, in tokens; a longer episode is shortened to fit, and counted."""


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
                raise ValueError(f"lacks the field {{{field}}}, which this prompt needs; add it")
        return value.rstrip("\n")  # editors and YAML's blocks add it


class MemorySection(Worded):
    """The words in which past episodes are told, in text memory and in the text that the composer reads. An episode is
    told line by line; a line that is set to nothing is left out.
    """

    text: str = (
        "Here is how the team handled similar tasks before:\n\n{memory}\n\nThat was the past. Now the task at hand:"
    )
    """The text that a text memory puts before an agent's prompt; fields {memory}."""
    task: str = "Task: {task}"
    """First line of an episode; fields {task}."""
    step: str = "Answer: {action}"
    """What the team did in a turn; fields {action}."""
    reply: str = "Feedback: {observation}"
    """The environment's reply, if there was one; fields {observation}."""
    solved: str = "Outcome: solved"
    """Last line of an episode with reward 1."""
    unsolved: str = "Outcome: not solved"
    """Last line of any other episode."""
    entry: str = "[{number}] {text}"
    """One of several episodes, or of several things that a role said, in the composer's text; fields {number}
    {text}."""
    member: str = "{role}: {profile}"
    """The role in the composer's text; fields {role} {profile}."""
    nothing: str = "(none so far)"
    """Appears in the composer's text if nothing was retrieved."""
    silent: str = "(said nothing)"
    """Appears in the composer's text for a role that had no part in an episode."""

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
    """Prompt, used once for each success; the reply is the key by which the success is found. Fields {episode}."""

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {"summary": ("episode",)}
    NEEDED: ClassVar[tuple[str, ...]] = ("summary",)


class GenerativeSection(Worded):
    """Generative agents (arXiv 2304.03442): the best of recency, importance and relevance. Relevance is asked for with
    `bank.rating_template`, whatever `bank.rating` is.
    """

    recency_weight: NonNegativeFloat = 1.0
    """Weight of recency: how lately a success was stored."""
    importance_weight: NonNegativeFloat = 1.0
    """Weight of importance: how the model rated the success by itself, when the memory learned from it."""
    relevance_weight: NonNegativeFloat = 1.0
    """Weight of relevance: how the model rates the success for the task at hand. With the other two weights at 0 this
    is the form in which memories of teams are usually compared."""
    recency_decay: Annotated[float, Field(gt=0, le=1)] = 0.995
    """Factor on recency for each success that was stored later."""
    importance_system: str = (
        "You rate how instructive a record is. You reply with a number from 1 to 10 and nothing else."
    )
    """System prompt of `importance`."""
    importance: str = (
        "{episode}\n\nRate from 1 (everyday, nothing to learn from it) to 10 (rare and instructive) how much a team "
        "that solves tasks of many kinds gains from remembering this record.\n\n"
        "Importance, as one whole number from 1 to 10:"
    )
    """Prompt, used once for each success. Fields {episode}."""

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {"importance": ("episode",)}
    NEEDED: ClassVar[tuple[str, ...]] = ("importance",)


class InsightsSection(Worded):
    """Lists of insights, as OAgents (arXiv 2506.15741) and G-Memory keep them, with ExpeL's operations (2308.10144)."""

    max_insights: PositiveInt = 20
    """Largest number of insights; beyond that the ones with the lowest score are dropped, the older ones first."""
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
    """Prompt, used once for each round. Fields {insights} {episodes} {max_insights}."""
    told: str = "What the team has learned so far:\n{insights}"
    """The text that tells insights before an agent's prompt. Fields {insights}."""

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
    """Number of nodes of the graph from which a recall starts."""
    hops: Annotated[int, Field(ge=0)] = 1
    """How many edges a recall follows from there."""
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.7
    """Smallest cosine at which two tasks are joined by an edge."""
    max_links: PositiveInt = 5
    """Largest number of edges from a new node to older ones; it is joined to the most similar ones."""
    max_candidates: PositiveInt = 10
    """Largest number of successes rated for a task, those fewest hops away first; `bank.num_retrieved` of them are
    told."""
    num_insights: PositiveInt = 3
    """Number of insights for a task: the best ones that a reached node supports."""
    opening: str = "[{number}] {role}: {response}"
    """A message whose agent read no other message, in the text that is condensed. Fields {number} {role} {response}."""
    reading: str = "[{number}] {role}, having read {reads}: {response}"
    """Any other message in that text. Fields {number} {role} {reads} {response}."""
    condense_system: str = "You cut records of a team's work down to what mattered."
    """System prompt of `condense`."""
    condense: str = (
        "{episode}\n\nIn at most four short lines: which messages decided how this ended, and what did they say or get "
        "wrong?"
    )
    """Prompt, used once for each episode. Fields {episode}."""
    project_system: str = "You brief one member of a team before a task."
    """System prompt of `project`."""
    project: str = (
        "The task:\n{task}\n\nThe member:\n{role}\n\nWhat the team has learned so far:\n{insights}\n\n"
        "In at most three short lines, what of this should the member keep in mind in that part?"
    )
    """Prompt, used for each role of each task that has insights. Fields {task} {role} {insights}."""

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "opening": ("number", "role", "response"),
        "reading": ("number", "role", "reads", "response"),
        "condense": ("episode",),
        "project": ("task", "role", "insights"),
    }
    NEEDED: ClassVar[tuple[str, ...]] = ("condense", "project")


class RivalsSection(Section):
    """The rival memories: latent memory is compared with them, and they learn with a language model's help. They ask
    the agents' own model, greedily, and tell `bank.num_retrieved` successes in the words of `memory`.
    """

    batch_size: PositiveInt = 16
    """Number of trajectories that a memory learns from between two saves."""
    max_response_tokens: PositiveInt = 256
    """Longest reply, in tokens."""
    max_episode_characters: PositiveInt = 4000
    """Longest text of one episode in a prompt; the middle of a longer one is left out, and the episode is counted."""
    voyager: VoyagerSection = VoyagerSection()
    """Settings of the memory `voyager`."""
    generative: GenerativeSection = GenerativeSection()
    """Settings of the memory `generative`."""
    insights: InsightsSection = InsightsSection()
    """Settings of the memories `oagents` and `gmemory`."""
    gmemory: GMemorySection = GMemorySection()
    """Settings of the memory `gmemory`."""
