"""Tasks that reasoning-gym generates and scores: the reward is the family's own score of the one extracted answer.

A task's data hold its origin (family, parameters, seed, index), and the entry that the scorer needs is generated again
from it, because entries hold tuples, functions and arrays that JSON cannot restore. The scores are changed in three
ways, which `ReasoningEnvironment` explains: containing the right answer earns nothing, an answer that the scorer would
execute is checked first, and two scorers that accept wrong answers are replaced. Loads reasoning-gym when first used.
"""

import ast
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from random import Random
from typing import Any

from pydantic import JsonValue

from latentmem.config import Family, ReasoningSection, default
from latentmem.environments.answers import begun, boxed, last_line, stated, stated_number, tagged, without_thoughts
from latentmem.environments.environment import Outcome, Split
from latentmem.errors import ConfigError, DataError, suggest
from latentmem.trajectory import Task

logger = logging.getLogger(__name__)

Entry = dict[str, Any]

CHUNK = 500
"""Tasks drawn from one seed; families with a finite supply, such as word_ladder, do not promise more."""
MAX_REPEATS = 200
"""Number of draws in a row without a new task after which a family counts as exhausted."""

NUMERIC = frozenset(
    {"aiw", "basic_arithmetic", "binary_alternation", "chain_sum", "circuit_logic", "coin_flip"}
    | {"count_bits", "count_primes", "decimal_arithmetic", "decimal_chain_sum", "gcd", "gsm_symbolic"}
    | {"largest_island", "lcm", "leg_counting", "letter_counting", "maze", "number_format"}
    | {"number_sequence", "power_function", "products", "rectangle_count", "rotten_oranges"}
    | {"self_reference", "simple_equations", "simple_geometry"}
)
"""Families whose answers are all single numbers."""

LITERALS_EXECUTED = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Families whose scorer passes a wrong answer to `eval`, in order to accept Python lists."""
FORMULAS_EXECUTED = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Families whose scorer passes the answer to sympy's `parse_expr`, which is `eval` with access to the builtins."""
ACCEPT_WRONG_ANSWERS = frozenset({"coin_flip", "game_of_life_halting"})
"""Families whose scorer gives 1 to wrong answers: to any prefix of the number ("0"), or to any text at all."""

_FORMULA_NODES = (
    ast.Expression | ast.BinOp | ast.UnaryOp | ast.Name | ast.Load | ast.Call | ast.Constant
    | ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow | ast.USub | ast.UAdd
)  # fmt: skip
_FORMULA_FUNCTIONS = frozenset(
    {"Abs", "acos", "asin", "atan", "cos", "cosh", "cot", "csc", "exp", "ln", "log"}
    | {"sec", "sin", "sinh", "sqrt", "tan", "tanh"}
)
_MAX_FORMULA_CHARACTERS = 500
_MAX_EXPONENT = 64
_HUGE_EXPONENT = re.compile(r"\d[eE][-+]?\d{4,}")
HASH_DEPENDENT = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Families whose tasks depend on the process's hash seed as well as on their own seed."""

INSTRUCTIONS = (
    "Solve the problem. You may reason briefly; then give only the final answer, in the format the problem asks for, "
    "between <answer> and </answer>."
)


