"""The warm-up on a tiny model that has words: what it is taught with, what each stage moves, and that it resumes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from training_world import Lines

from latentmem.config import WarmupSection
from latentmem.errors import TrainingError
from latentmem.memory.composer import Composer
from latentmem.memory.memory import describe
from latentmem.models.language_model import LanguageModel
from latentmem.teams.team import load_team
from latentmem.training import warmup as module
from latentmem.training.checkpoint_folder import newest_checkpoint, selected_checkpoint
from latentmem.training.warmup import WarmupTrainer
from latentmem.training.warmup_texts import SPEAKER, TOLD, Lesson, Words, draw_lesson, words_of
from wordy import WORDS

SETTINGS = WarmupSection(
    frame_steps=8,
    frame_rate=3e-2,
    copy_steps=8,
    learning_rate=1e-2,
    projection_rate=0.25,
    lessons_per_step=8,
    words_per_prompt=4,
    eval_every=4,
    save_every=3,
    micro_batch_positions=64,
)


@pytest.fixture
def make(wordy_model_dir: Path, other_model_dir: Path) -> Callable[..., WarmupTrainer]:
    """A trainer of a composer with one slot of one latent; `other`: the composer is on the other base."""

    def build(other: bool = False, seed: int = 3, **kwargs: Any) -> WarmupTrainer:
        model = LanguageModel.from_pretrained(str(wordy_model_dir), "cpu")
        base = LanguageModel.from_pretrained(str(other_model_dir), "cpu") if other else model
        fields = {key: kwargs.pop(key) for key in list(kwargs) if key in WarmupSection.model_fields}
        composer = Composer(
            base, model, **{"num_latents": 1, "slots": 1, "rank": 2, "alpha": 4.0, "template": "{memory}", **kwargs}
        )
        return WarmupTrainer(composer, model, None, SETTINGS, seed=seed, **fields)

    return build


@pytest.fixture
def model(wordy_model_dir: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(str(wordy_model_dir), "cpu")


def run(trainer: WarmupTrainer, folder: Path, lines: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Train, and return the rows that are left of what was logged."""
    rows = [] if lines is None else lines

    trainer.train(folder, Lines(rows))
    return rows


def weights(composer: Composer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in composer.trainable().items()}


# Words and lessons


def test_words_are_one_token_wherever_they_stand_and_some_are_kept_apart(model: LanguageModel) -> None:
    words = words_of(model, seed=4)
    found = {*words.learned, *words.held_out}
    assert found >= set(WORDS)
    assert len(found) == len(words.learned) + len(words.held_out)
    assert len(words.held_out) == len(found) // 10
    assert all(len(model.encode(word)) == len(model.encode(f" {word}")) == 1 for word in found)
    assert all(word.isalpha() and word.islower() and len(word) > 3 for word in found)
    assert words_of(model, seed=4) == words
    assert words_of(model, seed=5).held_out != words.held_out


def statements(lesson: Lesson) -> dict[str, list[str]]:
    """For each value that is asked for, the sentences of the episode that may tell it."""
    observation = lesson.episode.steps[0].observation
    return {
        value: [part for part in observation.split(". ") if value in part.lower().rstrip(".").split()]
        for value in lesson.values
    }


@pytest.mark.parametrize("max_values", [1, 3])
def test_what_a_lesson_asks_for_is_told_in_its_episode_and_is_what_should_be_said(max_values: int) -> None:
    values = tuple(f"value{letter}" for letter in "abcdefgh")
    lessons = [draw_lesson(Random(seed), WORDS, values, max_values, [load_team("autogen")]) for seed in range(60)]
    assert {len(lesson.values) for lesson in lessons} == set(range(1, max_values + 1))
    for lesson in lessons:
        assert lesson.response == " ".join(lesson.values)
        assert set(lesson.values) <= set(values)
        question = lesson.task.text.lower()
        for value, sentences in statements(lesson).items():
            told = " ".join(sentences).lower()
            assert any(word in question and word in told for word in WORDS), (question, told, value)
        assert lesson.task.text in lesson.user
        assert not any(value in lesson.system + lesson.user for value in values)
        assert lesson.episode.steps[0].observation in describe(lesson.episode)


def test_values_are_said_in_the_order_in_which_they_are_asked_for() -> None:
    for seed in range(20):
        lesson = draw_lesson(Random(seed), WORDS[:40], WORDS[40:], 2, [])
        if len(lesson.values) < 2:
            continue
        before, after = lesson.task.text.split(" and the ")
        observation = lesson.episode.steps[0].observation.lower()
        for attribute, value in zip((before.split()[-1], after.split()[0].strip("?.")), lesson.values, strict=True):
            told = [form.replace("{attribute}", attribute).replace("{value}", value).lower() for form in TOLD]
            ends = [form.split("{name}")[-1].strip() for form in told]
            assert any(end in observation for end in ends), (attribute, value, observation)


