"""Ratings of how useful past episodes are for a task: a language model's expected answer from 1 to 10, from its logits.

Nothing is sampled or parsed, so no episode is lost because of how an answer is phrased. The rating is the expected
value over the ten answers, given that the reply begins with one of them (the idea is G-Eval's, arXiv 2303.16634). A
reply counts as the longest of the ten numerals that it begins with: a 1 followed by a 0 is 10; followed by anything
else, it is 1. If a tokenizer spells 10 in two tokens, P(10) is P("1") P("0" | "1"), P(1) is the rest of P("1"), and one
more column is read for that; if 10 is a single token, none is. A numeral after a blank is another spelling; both count.
"""

import logging
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from latentmem.config import BankSection, MemorySection
from latentmem.errors import ConfigError, ModelError
from latentmem.memory.memory import Spent, describe
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefix import check_window
from latentmem.templates import check_template, fill
from latentmem.trajectory import Task, Trajectory

logger = logging.getLogger(__name__)

SYSTEM = "You rate how helpful a record is. You reply with a number from 1 to 10 and nothing else."
# The episode comes last, so that the prompts of one task share a long beginning, which is read once.
TEMPLATE = """A team has to solve this task:
{task}

Rate from 1 (of no help) to 10 (shows just what to do) how helpful the following record of another task is for it.

{episode}

Helpfulness, as one whole number from 1 to 10:"""
FIELDS = ("task", "episode")

ANSWERS = range(1, 11)
_DECIMALS = 3
"""Decimals of a rating. Batched arithmetic is off in the sixth; after rounding, equal texts tie in any batch."""


def check_rating_template(template: str, needed: Collection[str] = FIELDS) -> None:
    """Refuse a template that lacks a needed field or has an unknown one.

    Raises:
        ConfigError: the template is refused; the message names the field.
    """
    check_template(template, FIELDS, "bank.rating_template")
    for field in needed:
        if f"{{{field}}}" not in template:
            raise ConfigError(f"bank.rating_template: the field {{{field}}} is missing, and ratings need it; add it")