@dataclass(frozen=True)
class ReasoningEnvironment:
    """One episode of one step. Reward: the family's `score_answer` of the extracted answer, clamped to [0, 1].

    The score is the family's own, except in these cases, which give 0:

    - Nothing could be extracted (`info["extracted"]` is None).
    - The score is partial and the answer contains the right one. Many families pay len(right) / len(answer) for that,
      so "1 2 3 4 5 6 7 8 9" would earn something on every one-digit task, and "110" two thirds where 10 is right.
    - The scorer would execute the answer (see `harmless`) and the answer is more than data: `info["refused"]` is true.
    - The scorer raised: `info["scorer_error"]` names the exception.
    - The family is in `ACCEPT_WRONG_ANSWERS` and the answer differs from the right one by more than letter case.

    Some families pay 0.01 to 0.25 for any answer in the right form. That is left as it is; `success` means reward 1.
    """

    family: str
    entry: Entry
    dataset: Any
    """The reasoning-gym data set whose `score_answer` is used."""
    instructions: str = INSTRUCTIONS
    """How an answer has to look."""

    def step(self, action: str) -> Outcome:
        """Score the team's answer and end the episode."""
        answer = extract(action, numeric=self.family in NUMERIC)
        info: dict[str, JsonValue] = {"extracted": answer}
        reward = 0.0
        if answer:
            if harmless(answer, self.family):
                reward = self._score(answer, info)
            else:
                info["refused"] = True
        return Outcome(observation="", reward=reward, done=True, info=info)

    def _score(self, answer: str, info: dict[str, JsonValue]) -> float:
        right = self.entry["answer"]
        if self.family in ACCEPT_WRONG_ANSWERS:
            return float(answer.casefold() == right.casefold())
        try:
            score = float(self.dataset.score_answer(answer, self.entry))
        except Exception as error:  # the boundary to 106 scorers; several raise on an answer of unexpected form
            info["scorer_error"] = type(error).__name__
            return 0.0
        if not math.isfinite(score) or (score < 1 and isinstance(right, str) and right in answer):
            return 0.0
        return min(max(score, 0.0), 1.0)


def extract(response: str, *, numeric: bool) -> str | None:
    r"""Return the one answer in a response, or None. The first of these that exists counts:

    the last `<answer>...</answer>`; one that never closes; the last `\boxed{...}`; the last `answer is ...` or
    `Answer: ...`; then for a
    numeric family the last number of the response, for another its last line. Of a numeric family's mark only the
    last number in it counts; a mark without a number is passed over, but for the tags, which bind.

    >>> extract("The answer to this arithmetic problem is 10.", numeric=True)
    '10'
    >>> extract("I think <answer>12 + 7 = 19</answer>", numeric=True)
    '19'
    """
    response = without_thoughts(response)
    if numeric:
        return stated_number(response)
    tag = tagged(response)
    if tag is not None:
        return tag or None
    marked = [begun(response), boxed(response), *stated(response), last_line(response)]
    return next((text for text in marked if text), None)


def harmless(answer: str, family: str) -> bool:
    """Return whether the family's scorer may see this answer without running code or taking forever.

    For scorers that call `eval`, an answer may be text that is no Python expression, one word, or a literal. For
    scorers that call sympy's `parse_expr`, it may only be arithmetic on numbers, names and elementary functions, with
    exponents up to 64. An unevaluated `Integral(...)` is refused on purpose: it would repeat the question as an answer.
    """
    if _HUGE_EXPONENT.search(answer):
        return False  # Fraction("1e999999999") fills the memory
    if family not in LITERALS_EXECUTED | FORMULAS_EXECUTED:
        return True
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return family in LITERALS_EXECUTED  # eval cannot parse it either, but parse_expr reads more than Python
    if family in LITERALS_EXECUTED:
        if isinstance(tree.body, ast.Name):
            return True  # a word, such as ABBA
        try:
            ast.literal_eval(tree)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return False
        return True
    return len(answer) <= _MAX_FORMULA_CHARACTERS and all(_plain(node) for node in ast.walk(tree))


def _plain(node: ast.AST) -> bool:
    if not isinstance(node, _FORMULA_NODES):
        return False
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FORMULA_FUNCTIONS and not node.keywords
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        tower = any(isinstance(inner, ast.Pow) for inner in ast.walk(node.left))
        return not tower and _small_exponent(node.right)
    return True


def _small_exponent(node: ast.expr) -> bool:
    """Return whether an exponent is a name, a number up to 64, or a fraction of numbers, with or without sign.

    Other exponents, such as in 9**(64*64*64*64), are as deadly as a tower of powers.
    """
    if isinstance(node, ast.UnaryOp):
        return _small_exponent(node.operand)
    if isinstance(node, ast.BinOp):
        constants = isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant)
        return isinstance(node.op, ast.Div) and constants and _small_exponent(node.left)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and node.value <= _MAX_EXPONENT
    return isinstance(node, ast.Name)