def test_half_of_the_lessons_are_put_to_agents_of_the_teams_and_without_teams_none() -> None:
    team = load_team("camel")
    lessons = [draw_lesson(Random(seed), WORDS, WORDS, 1, [team]) for seed in range(100)]
    ours = [lesson for lesson in lessons if lesson.role in team.roles]
    assert 30 < len(ours) < 70
    assert {lesson.role for lesson in lessons if lesson not in ours} == {SPEAKER}
    assert len({lesson.system for lesson in lessons}) > 6
    assert {draw_lesson(Random(seed), WORDS, WORDS, 1, []).role for seed in range(20)} == {SPEAKER}


def test_equal_seeds_draw_equal_lessons_and_others_others() -> None:
    first, again, other = (draw_lesson(Random(seed), WORDS, WORDS, 2, [load_team("autogen")]) for seed in (1, 1, 2))
    assert first == again
    assert first != other


# The stages


def test_the_frame_stage_moves_the_frame_alone_and_lowers_the_surprise_at_words_never_trained_on(
    make: Callable[..., WarmupTrainer], tmp_path: Path
) -> None:
    few = {"frame_steps": 20, "copy_steps": 0, "eval_every": 20, "lessons_per_step": 16, "words_per_prompt": 8}
    trainer = make(**few, eval_lessons=128)
    untrained = weights(trainer.composer)
    rows = [row for row in run(trainer, tmp_path) if "framed" in row]
    framed = weights(trainer.composer)
    assert {name for name in untrained if not torch.equal(untrained[name], framed[name])} == {"frame"}
    assert [row["step"] for row in rows] == [0, 20]
    assert rows[1]["eval_loss"] < rows[0]["eval_loss"] - 0.2
    # The word in the slot is what is said, and not any other.
    lessons = [lesson for lesson in trainer._held_out if lesson.values != trainer._held_out[0].values]
    others = [replace(lesson, values=trainer._held_out[0].values) for lesson in lessons]
    examples = [trainer._example(lesson) for lesson in lessons]
    with torch.no_grad():
        own, _ = module.score(trainer.model, examples, trainer._shown(lessons))
        other, _ = module.score(trainer.model, examples, trainer._shown(others))
    assert float((own - other).sum(1).mean()) > 0.5