class Rater:
    """A frozen model that rates pairs of a task and a past episode; each pair is rated once."""

    def __init__(
        self,
        model: LanguageModel,
        template: str | None = None,
        max_prompt_tokens: int = BankSection().rating_max_tokens,
        batch_positions: int = 4096,
        system: str | None = None,
        words: MemorySection = MemorySection(),  # noqa: B008 - it is frozen
        needed: Collection[str] = FIELDS,
    ) -> None:
        """Take the model that rates. It rates as an agent, with any composer's adapter switched off.

        Args:
            model: the agents' language model.
            template: the question, with the fields of `FIELDS`; None is `TEMPLATE`.
            max_prompt_tokens: longest prompt; the episode is shortened to fit.
            batch_positions: positions read at once; this affects memory use, not the result.
            system: the system prompt; None is `SYSTEM`.
            words: how an episode is told.
            needed: fields that the template must have; a rating of an episode by itself needs no task.

        Raises:
            ConfigError: a template field is unknown or missing.
            ModelError: the model's tokenizer does not tell the ten answers apart.
        """
        self.model = model
        self.template = TEMPLATE if template is None else template
        self.system = SYSTEM if system is None else system
        self.words = words
        check_rating_template(self.template, needed)
        self.max_prompt_tokens = max_prompt_tokens
        self.batch_positions = batch_positions
        self.spent = Spent()
        """The cost of rating so far."""
        self._spellings = _spellings(model)
        self._known: dict[tuple[str, str], float] = {}  # by the task's text and the trajectory's id

    def __call__(self, pairs: Sequence[tuple[Task, Trajectory]]) -> list[float]:
        """Rate each pair from 1 to 10, in thousandths; pairs rated before are not read again.

        Raises:
            ConfigError: a task is too long for `max_prompt_tokens`, even with nothing of the episode.
            ModelError: a prompt does not fit the context window, or the model's values are not finite.
        """
        keys = [(task.text, trajectory.id) for task, trajectory in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._known}
        probabilities = self.probabilities(list(new.values()))
        expected = probabilities @ torch.tensor(ANSWERS, dtype=torch.float64) / probabilities.sum(1)
        self._known |= {key: round(rating, _DECIMALS) for key, rating in zip(new, expected.tolist(), strict=True)}
        return [self._known[key] for key in keys]

    def probabilities(self, pairs: Sequence[tuple[Task, Trajectory]]) -> Tensor:
        """Return how likely the model is to begin its reply with each of the ten answers.

        Returns:
            [B, 10] float64 on the CPU for B pairs. A row adds up to 1 minus the probability of other replies.

        Raises:
            ConfigError: as for a call of the rater.
            ModelError: as for a call of the rater.
        """
        prompts = [self._prompt(task, trajectory) for task, trajectory in pairs]
        self.spent += Spent(num_asked=len(prompts), prompt_tokens=sum(map(len, prompts)))
        tasks = [task.text for task, _ in pairs]
        found = torch.zeros(len(pairs), len(ANSWERS), dtype=torch.float64)
        for rows in _batches([len(prompt) for prompt in prompts], tasks, self.batch_positions):
            found[rows] = self._read([prompts[row] for row in rows], [tasks[row] for row in rows])
        if not bool((found.sum(1) > 0).all()):  # nan is not above 0 either
            raise ModelError(
                f"model {self.model.name!r} gave values that are not finite for a rating; set model.dtype to float32, "
                "or bank.rating to none"
            )
        return found

    def _prompt(self, task: Task, trajectory: Trajectory) -> list[int]:
        episode = describe(trajectory, self.words)
        ids = self._encode(task, episode)
        if len(ids) <= self.max_prompt_tokens:
            return ids
        self.spent += Spent(num_shortened=1)
        if self.spent.num_shortened == 1:
            logger.warning(
                "episodes are shortened for rating, to prompts of %d tokens (bank.rating_max_tokens); the first had %d",
                self.max_prompt_tokens,
                len(ids),
            )
        tokens = self.model.encode(episode)
        kept = len(tokens)
        while kept and len(ids) > self.max_prompt_tokens:
            kept = max(0, kept - (len(ids) - self.max_prompt_tokens))  # repeated: cut text may be tokenised differently
            ids = self._encode(task, self.model.decode(tokens[:kept]))
        if len(ids) > self.max_prompt_tokens:
            raise ConfigError(
                f"bank.rating_max_tokens is {self.max_prompt_tokens}, but the prompt of task "
                f"{task.key[:80]!r} has {len(ids)} tokens even without the episode; raise it"
            )
        return ids

    def _encode(self, task: Task, episode: str) -> list[int]:
        return self.model.encode_prompt(self.system, fill(self.template, task=task.text.strip(), episode=episode))

    @torch.no_grad()
    def _read(self, prompts: Sequence[list[int]], tasks: Sequence[str]) -> Tensor:
        """Return the probabilities [B, 10] of the answers to B prompts; read the prompts, then any longer spellings."""
        spellings = self._spellings
        begun = {ids[:i] for ids in spellings for i in range(1, len(ids))}
        ways = sorted(ids for ids in begun if not _continued(ids, begun))  # they pass through all shorter ones
        room = max(map(len, ways), default=0)
        what = f"a rating prompt of at most {self.max_prompt_tokens} (bank.rating_max_tokens)"
        check_window(self.model.model, max(map(len, prompts)) + room, what)
        rows = torch.arange(len(prompts), device=self.model.device)
        model = self.model.model
        with self.model.as_agent() as reader:
            prefix = reader.prefill(prompts, tasks, room)
            # By the part of a spelling that stands behind the prompt already: [B, V] each.
            logps: dict[tuple[int, ...], Tensor] = {(): _logps(prefix.logits(model))}
            for ids in ways:
                part = prefix.select(rows)
                for i, token in enumerate(ids, 1):
                    column = torch.full((len(prompts), 1), token, device=rows.device)
                    part.extend(model, model.get_input_embeddings()(column), torch.ones_like(column, dtype=torch.bool))
                    logps[ids[:i]] = _logps(part.logits(model))
        steps = [torch.stack([logps[ids[:i]][:, ids[i]] for i in range(len(ids))]) for ids in spellings]
        moved = torch.stack([step.sum(0) for step in steps]).cpu().double()  # [spellings, B], one copy from the GPU
        likely = dict(zip(spellings, moved.exp(), strict=True))
        found = torch.zeros(len(prompts), len(ANSWERS), dtype=torch.float64)
        for ids, answer in spellings.items():
            longer = [likely[other] for other in _continued(ids, spellings)]
            found[:, answer - 1] += (likely[ids] - sum(longer)).clamp(min=0)
        return found


def _continued(ids: tuple[int, ...], others: Collection[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return those of `others` that begin with `ids` and go on."""
    return [other for other in others if len(other) > len(ids) and other[: len(ids)] == ids]


def _spellings(model: LanguageModel) -> dict[tuple[int, ...], int]:
    """Return the token ids of the ten answers, written with and without a blank before them.

    They are encoded behind a colon, because some tokenizers add a blank of their own at the beginning of a text.
    """
    before = model.encode(":")
    found: dict[tuple[int, ...], int] = {}
    for blank in ("", " "):
        rows = [tuple(model.encode(f":{blank}{answer}")) for answer in ANSWERS]
        if len(set(rows)) == len(rows) and all(row[: len(before)] == tuple(before) for row in rows):
            found |= {row[len(before) :]: answer for row, answer in zip(rows, ANSWERS, strict=True)}
    if not found:
        raise ModelError(
            f"model {model.name!r}: its tokenizer does not tell the numbers from 1 to 10 apart, and cannot rate; "
            "set bank.rating to none, and leave out the memories generative and gmemory"
        )
    return found


def _logps(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def _batches(lengths: Sequence[int], groups: Sequence[str], positions: int) -> list[list[int]]:
    """Put rows into batches of at most `positions`, padding included; keep groups together, next to others as long.

    A divided group would read its common beginning twice, and its neighbours would be padded to its whole prompts. Only
    a group larger than `positions` is divided, and a row longer than that is a batch of its own.
    """
    members: dict[str, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        members.setdefault(groups[row], []).append(row)
    batches: list[list[int]] = []
    for rows in sorted(members.values(), key=lambda rows: (lengths[rows[-1]], groups[rows[0]])):
        longest = lengths[rows[-1]]  # longer than any row so far
        if batches and (len(batches[-1]) + len(rows)) * longest <= positions:
            batches[-1] += rows
            continue
        size = max(1, positions // longest)
        batches += [rows[i : i + size] for i in range(0, len(rows), size)]
    return batches