class ReasoningDomain:
    """A weighted mix of reasoning-gym families; equal arguments give equal tasks.

    families: one family's name, or several families with name, weight (relative share of each split) and parameters.
    train_size, test_size: number of tasks; all differ in text, within and across the splits.
    seed: seed of the tasks.
    instructions: how the team is told to answer; None means the built-in instructions.
    params: parameters of the family, if only one is named.

    Raises:
        ConfigError: a family or parameter is unknown, the family rejects a value, or a family is listed twice with
            equal parameters.
    """

    name = "reasoning_gym"

    def __init__(
        self,
        families: str | Sequence[Family],
        *,
        train_size: int = default(ReasoningSection, "train_size"),
        test_size: int = default(ReasoningSection, "test_size"),
        seed: int = default(ReasoningSection, "seed"),
        instructions: str | None = None,
        **params: Any,
    ) -> None:
        if isinstance(families, str):
            families = [Family(name=families, params=params)]
        elif params:
            raise ConfigError(
                f"{', '.join(params)}: parameters go with a family given by its name; "
                "with Family objects, write them into each"
            )
        self._instructions = instructions or INSTRUCTIONS
        self._families = tuple(families)
        self._sizes: dict[Split, int] = {"train": train_size, "test": test_size}
        self._seed = seed
        self._datasets: dict[str, Any] = {}
        self._entries: dict[str, Entry] = {}
        origins = [(family.name, _canonical(family.params)) for family in self._families]
        for i, (name, own) in enumerate(origins):
            if (name, own) in origins[:i]:
                raise ConfigError(
                    f"data.families: {name} is listed twice with equal params; list it once, add the weights"
                )
            self._dataset(name, self._families[i].params, 0)

    def tasks(self, split: Split) -> list[Task]:
        """Return the tasks of a split; train tasks are drawn until enough of them differ from all test tasks.

        Raises:
            ConfigError: a family fails to generate a task under its parameters.
            DataError: a family has too few different tasks.
        """
        return list(self._tasks.get(split, ()))

    @cached_property
    def _tasks(self) -> dict[Split, list[Task]]:
        seen: set[str] = set()
        return {split: self._draw(split, seen) for split in ("test", "train")}

    def skipped(self, split: Split) -> dict[str, int]:
        """Return no counts: the tasks are generated, so no row is skipped."""
        return {}

    def start(self, task: Task) -> ReasoningEnvironment:
        """Make a fresh environment for one episode.

        Raises:
            DataError: the task is not of this domain, or the installed reasoning-gym generates another task.
        """
        origin = task.data
        family, params, seed, index = (origin.get(key) for key in ("family", "params", "seed", "index"))
        if not (isinstance(family, str) and isinstance(params, dict) and type(seed) is int and type(index) is int):
            raise DataError(f"task {task.key}: its data name no reasoning-gym family, params, seed and index")
        if task.id is None or task.id not in self._entries:
            entry = self._generate(family, params, seed, index)
        else:
            entry = self._entries[task.id]
        if entry["question"] != task.text:
            raise DataError(
                f"task {task.key}: the installed reasoning-gym generates another text for it; "
                "install the version that the task was made with, or draw the tasks anew"
            )
        source = entry["metadata"]["source_dataset"] if family == "composite" else family
        dataset = self._dataset(family, params, seed)
        return ReasoningEnvironment(family=source, entry=entry, dataset=dataset, instructions=self._instructions)

    def _draw(self, split: Split, seen: set[str]) -> list[Task]:
        tasks: list[Task] = []
        for family, quota in zip(self._families, self._quotas(self._sizes[split]), strict=True):
            tasks += self._draw_family(family, split, quota, seen)
        Random(f"{self._seed} {split}").shuffle(tasks)  # noqa: S311  # an order, not a secret
        return tasks

    def _draw_family(self, family: Family, split: Split, quota: int, seen: set[str]) -> list[Task]:
        tasks: list[Task] = []
        num_draws = num_repeats = 0
        while len(tasks) < quota:
            chunk, index = divmod(num_draws, CHUNK)
            seed = self._stream(family, split, chunk)
            entry = self._generate(family.name, family.params, seed, index)
            num_draws += 1
            text = entry["question"]
            if text in seen:
                num_repeats += 1
                if num_repeats == MAX_REPEATS:
                    raise DataError(
                        f"data.families: {family.name} gave {len(tasks)} different {split} tasks and then "
                        f"{MAX_REPEATS} repeats, but {quota} are asked for; lower train_size or test_size, "
                        "or widen its params"
                    )
                continue
            num_repeats = 0
            seen.add(text)
            origin: dict[str, JsonValue] = {
                "family": family.name, "params": family.params, "seed": seed, "index": index
            }  # fmt: skip
            task = Task(id=f"{family.name}-{seed}-{index}", domain=self.name, text=text, data=origin)
            assert task.id is not None
            self._entries[task.id] = entry
            tasks.append(task)
        if num_draws > quota:
            logger.warning(
                "%s: %d of %d draws for %s repeated a task and were left out",
                family.name, num_draws - quota, num_draws, split,
            )  # fmt: skip
        return tasks

    def _quotas(self, size: int) -> list[int]:
        total = sum(family.weight for family in self._families)
        shares = [size * family.weight / total for family in self._families]
        quotas = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i])
        for i in by_remainder[: size - sum(quotas)]:
            quotas[i] += 1
        return quotas

    def _stream(self, family: Family, split: Split, chunk: int) -> int:
        # reasoning-gym seeds task i with seed + i, so neighbouring seeds would share all tasks but one.
        origin = f"{self._seed} {split} {chunk} {family.name} {_canonical(family.params)}"
        return int.from_bytes(hashlib.sha256(origin.encode()).digest()[:4]) >> 1

    def _generate(self, family: str, params: dict[str, JsonValue], seed: int, index: int) -> Entry:
        dataset = self._dataset(family, params, seed)
        try:
            entry: Entry = dataset[index]
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"data.families: {family} cannot generate a task under params {_canonical(params)} "
                f"({type(error).__name__}: {' '.join(str(error).split())}); change them"
            ) from None
        return entry

    def _dataset(self, family: str, params: dict[str, JsonValue], seed: int) -> Any:
        key = f"{family} {seed} {_canonical(params)}"
        if key not in self._datasets:
            self._datasets[key] = _create(family, params, seed)
        return self._datasets[key]