def test_the_copy_stage_moves_the_whole_composer_and_lowers_the_surprise_further(
    make: Callable[..., WarmupTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: LanguageModel
) -> None:
    few = words_of(model, 1).learned[:16]  # so few that a random model learns them in a few steps
    monkeypatch.setattr(module, "words_of", lambda *_: Words(few, few))
    monkeypatch.setattr(module, "MIN_WORDS", 32)
    rates = {"learning_rate": 3e-2, "projection_rate": 3.0}
    trainer = make(
        frame_steps=1,
        copy_steps=12,
        eval_every=12,
        **rates,
        num_latents=2,
        rank=4,
        target_modules=("q_proj", "v_proj", "o_proj"),
    )
    ours = {id(parameter) for parameter in trainer.composer.trainable().values()}
    agents = {name: p for name, p in trainer.model.model.named_parameters() if id(p) not in ours}
    before = {name: parameter.detach().clone() for name, parameter in agents.items()}
    untrained = weights(trainer.composer)
    rows = [row for row in run(trainer, tmp_path) if "copied" in row]
    assert {name for name, now in weights(trainer.composer).items() if torch.equal(untrained[name], now)} == set()
    assert [row["step"] for row in rows] == [2, 14]
    assert rows[1]["eval_loss"] < rows[0]["eval_loss"] - 0.3
    assert all(0 <= row["copied"] <= 1 for row in rows)
    assert all(torch.equal(before[name], parameter) for name, parameter in agents.items())


def test_words_that_are_held_out_are_never_learned(
    make: Callable[..., WarmupTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(num_latents=2, slots=2, frame_steps=2, copy_steps=2)
    learned: list[Lesson] = []
    example = trainer._example
    monkeypatch.setattr(trainer, "_example", lambda lesson: learned.append(lesson) or example(lesson))
    monkeypatch.setattr(trainer, "_evaluate_frame", lambda step: (0.0, {}))
    monkeypatch.setattr(trainer, "_evaluate_copy", lambda step: (0.0, {}))
    run(trainer, tmp_path)
    assert len(learned) == 4 * 8
    held_out = set(trainer.words.held_out)
    assert {value for lesson in trainer._held_out for value in lesson.values} <= held_out
    for lesson in learned:
        assert held_out.isdisjoint(lesson.values)
    assert {len(lesson.values) for lesson in learned} == {1, 2}
    prompts = [(lesson.system, lesson.user, lesson.episode) for lesson in learned[:8]]
    assert all(prompts.count(prompt) == 4 for prompt in prompts)  # words_per_prompt
    assert len({lesson.values for lesson in learned[:4]}) > 1


def test_an_evaluation_scores_as_many_examples_as_told_and_shares_the_prompts_of_the_frame(
    make: Callable[..., WarmupTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(eval_lessons=10)  # with 4 words after a prompt
    evaluated: list[Lesson] = []
    example = trainer._example
    monkeypatch.setattr(trainer, "_example", lambda lesson: evaluated.append(lesson) or example(lesson))
    _, framed = trainer._evaluate_frame(0)
    frame, evaluated[:] = [*evaluated], []
    _, copied = trainer._evaluate_copy(0)
    assert (len(frame), len(evaluated)) == (10, 10)
    prompts = [lesson.episode.task.text + lesson.user for lesson in frame]
    assert [prompts.count(prompt) for prompt in dict.fromkeys(prompts)] == [4, 4, 2]
    assert len({lesson.values for lesson in frame[:4]}) > 1
    assert {word for lesson in [*frame, *evaluated] for word in lesson.values} <= set(trainer.words.held_out)
    monkeypatch.setattr(WarmupTrainer, "_per_pass", 3)  # it changes the memory used, not the result
    assert trainer._evaluate_frame(0)[1]["eval_loss"] == pytest.approx(framed["eval_loss"], rel=1e-5)
    assert copied["eval_loss"] > 0


def test_latents_behind_the_slots_begin_as_a_phrase_and_the_slots_empty(make: Callable[..., WarmupTrainer]) -> None:
    trainer = make(num_latents=4, slots=1)
    line_break = trainer.composer.frame[0].detach().clone()
    trainer._open_slots()
    embeddings = trainer.model.model.get_input_embeddings().weight
    tokens = trainer.model.encode(module.FRAME_TEXT)[:3]
    assert (trainer.composer.frame[0] == 0).all()
    assert not (line_break == 0).all()
    assert torch.equal(trainer.composer.frame[1 : 1 + len(tokens)].detach(), embeddings[tokens])


def test_gate_frame_and_projection_move_at_the_rate_of_the_projection(make: Callable[..., WarmupTrainer]) -> None:
    trainer = make()
    names = {id(parameter): name for name, parameter in trainer.composer.trainable().items()}
    for optimization in (trainer.framing, trainer.copying):
        for parameter in optimization.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimization.step(0, 0.0)
    (framing,) = trainer.framing.adamw.param_groups
    assert ([names[id(p)] for p in framing["params"]], framing["lr"]) == (["frame"], 3e-2)
    slow, fast = trainer.copying.adamw.param_groups
    assert {names[id(p)] for p in fast["params"]} == {"projection.weight", "gate", "frame"}
    assert {names[id(p)].split(".")[0] for p in slow["params"]} == {"query_latents", "lora"}
    assert (slow["lr"], fast["lr"]) == (1e-2, 0.25e-2)


class Stopped(BaseException):
    """As a user's Ctrl-C."""


def test_a_warm_up_that_is_stopped_anywhere_goes_on_to_the_same_weights_and_rows(
    make: Callable[..., WarmupTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"frame_steps": 3, "copy_steps": 3, "save_every": 2, "eval_every": 3}
    short |= {"lessons_per_step": 2, "words_per_prompt": 2}
    whole = make(**short)
    rows = run(whole, tmp_path / "whole")
    wanted = weights(whole.composer)

    def stop(*_: object) -> None:
        raise Stopped

    for place in (
        ("_frame_step", 2),
        ("_evaluate_copy", 0),
        ("_copy_step", 0),
        ("_copy_step", 2),
    ):  # calls before it is stopped
        cut, left, kept = make(**short), iter(range(place[1], -1, -1)), list[dict[str, Any]]()
        real = getattr(cut, place[0])
        monkeypatch.setattr(cut, place[0], lambda *a, left=left, real=real: real(*a) if next(left) else stop())
        folder = tmp_path / f"{place[0]}{place[1]}"
        with pytest.raises(Stopped):
            run(cut, folder, kept)
        again = make(**short)
        assert run(again, folder, kept) == rows, place
        assert all(torch.equal(wanted[name], now) for name, now in weights(again.composer).items()), place
        assert newest_checkpoint(folder).name == "step-000003"


# Mistakes


def test_without_slots_there_is_nothing_to_warm_up(make: Callable[..., WarmupTrainer]) -> None:
    with pytest.raises(TrainingError) as error:
        make(slots=None)
    assert str(error.value) == (
        "composer.slots is null: without slots there is nothing to warm up; set it to the number of words that an "
        "agent has to be told, or leave `train warmup` out"
    )


def test_without_copying_the_frame_is_what_is_selected(make: Callable[..., WarmupTrainer], tmp_path: Path) -> None:
    trainer = make(frame_steps=2, copy_steps=0)
    rows = run(trainer, tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 2]  # and no evaluation of a copy that is not trained
    found = make(seed=9)
    selected = selected_checkpoint(tmp_path)
    assert selected is not None
    found.composer.load_weights(selected)
    assert torch.equal(found.composer.frame, trainer.composer.frame)


def test_a_tokenizer_with_few_words_is_told(
    make: Callable[..., WarmupTrainer], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    composer = Composer(model, num_latents=1, slots=1, rank=2)
    with pytest.raises(TrainingError) as error:
        WarmupTrainer(composer, model, None, SETTINGS)
    assert str(error.value).startswith(f"model {model.name!r} has ")
    assert str(error.value).endswith(
        " words of 4 to 12 letters that are one token, and a warm-up needs 160; leave `train warmup` out"
    )
