"""The material of the warm-up: words of the tokenizer, prompts of many kinds, and made-up episodes that tell facts.

No data set is read. Names, attributes and values are random words, so the only thing to learn is to carry a word from
an episode to an agent. There are many prompts, so that this is not learned for one prompt alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from latentmem.models.language_model import LanguageModel
from latentmem.teams.turn import Team
from latentmem.trajectory import Role, Step, Task, Trajectory

MIN_WORDS = 160
"""The fewest words to train with; fewer would teach a list of words, not reading."""

SYSTEMS = (
    "You answer with one word.",
    "You are a helpful assistant who keeps answers short.",
    "Say the word you were told, like this: maple",
    "You reply briefly. Example: The name of the dog is Rex.",
    "You are a member of a team. Give your part of the answer and nothing else.",
    "Answer from memory.",
    "You work at an information desk. Visitors want plain answers.",
    "Give the final answer only.",
)
USERS = (
    "{question}",
    "{question} Answer in a word.",
    "A visitor asks: {question}",
    "Question: {question}\nAnswer:",
    "{question}\n\nYour final answer:",
    "We are at {name}. {question}",
)
QUESTIONS = (
    "What is the {attribute} of {name}?",
    "Tell me the {attribute} of {name}.",
    "Which word is the {attribute} of {name}?",
    "{name} has a {attribute}. Which one?",
    "What do you know of the {attribute} of {name}?",
)
TOLD = (
    "The {attribute} of {name} is {value}.",
    "At {name} the {attribute} is {value}.",
    "{name} has {value} as its {attribute}.",
    "Its {attribute} is {value}.",
    "For {attribute}, {name} takes {value}.",
)
REPLIES = ("No. {told}", "Wrong. {told}", "Yes. {told}", "{told}")
SPEAKER = Role(name="speaker", profile="Answers what is asked.")


@dataclass(frozen=True)
class Words:
    """Words that an agent can say as one token, divided in two: those held out are never used in training."""

    learned: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Lesson:
    """One example of the warm-up: an episode tells a fact, a question asks for it, and the agent should say it."""

    task: Task
    role: Role
    episode: Trajectory
    system: str
    user: str
    values: tuple[str, ...]
    """The words to be said, one for each slot in use."""

    @property
    def response(self) -> str:
        """The words in the form in which the agent should say them."""
        return " ".join(self.values)


def words_of(model: LanguageModel, seed: int, held_out_share: float = 0.1) -> Words:
    """Find lower-case words of 4 to 12 letters that are one token, both after a blank and without one."""
    texts = model.tokenizer.batch_decode([[token] for token in range(len(model.tokenizer))])
    plain = [text for text in texts if re.fullmatch(r"[a-z]{4,12}", text)]
    alone, behind = (
        model.tokenizer([before + text for text in plain], add_special_tokens=False)["input_ids"]
        for before in ("", " ")
    )
    found = [text for text, a, b in zip(plain, alone, behind, strict=True) if len(a) == len(b) == 1]
    Random(seed).shuffle(found)  # noqa: S311 - an order, not a secret
    aside = int(len(found) * held_out_share)
    return Words(tuple(found[aside:]), tuple(found[:aside]))


def draw_lesson(
    random: Random, words: Sequence[str], values: Sequence[str], max_values: int, teams: Sequence[Team]
) -> Lesson:
    """Draw one example.

    Args:
        random: source of all draws.
        words: words for names and attributes.
        values: words that can be told and asked for.
        max_values: the most facts asked for at once; their number is drawn from 1 to this.
        teams: teams whose agents are prompted in half of the examples; the other half has prompts from `SYSTEMS` and
            `USERS`. A program's prompts are not known beforehand.
    """
    name = f"the {random.choice(words).title()} {random.choice(words).title()}"
    num_asked = random.randint(1, max_values)
    attributes = random.sample(words, num_asked + random.randrange(3))
    facts = {attribute: random.choice(values) for attribute in attributes}
    asked = random.sample(attributes, num_asked)
    question = _sentence(random.choice(QUESTIONS), attribute=" and the ".join(asked), name=name)
    told = " ".join(_sentence(random.choice(TOLD), attribute=a, name=name, value=v) for a, v in facts.items())
    episode = Trajectory(
        task=Task(
            id=None,
            domain="warmup",
            text=_sentence(random.choice(QUESTIONS), attribute=random.choice(attributes), name=name),
        ),
        team="warmup",
        model="warmup",
        steps=(
            Step(messages=(), action=random.choice(values), observation=random.choice(REPLIES).replace("{told}", told)),
        ),
        reward=0.0,
        success=False,
        seed=0,
    )
    role, system, user = _prompt(random, question, name, teams)
    task = Task(id=None, domain="warmup", text=question)
    return Lesson(task, role, episode, system, user, tuple(facts[attribute] for attribute in asked))


def _sentence(form: str, **fields: str) -> str:
    text = form.format(**fields)
    return text[0].upper() + text[1:]


def _prompt(random: Random, question: str, name: str, teams: Sequence[Team]) -> tuple[Role, str, str]:
    """Return the role that is asked, and its system and user prompts."""
    if teams and random.random() < 0.5:
        call = random.choice(next(random.choice(teams).turn(question, "", [])))
        return call.role, call.system, call.user
    return SPEAKER, random.choice(SYSTEMS), random.choice(USERS).format(question=question, name=name)
