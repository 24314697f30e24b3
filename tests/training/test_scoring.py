"""Scoring against one plain forward and backward pass over whole sequences, and against what the rollout recorded."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close
from training_world import SAMPLING, TASKS, assert_same_gradients, assert_slopes, plain_logps, take_gradients, wake

from latentmem.memory.composer import Composer
from latentmem.models.language_model import LanguageModel
from latentmem.training.losses import lmpo_loss
from latentmem.training.scoring import Example, accumulate, blocks, micro_batches_of, score, score_all
from latentmem.trajectory import Trajectory

LARGE = 10**6
LossOf = Callable[[list[int], Tensor, Tensor], Tensor]


def examples_of(trajectories: list[Trajectory], model: LanguageModel) -> list[Example]:
    return [
        Example.of(message, model, message.recalled.text, SAMPLING.temperature)
        for trajectory in trajectories
        for message in trajectory.messages
    ]


def toy_loss(rows: list[int], logps: Tensor, mask: Tensor) -> Tensor:
    """Not linear, and different for each example, so that no mix-up of rows goes unseen."""
    weights = torch.tensor([1 + row % 5 for row in rows], dtype=logps.dtype)[:, None]
    return (weights * torch.where(mask, (logps + 1).square(), torch.zeros_like(logps))).sum() / 100


def plain_loss(composer: Composer, model: LanguageModel, examples: list[Example], loss_of: LossOf) -> Tensor:
    """One example after the other, each on its own in full."""
    total = torch.zeros((), dtype=composer.dtype)
    for row, example in enumerate(examples):
        logps = plain_logps(composer, model, example)[None]
        total = total + loss_of([row], logps, torch.ones_like(logps, dtype=torch.bool))
    return total


@pytest.mark.parametrize("other_base", [pytest.param(False, marks=pytest.mark.slow), True])
def test_accumulated_gradients_equal_one_plain_backward_pass(make_world: Callable, other_base: bool) -> None:
    world = make_world(other_base=other_base)
    wake(world.composer)
    examples = examples_of(world.play(), world.model)
    loss = plain_loss(world.composer, world.model, examples, toy_loss)
    loss.backward()
    expected = take_gradients(world.composer)
    assert expected.keys() == world.composer.trainable().keys()
    for budget in (LARGE, 60, 1):
        found = accumulate(world.composer, world.model, examples, toy_loss, budget)
        assert found == pytest.approx(float(loss.detach()), rel=1e-5)
        assert_same_gradients(take_gradients(world.composer), expected, 1e-4)
    assert all(p.grad is None for p in world.model.model.parameters())


def test_equal_messages_are_scored_once_and_count_as_often_as_they_were_said(world, monkeypatch) -> None:
    wake(world.composer)
    once = examples_of(world.play(), world.model)[:3]
    examples = [once[0], once[1], once[0], once[2], once[0]]

    def loss_of(rows: list[int], logps: Tensor, mask: Tensor) -> Tensor:
        return (logps.exp().sum(1) * torch.tensor([1.0 + row for row in rows])).sum()

    loss = plain_loss(world.composer, world.model, examples, loss_of)
    loss.backward()
    expected = take_gradients(world.composer)
    scored: list[Example] = []
    monkeypatch.setattr(
        "latentmem.training.scoring.score",
        lambda model, chosen, *rest: (scored.extend(chosen), score(model, chosen, *rest))[1],
    )
    found = accumulate(world.composer, world.model, examples, loss_of, LARGE)
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_same_gradients(take_gradients(world.composer), expected, 1e-4)
    assert sorted(scored, key=once.index) == once
    ((rows, logps, _),) = score_all(world.composer, world.model, examples, LARGE)
    first, second, third = (rows.index(row) for row in (0, 2, 4))
    assert torch.equal(logps[first], logps[second])
    assert torch.equal(logps[first], logps[third])


def off_policy_loss(composer: Composer, model: LanguageModel, examples: list[Example]) -> LossOf:
    """LMPO's loss with everything in it: old and reference log-probs apart from today's, both clips, the KL term.

    Ratios lie around e^-0.5, e^-0.1, e^0.1 and e^0.5, so none is near an edge of a clip.
    """
    shifts = (0.5, -0.1, 0.1, -0.5)
    with torch.no_grad():
        now = [plain_logps(composer, model, example) for example in examples]
    old = [row + torch.tensor([shifts[(i + t) % 4] for t in range(len(row))]) for i, row in enumerate(now)]
    reference = [row + 0.2 for row in now]

    def loss_of(rows: list[int], logps: Tensor, mask: Tensor) -> Tensor:
        def padded(values: list[Tensor]) -> Tensor:
            return torch.stack([pad(values[row], (0, logps.shape[1] - len(values[row]))) for row in rows])

        advantages = torch.tensor([(1.3, -0.8, 0.6)[row % 3] for row in rows], dtype=logps.dtype)
        return lmpo_loss(
            logps,
            padded(old),
            advantages,
            mask,
            delta=1.5,
            beta=0.3,
            ref_logps=padded(reference),
            num_tokens=sum(map(len, now)),
        )[0]

    return loss_of


@pytest.mark.parametrize(("other_base", "of_lmpo"), [(False, False), (False, True), (True, True)])
def test_gradients_equal_finite_differences_through_composer_and_agents(
    make_world: Callable, other_base: bool, of_lmpo: bool
) -> None:
    world = make_world(double=True, other_base=other_base)
    composer = world.composer
    assert {p.dtype for p in composer.trainable().values()} == {torch.float64}
    wake(composer)
    examples = examples_of(world.play(TASKS[:1]), world.model)[:5]
    loss_of = off_policy_loss(composer, world.model, examples) if of_lmpo else toy_loss

    def loss() -> float:
        parts = score_all(composer, world.model, examples, 200)
        return sum(float(loss_of(rows, logps, mask)) for rows, logps, mask in parts)

    accumulate(composer, world.model, examples, loss_of, 200)
    found = take_gradients(composer)
    assert_slopes(composer, loss, found)

    expected = plain_loss(composer, world.model, examples, loss_of)
    expected.backward()
    assert_same_gradients(found, take_gradients(composer), 1e-11)


def test_result_does_not_depend_on_micro_batch_positions(world) -> None:
    wake(world.composer)
    examples = examples_of(world.play(), world.model)
    expected: dict[int, Tensor] = {}
    for budget in (LARGE, 200, 30, 1):
        seen: list[int] = []
        for rows, logps, mask in score_all(world.composer, world.model, examples, budget):
            seen += rows
            for i, row in enumerate(rows):
                values = logps[i, mask[i]]
                assert_close(values, expected.setdefault(row, values), rtol=0, atol=2e-5)
        assert sorted(seen) == list(range(len(examples)))


@pytest.mark.parametrize("budget", [30, 60, 80, 150, 400])
def test_blocks_keep_texts_together_and_within_the_budget(world, budget: int) -> None:
    texts = ["a short text", "What is 12 + 7? " * 12, "Plan the steps " * 5]
    examples = [Example(texts[i % 3], (4, 5, 6), (7,) * (1 + i % 4), 0.7) for i in range(12)]
    found = list(blocks(world.composer, examples, budget))
    home: dict[str, int] = {}
    for number, block in enumerate(found):
        rows = [row for batch in block for row in batch]
        assert all(home.setdefault(examples[row].composer_text, number) == number for row in rows)
        composed = {examples[row].composer_text for row in rows}
        longest = max(len(world.model.encode(text)) for text in composed) + 3
        assert len(composed) == 1 or len(composed) * longest <= budget
        for batch in block:
            assert len(batch) * (3 + max(len(examples[row].token_ids) for row in batch)) <= budget
    assert micro_batches_of(world.composer, examples, budget) == [batch for block in found for batch in block]
    assert list(blocks(world.composer, [], budget)) == []


@pytest.mark.parametrize(
    ("lengths", "budget", "sizes"),
    [
        ([4] * 8, 7 * 7, [4, 4]),  # K = 3: seven would fit, and leave one alone
        ([4] * 8, 8 * 7, [8]),
        ([4] * 8, 3 * 7, [3, 3, 2]),
        ([1, 1, 1, 9, 9], 2 * 12, [3, 2]),  # shortest first; 3 x 4 and 2 x 12 positions
        ([9, 1, 9, 1, 1], 2 * 12, [3, 2]),
        ([30, 1], 5, [1, 1]),  # one at least, however long
    ],
)
def test_micro_batches_are_few_and_even(world, lengths: list[int], budget: int, sizes: list[int]) -> None:
    examples = [Example("", (4, 5), (7,) * length, 0.7) for length in lengths]
    found = micro_batches_of(world.composer, examples, budget)
    assert [len(batch) for batch in found] == sizes
    in_order = [lengths[row] for batch in found for row in batch]
    assert in_order == sorted(lengths), "messages of like length are neighbours"


def test_nothing_to_score_is_a_loss_of_zero_and_no_gradient(world) -> None:
    assert accumulate(world.composer, world.model, [], toy_loss, 100) == 0
    assert take_gradients(world.composer) == {}


@pytest.mark.parametrize("team", ["autogen", "camel", pytest.param("dylan", marks=pytest.mark.slow), "macnet"])
@pytest.mark.parametrize("other_base", [False, True])
def test_sampled_logps_equal_scored_ones_in_all_turns_of_every_team(
    make_world: Callable, team: str, other_base: bool
) -> None:
    world = make_world(team, other_base)
    wake(world.composer)
    played = world.play(TASKS[:3])
    messages = [message for trajectory in played for message in trajectory.messages]
    assert {len(trajectory.steps) for trajectory in played} == {2}
    if team != "dylan":  # which decides as it goes
        assert len(messages) == 6 * 2 * len(world.team.roles)
    examples = examples_of(played, world.model)
    assert [len(e.prompt_ids) for e in examples] == [m.num_prompt_tokens for m in messages]
    for rows, logps, mask in score_all(world.composer, world.model, examples, 150):
        for i, row in enumerate(rows):
            ratio = (logps[i, mask[i]] - torch.tensor(messages[row].logps)).exp()
            assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)


def test_memory_moves_the_logps_so_equal_ratios_mean_something(world) -> None:
    wake(world.composer)
    examples = examples_of(world.play(), world.model)
    latents = world.composer.compose([e.composer_text for e in examples]).detach()
    with_memory, mask = score(world.model, examples, latents)
    without, _ = score(world.model, examples, torch.zeros_like(latents))
    assert ((with_memory - without).abs().sum(1) > 1e-2).all()
    assert (with_memory[~mask] == 0).all()


def test_agents_are_bit_equal_with_and_without_a_composer_on_their_backbone(
    tiny_model_dir, make_world: Callable
) -> None:
    ids = torch.tensor([[5, 9, 30, 77, 200]])
    alone = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    expected = alone.model(ids).logits
    world = make_world()
    wake(world.composer)
    with world.model.as_agent() as agent:
        assert torch.equal(agent.model(ids).logits, expected)
    with world.model.adapters.only(world.composer.adapter):
        composing = world.model.model(ids).logits
        assert not torch.allclose(composing, expected, atol=1e-3)
        with world.model.as_agent() as agent:
            assert torch.equal(agent.model(ids).logits, expected)
        assert torch.equal(world.model.model(ids).logits, composing)
    world.composer.compose(["a text"])
    assert torch.equal(world.model.model(ids).logits, expected)
    assert all(p.requires_grad for p in world.composer.trainable().values())


def test_text_of_another_memory_is_left_out_of_the_prompt(world) -> None:
    message = world.trajectories[0].messages[0]
    texts = message.recalled.model_copy(update={"kind": "text", "text": "Remember what was said before."})
    with_text = message.model_copy(update={"recalled": texts})
    assert Example.of(with_text, world.model, "x", 1.0) == Example.of(message, world.model, "x", 1.0)
