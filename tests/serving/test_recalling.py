"""The memories while serving: what is kept, what is composed together, what a deletion and a new checkpoint change."""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from latentmem.bank import ExperienceBank
from latentmem.config import Sampling
from latentmem.engines.batching import Batcher
from latentmem.errors import CheckpointError
from latentmem.memory.composer import Composer
from latentmem.memory.latent import LatentMemory
from latentmem.memory.memory import recall_one
from latentmem.models.agent import Prompt
from latentmem.models.language_model import LanguageModel
from latentmem.serving.asks import Refused
from latentmem.serving.following import Following
from latentmem.serving.recalling import Recaller, Searching
from latentmem.trajectory import Message, Origin, Recalled, Role, Step, Task, Trajectory

NAME = "latent:lmpo"
ROLES = [Role(name="assistant", profile="Solves the task."), Role(name="critic", profile="Looks for mistakes.")]
NEW = Task(id=None, domain="sums", text="What is 9 + 9?")
EVERYBODY = ("", "a", "b")


def episode(text: str, tenant: str = "", said: str = "so") -> Trajectory:
    message = Message(
        role="assistant",
        system="You.",
        user=text,
        response=said,
        token_ids=(1,),
        logps=(-0.5,),
        finish="stop",
        temperature=1.0,
        num_prompt_tokens=3,
        recalled=Recalled(kind="none"),
    )
    return Trajectory(
        task=Task(id=None, domain="sums", text=text),
        team="t",
        model="m",
        steps=(Step(messages=(message,), action=said, observation=""),),
        reward=1.0,
        success=True,
        seed=0,
        origin=Origin(tenant=tenant, session=f"s-{text}", is_judged=True) if tenant else None,
    )


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")


@pytest.fixture
def bank(tmp_path: Path, fake_embed) -> Iterator[ExperienceBank]:  # type: ignore[no-untyped-def]
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as made:
        made.add([episode(f"What is {i} + {i}?", said=f"It is {2 * i}.") for i in range(4)])
        made.add([episode("What is 9 + 8?", "a", "Secret of a."), episode("What is 8 + 9?", "b", "Secret of b.")])
        yield made


def composer_of(model: LanguageModel, folder: Path | None = None) -> Composer:
    made = Composer(model, num_latents=3, rank=2)
    if folder is not None:
        try:
            made.load_weights(folder)
        except CheckpointError:
            made.detach()
            raise
    return made


def save(model: LanguageModel, folder: Path, by: float) -> None:
    composer = composer_of(model)
    with torch.no_grad():
        for parameter in composer.trainable().values():
            parameter.add_(by)
    composer.save_pretrained(folder)
    composer.detach()