def _create(family: str, params: dict[str, JsonValue], seed: int) -> Any:
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise ConfigError(f"data.families: {family!r} is not a reasoning-gym family; {suggest(family, DATASETS)}")
    if family in HASH_DEPENDENT and not os.environ.get("PYTHONHASHSEED", "").isdigit():
        raise ConfigError(
            f"data.families: {family} draws different tasks in each process, because reasoning-gym iterates over sets "
            "of strings; set the environment variable PYTHONHASHSEED=0, or leave it out"
        )
    dataset_class, config_class = DATASETS[family]
    known = {f.name for f in fields(config_class)} - {"seed", "size"}
    for name in params:
        if name in ("seed", "size"):
            raise ConfigError(
                f"data.families: {family}.params.{name} cannot be set here; use data.seed, train_size and test_size"
            )
        if name not in known:
            raise ConfigError(f"data.families: {family} has no parameter {name!r}; {suggest(name, known)}")
    arguments: dict[str, Any] = dict(params)
    try:
        if family == "composite":
            arguments["datasets"] = [DatasetSpec(**spec) for spec in arguments.get("datasets", [])]
        return dataset_class(config=config_class(**arguments, seed=seed, size=CHUNK))
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"data.families: {family} rejects params {_canonical(params)} ({' '.join(str(error).split())}); change them"
        ) from None


def _canonical(params: dict[str, JsonValue]) -> str:
    return json.dumps(params, sort_keys=True, ensure_ascii=False)
