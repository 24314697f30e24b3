"""Memory as text: the nearest successes before the prompt, the same for every role."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from test_composer import trajectory

from latentmem.bank import ExperienceBank
from latentmem.config import MemorySection
from latentmem.memory.memory import recall_one
from latentmem.memory.text import TextMemory
from latentmem.trajectory import Role, Task

ROLES = [Role(name="assistant", profile="Solves."), Role(name="critic", profile="Checks.")]


def test_nearest_successes_stand_before_the_prompt_for_every_role(
    tmp_path: Path, fake_embed: Callable[[list[str]], np.ndarray]
) -> None:
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        memory = TextMemory(bank, num_retrieved=1)
        memory.add(trajectory("the sum of 2 and 3", {"assistant": "five"}))
        memory.add(trajectory("the sum of 2 and 9", {"assistant": "twelve"}, success=False))
        memory.add(trajectory("capital of the country", {"assistant": "a city"}))
        tasks = [Task(id=None, domain="sums", text=text) for text in ("the sum of 2 and 4", "the sum of 2 and 3")]
        recalls = memory.recall_many([(task, role) for task in tasks for role in ROLES])
        assert recall_one(memory, tasks[0], ROLES[1]) == recalls[0]
    told = "Task: the sum of 2 and 3\nAnswer: the action\nOutcome: solved"
    expected = MemorySection().text.replace("{memory}", told)
    assert [r.record.text for r in recalls[:2]] == [expected] * 2
    # The very task asked about is never told.
    assert all("capital" in r.record.text and "sum of" not in r.record.text for r in recalls[2:])
    record = recalls[0].record
    assert (record.kind, record.num_latents, recalls[0].latents) == ("text", 0, None)
    assert record.before("Now?") == f"{expected}\n\nNow?"


def test_the_words_around_it_can_be_replaced(tmp_path: Path, fake_embed: Callable[[list[str]], np.ndarray]) -> None:
    words = MemorySection(text="Past:\n{memory}\n--", task="{task}?", solved="ok")
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        bank.add(trajectory("{memory}", {"assistant": "five"}))
        recall = recall_one(TextMemory(bank, words=words), Task(id="1", domain="d", text="t"), ROLES[0])
    assert recall.record.before("Now?") == "Past:\n{memory}?\nAnswer: the action\nok\n--\n\nNow?"


def test_empty_bank_puts_nothing_before_the_prompt(
    tmp_path: Path, fake_embed: Callable[[list[str]], np.ndarray]
) -> None:
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        recall = recall_one(TextMemory(bank), Task(id="1", domain="d", text="t"), ROLES[0])
    assert recall.record.before("Now?") == "Now?"
    assert recall.record.sources == ()