class Pointer:
    """Which checkpoint counts."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __call__(self) -> Path | None:
        return self.folder


@pytest.fixture
def pointer(model: LanguageModel, tmp_path: Path) -> Pointer:
    save(model, tmp_path / "one", 0.05)
    save(model, tmp_path / "two", -0.07)
    return Pointer(tmp_path / "one")


@contextmanager
def recaller_of(model: LanguageModel, bank: ExperienceBank, current: Pointer, **settings) -> Iterator[Recaller]:  # type: ignore[no-untyped-def]
    following = Following(current, lambda folder: composer_of(model, folder))
    how = {"choices": ("text", "none", NAME), "text_budget": 400, "refresh_seconds": None} | settings
    made = Recaller(NAME, bank, {NAME: following}, lambda text: len(model.encode(text)), **how)
    try:
        yield made
    finally:
        made.close()
        assert not model.adapters._parameters


def test_latents_are_those_of_the_latent_memory_and_are_composed_once(model, bank, pointer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with recaller_of(model, bank, pointer) as recaller:
        composed: list[str] = []
        compose = Composer.compose
        monkeypatch.setattr(Composer, "compose", lambda self, texts: composed.extend(texts) or compose(self, texts))
        given = [recaller(None, NEW, role, ("",)) for role in ROLES for _ in range(3)]
        assert len(composed) == 2
        monkeypatch.undo()
        reference = composer_of(model, pointer.folder)
        memory = LatentMemory(bank.seen_by([""]), reference)
        for one, role in zip(given[::3], ROLES, strict=True):
            expected = recall_one(memory, NEW, role)
            assert one.recall.record == expected.record
            assert_close(one.recall.latents, expected.latents, rtol=0, atol=1e-5)
            assert one.recall.composer == recaller.versions()[NAME]
        reference.detach()
        for first, again in ((given[0], given[1]), (given[3], given[5])):
            assert again.recall is first.recall
            assert again.timings.composing == 0 < first.timings.composing
        assert list(given[0].similarities) == sorted(given[0].similarities, reverse=True)
        assert len(given[0].similarities) == len(given[0].recall.record.sources) == 3


@pytest.mark.parametrize("name", [NAME, "text"])
def test_a_tenant_recalls_the_common_pool_and_its_own(model, bank, pointer, name: str) -> None:  # type: ignore[no-untyped-def]
    with recaller_of(model, bank, pointer, searching=Searching(num_retrieved=9), text_budget=2000) as recaller:
        texts = [recaller(name, NEW, ROLES[0], tenants).recall.record.text for tenants in (("",), ("", "a"), ("", "b"))]
    seen = [("Secret of a." in text, "Secret of b." in text) for text in texts]
    assert seen == [(False, False), (True, False), (False, True)]


def test_many_that_miss_together_are_composed_in_batches(model, bank, pointer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    sizes: list[int] = []
    first, go_on = threading.Event(), threading.Event()
    compose = Composer.compose

    def slow(self: Composer, texts: list[str]) -> torch.Tensor:
        sizes.append(len(texts))
        first.set()
        assert go_on.wait(60)
        return compose(self, texts)

    with recaller_of(model, bank, pointer) as recaller, ThreadPoolExecutor(12) as pool:
        monkeypatch.setattr(Composer, "compose", slow)
        tasks = [Task(id=None, domain="sums", text=f"What is {i} + 1?") for i in range(11)]
        asked = [pool.submit(recaller, None, tasks[0], ROLES[0], ("",))]
        assert first.wait(60)
        asked += [pool.submit(recaller, None, task, ROLES[0], ("",)) for task in tasks[1:]]
        with recaller._latent[NAME].version() as version:
            while len(version._waiting) < 10:
                pass
        go_on.set()
        together = [one.result(60).recall for one in asked]
        monkeypatch.undo()
        with recaller._latent[NAME].version() as version:
            for recall in together:
                assert_close(recall.latents, version.compose(recall.record.text), rtol=0, atol=1e-5)
    assert sorted(sizes) == [1, 2, 8]


def test_one_text_that_cannot_be_composed_fails_alone(model, bank, pointer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    compose = Composer.compose

    def angry(self: Composer, texts: list[str]) -> torch.Tensor:
        if any("13" in text for text in texts):
            raise ZeroDivisionError
        return compose(self, texts)

    monkeypatch.setattr(Composer, "compose", angry)
    with recaller_of(model, bank, pointer) as recaller, ThreadPoolExecutor(8) as pool:
        tasks = [Task(id=None, domain="sums", text=f"What is {i} + 1?") for i in (10, 11, 12, 13)]
        asked = [pool.submit(recaller, None, task, ROLES[0], ("",)) for task in tasks * 4]
        failed = [one.exception(60) for one in asked]
    assert [type(error) for error in failed] == [type(None)] * 3 + [ZeroDivisionError] + 3 * (
        [type(None)] * 3 + [ZeroDivisionError]
    )


def test_a_deletion_drops_what_was_made_of_it_also_while_it_is_made(model, bank, pointer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with recaller_of(model, bank, pointer) as recaller:
        before = recaller(None, NEW, ROLES[0], EVERYBODY)
        assert len(recaller.kept) == 1
        gone = before.recall.record.sources[0]
        compose, deleted = Composer.compose, []

        def deleting(self: Composer, texts: list[str]) -> torch.Tensor:
            if not deleted:
                deleted.append(bank.delete(domain="sums"))
                bank.add([episode("What is 1 + 1?", said="It is 2.")])
            return compose(self, texts)

        monkeypatch.setattr(Composer, "compose", deleting)
        during = recaller(None, NEW, ROLES[1], EVERYBODY)  # its first try is made of what is deleted meanwhile
        assert deleted
        assert gone not in during.recall.record.sources
        assert "9 + 8" not in during.recall.record.text
        assert len(recaller.kept) == 1
        after = recaller(None, NEW, ROLES[0], EVERYBODY)
        assert after.recall.record.sources == during.recall.record.sources != before.recall.record.sources


def test_a_new_checkpoint_is_taken_up_and_calls_in_flight_keep_theirs(model, bank, pointer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with recaller_of(model, bank, pointer) as recaller:
        old = recaller(None, NEW, ROLES[0], ("",))
        assert not recaller.refresh()
        with recaller._latent[NAME].version() as in_flight:
            pointer.folder = tmp_path / "two"
            assert recaller.refresh()
            assert_close(in_flight.compose(old.recall.record.text), old.recall.latents)
            assert len(model.adapters._parameters) == 2
        assert len(model.adapters._parameters) == 1  # the old one went with its last user
        new = recaller(None, NEW, ROLES[0], ("",))
        assert new.recall.record == old.recall.record
        assert new.recall.composer != old.recall.composer
        assert not torch.allclose(new.recall.latents, old.recall.latents)
        save(model, tmp_path / "two", 0.3)  # the same folder, replaced
        assert recaller.refresh()
        assert recaller(None, NEW, ROLES[0], ("",)).recall.composer not in (old.recall.composer, new.recall.composer)


@pytest.mark.parametrize("damage", ["half", "missing", "other", "pointer", "none"])
def test_a_checkpoint_that_cannot_be_used_is_warned_about_once(model, bank, pointer, tmp_path, caplog, damage) -> None:  # type: ignore[no-untyped-def]
    with recaller_of(model, bank, pointer) as recaller:
        before = recaller(None, NEW, ROLES[0], ("",))
        path = tmp_path / "two" / "composer.safetensors"
        if damage == "half":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "missing":
            path.unlink()
        elif damage == "other":
            other = Composer(model, num_latents=4, rank=2)
            other.save_pretrained(tmp_path / "two")
            other.detach()
        broken = {"pointer": CheckpointError("progress.json: damaged")}.get(damage)

        def current() -> Path | None:
            if broken is not None:
                raise broken
            return None if damage == "none" else tmp_path / "two"

        following = recaller._latent[NAME]
        following._current = current
        with caplog.at_level(logging.WARNING):
            assert not recaller.refresh()
            assert not recaller.refresh()
        assert len(caplog.records) == 1
        assert "the composer stays as it is" in caplog.text
        assert recaller(None, NEW, ROLES[0], ("",)).recall is before.recall
        save(model, tmp_path / "three", 0.2)
        following._current = lambda: tmp_path / "three"
        assert recaller.refresh()


def test_checkpoints_are_looked_for_by_itself(model, bank, pointer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with recaller_of(model, bank, pointer, refresh_seconds=0.01) as recaller:
        first = recaller.versions()
        pointer.folder = tmp_path / "two"
        while recaller.versions() == first:
            pass
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoints"]


def test_what_is_kept_has_a_limit_and_the_least_recently_used_goes(model, bank, pointer) -> None:  # type: ignore[no-untyped-def]
    tasks = [Task(id=None, domain="sums", text=f"What is {i} + 1?") for i in (10, 11, 12)]
    with recaller_of(model, bank, pointer) as recaller:
        one = recaller(None, tasks[0], ROLES[0], ("",))
        size = recaller.kept.num_bytes
        assert size >= 3 * 32 * 4 + len(one.recall.record.text)
    with recaller_of(model, bank, pointer, kept_bytes=2 * size + size // 2) as recaller:
        first, second = (recaller(None, task, ROLES[0], ("",)) for task in tasks[:2])
        assert recaller(None, tasks[0], ROLES[0], ("",)).recall is first.recall
        recaller(None, tasks[2], ROLES[0], ("",))
        assert len(recaller.kept) == 2
        assert recaller(None, tasks[0], ROLES[0], ("",)).recall is first.recall
        assert recaller(None, tasks[1], ROLES[0], ("",)).recall is not second.recall


def test_a_task_or_a_role_too_long_for_the_composer_is_cut(model, bank, pointer) -> None:  # type: ignore[no-untyped-def]
    long = "Read this. " * 900
    task = Task(id="1", domain="sums", text=f"What is 9 + 9? {long}")
    role = Role(name="reader", profile=f"You read. {long}")
    with recaller_of(model, bank, pointer) as recaller:
        for one, other in ((task, ROLES[0]), (NEW, role), (task, role)):
            record = recaller(None, one, other, ("",)).recall.record
            assert len(model.encode(record.text)) <= 1024
            assert "What is 9 + 9?" in record.text
            assert other.profile[:9] in record.text


def test_a_call_may_choose_among_the_memories_that_are_offered(model, bank, pointer) -> None:  # type: ignore[no-untyped-def]
    with recaller_of(model, bank, pointer) as recaller:
        assert recaller("none", NEW, ROLES[0], ("",)).recall.record == Recalled(kind="none")
        text = recaller("text", NEW, ROLES[0], ("",))
        assert text.recall.latents is None
        assert len(model.encode(text.recall.record.text)) <= 400
        assert len(text.recall.record.sources) == len(text.similarities) > 0
        assert text.timings.recall > 0 == text.timings.composing
        with pytest.raises(
            Refused, match=r"latentmem.memory: 'latent:other' is not served here; there is .*'none'"
        ) as no:
            recaller("latent:other", NEW, ROLES[0], ("",))
        assert (no.value.status, no.value.field) == (400, "latentmem.memory")
    with recaller_of(model, bank, pointer, choices=()) as recaller, pytest.raises(Refused, match="not served"):
        recaller("text", NEW, ROLES[0], ("",))


def test_a_bank_that_is_searched_by_a_rating_keeps_the_best_rated(model, bank, pointer) -> None:  # type: ignore[no-untyped-def]
    class ByLastDigit:
        spent = None

        def __call__(self, pairs: Sequence[tuple[Task, Trajectory]]) -> list[float]:
            return [float(trajectory.task.text[8]) for _, trajectory in pairs]

    how = Searching(num_retrieved=2, rate=ByLastDigit())  # type: ignore[arg-type]
    with recaller_of(model, bank, pointer, searching=how) as recaller:
        given = recaller(None, NEW, ROLES[0], ("",))
    texts = [trajectory.task.text for trajectory in bank.get(given.recall.record.sources)]
    assert texts == ["What is 3 + 3?", "What is 2 + 2?"]
    assert len(given.similarities) == 2


def test_composing_sampling_and_new_checkpoints_do_not_run_into_each_other(model, bank, pointer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    batcher = Batcher(model, max_rows=4)
    sampling = Sampling(temperature=1.0, max_response_tokens=12)
    prompts = [Prompt("a", "Be brief.", f"Say {i}.", f"g{i}", i) for i in range(24)]
    alone = [model.sample([prompt], sampling)[0].token_ids for prompt in prompts]
    tasks = [Task(id=None, domain="sums", text=f"What is {i} + 1?") for i in range(12)]
    with recaller_of(model, bank, pointer) as recaller, ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(batcher.respond, [prompt], sampling) for prompt in prompts]
        recalls = [pool.submit(recaller, None, task, role, ("",)) for task in tasks for role in ROLES]
        for name in ("two", "one", "two"):
            pointer.folder = tmp_path / name
            assert recaller.refresh()
        assert [one.result(60)[0].token_ids for one in asked] == alone
        by_version: dict[str, list] = {}  # type: ignore[type-arg]
        for one in recalls:
            recall = one.result(60).recall
            by_version.setdefault(recall.composer, []).append(recall)
    batcher.close()
    folders = [tmp_path / "one", tmp_path / "two"]
    for recalls_of_one in by_version.values():
        found = []
        for folder in folders:
            composer = composer_of(model, folder)
            with torch.no_grad():
                expected = composer.compose([recall.record.text for recall in recalls_of_one])
            found.append(
                all(torch.allclose(r.latents, e, atol=1e-5) for r, e in zip(recalls_of_one, expected, strict=True))
            )
            composer.detach()
        assert sum(found) == 1  # all of one version are of one checkpoint
