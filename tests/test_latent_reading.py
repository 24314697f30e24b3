"""What latents say: shares by hand, what is compared, and responses without a latent held to a slow scorer."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from latentmem.config import Sampling
from latentmem.kept_readings import LatentReading, readings_as_json
from latentmem.latent_reading import (
    WithoutLatent,
    format_reading,
    leave_out_each,
    nearest_tokens,
    read_out,
    spell_token,
    visible,
)
from latentmem.memory.composer import Composer
from latentmem.models.agent import Prompt
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Message, Recalled


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")


@pytest.fixture
def composer_on() -> Iterator[Callable[..., Composer]]:
    """Makes a composer, and takes it off its backbone afterwards."""
    made: list[Composer] = []

    def make(model: LanguageModel, **settings: int) -> Composer:
        made.append(Composer(model, **settings))
        return made[-1]

    yield make
    for composer in made:
        composer.detach()


def embeddings(model: LanguageModel) -> torch.Tensor:
    return model.model.get_input_embeddings().weight


# Nearest tokens


def test_shares_are_those_worked_out_by_hand() -> None:
    # Without the mean (5, 7) the tokens are at (4, 3), (4, -3), (-4, 3) and (-4, -3), the vector at (2.1, 22).
    table = torch.tensor([[9.0, 10.0], [9.0, 4.0], [1.0, 10.0], [1.0, 4.0]])
    found = dict(nearest_tokens(torch.tensor([[7.1, 29.0]]), table, 4)[0])
    # Lengths are 5 and 22.1, so the cosines are (84 + 660, 84 - 660, -84 + 660, -84 - 660) / 1105.
    weights = [math.exp(30 * product / 1105) for product in (744, -576, 576, -744)]
    assert list(found) == [0, 2, 1, 3]
    assert found == {token: pytest.approx(weight / sum(weights), rel=1e-4) for token, weight in enumerate(weights)}


def test_nearest_tokens_of_a_large_vocabulary_are_those_of_a_slow_search() -> None:
    torch.manual_seed(0)
    vectors, table = torch.randn(2, 4), torch.randn(9000, 4) + 1  # more than is compared at once
    centre = table.mean(0)
    for vector, row in zip(vectors, nearest_tokens(vectors, table, 2), strict=True):
        cosines = torch.cosine_similarity((vector - centre).expand(9000, -1), table - centre, dim=1)
        assert [token for token, _ in row] == cosines.argsort(descending=True)[:2].tolist()
        shares = (30 * cosines).softmax(0).sort(descending=True).values
        assert [share for _, share in row] == pytest.approx(shares[:2].tolist(), rel=1e-3)


def test_a_vector_among_equal_tokens_is_shared_evenly() -> None:
    assert {share for _, share in nearest_tokens(torch.ones(1, 2), torch.ones(4, 2), 4)[0]} == {0.25}
    assert len(nearest_tokens(torch.ones(1, 2), torch.ones(2, 2), 3)[0]) == 2


# What a composer put into its latents


def test_of_a_slot_its_word_is_read_and_other_latents_whole(
    model: LanguageModel, composer_on: Callable[..., Composer]
) -> None:
    composer = composer_on(model, num_latents=4, rank=2, slots=2)
    table = embeddings(model).detach()
    with torch.no_grad():
        composer.gate[:] = torch.tensor([0.5, 0.0])
        composer.frame[:] = table[[20, 21, 22, 23]]
        composer.frame[3] = 0
    latents = torch.stack([0.5 * table[30] + table[20], table[21], table[31], table[32]])
    found = read_out(composer, model, latents)
    assert [row.gate for row in found] == [0.5, 0, None, None]
    # The word at its own length, a closed slot by its frame, and what is no slot as it is.
    for row, token in zip(found, [30, 21, 31, 32], strict=True):
        (expected,) = nearest_tokens(table[[token]], table)
        assert expected[0][0] == token
        assert [told for told, _ in row.nearest] == [spell_token(model, near) for near, _ in expected]
        assert [share for _, share in row.nearest] == pytest.approx([share for _, share in expected], rel=1e-3)
    assert [row.frame and row.frame[0] for row in found] == [*(spell_token(model, i) for i in (20, 21, 22)), None]
    usual = table.square().sum(1).mean().sqrt()
    lengths = [0.5 * table[30].norm(), torch.tensor(0.0), (table[31] - table[22]).norm(), table[32].norm()]
    assert [row.length for row in found] == pytest.approx([float(length / usual) for length in lengths], abs=1e-6)


def test_without_slots_what_is_composed_is_all_but_the_bias(
    model: LanguageModel, composer_on: Callable[..., Composer]
) -> None:
    composer = composer_on(model, num_latents=2, rank=2)
    table = embeddings(model).detach()
    found = read_out(composer, model, table[[40, 41]])
    assert [row.nearest[0][0] for row in found] == [spell_token(model, token) for token in (40, 41)]
    assert [(row.gate, row.frame) for row in found] == [(None, None)] * 2
    usual = table.square().sum(1).mean().sqrt()
    assert found[0].length == pytest.approx(float((table[40] - composer.projection.bias.detach()).norm() / usual))


# Leaving out


def said_with(model: LanguageModel, latents: torch.Tensor, limit: int = 5) -> Message:
    prompt = Prompt("doer", "You add.", "1 + 2?", "group", seed=0, latents=latents)
    (sampled,) = model.respond([prompt], Sampling(temperature=0, max_response_tokens=limit))
    return Message(
        role="doer",
        system="You add.",
        user="1 + 2?",
        response=sampled.text,
        token_ids=sampled.token_ids,
        logps=sampled.logps,
        finish=sampled.finish,
        temperature=0,
        num_prompt_tokens=sampled.num_prompt_tokens,
        recalled=Recalled(kind="latent", text="what the composer read", num_latents=len(latents)),
    )


def slow_logp(model: LanguageModel, message: Message, latents: torch.Tensor) -> float:
    """The whole row through the model at once, as transformers has it."""
    prompt = model.encode_prompt(message.system, message.user)
    table = embeddings(model)
    row = torch.cat([table[prompt], latents, table[list(message.token_ids)]])
    with torch.no_grad():
        logps = model.model(inputs_embeds=row[None]).logits[0].log_softmax(1)
    first = len(prompt) + len(latents) - 1
    return sum(float(logps[first + i, token]) for i, token in enumerate(message.token_ids))


@pytest.mark.parametrize("num_latents", [3, 1])
def test_a_response_without_each_latent_is_scored_and_sampled_anew(model: LanguageModel, num_latents: int) -> None:
    latents = 0.5 * torch.randn(num_latents, 32, generator=torch.Generator().manual_seed(3))
    message = said_with(model, latents)
    found = leave_out_each(model, message, latents, 5)
    with_all = slow_logp(model, message, latents)
    assert with_all == pytest.approx(sum(message.logps), abs=1e-4)
    for k, one in enumerate(found):
        rest = latents[[i for i in range(num_latents) if i != k]]
        assert one.change == pytest.approx(slow_logp(model, message, rest) - with_all, abs=1e-3)
        assert one.change < 0  # the original was the likeliest, token by token
        if num_latents > 1:
            assert one.response == said_with(model, rest).response
    assert len(found) == num_latents


# In words


def test_hostile_text_stays_on_its_line_and_is_seen() -> None:
    assert visible("a b\n\t\x1b[31m\u202e\u2028\\ é") == r"a b\n\t\x1b[31m\u202e\u2028\\ é"


def test_blanks_of_a_token_are_seen_and_pieces_of_characters_are_named(model: LanguageModel) -> None:
    blank = model.encode(" The")[0]
    assert spell_token(model, blank).startswith("\u2423")
    (newline,) = model.encode("\n")
    assert spell_token(model, newline) == r"\n"
    piece = model.encode("\u4e2d")[0]
    assert "\ufffd" in model.spell([piece])
    assert "\ufffd" not in spell_token(model, piece)


AFTER = [
    LatentReading(1.0, 0.9, (("corn", 0.93), ("maize", 0.02)), ("is", 0.4)),
    LatentReading(0.0, 0.0, (("is", 0.97),), None),
]
BEFORE = [LatentReading(1.0, 0.1, ((r"\n", 0.11),), None), LatentReading(0.0, 0.0, ((r"\n", 0.1),), None)]


def test_a_role_is_one_aligned_table() -> None:
    without = [WithoutLatent('app"le', -8.12), WithoutLatent("corn\nis it", 0.0)]
    assert format_reading("scout  (memory m)", AFTER, BEFORE, without, "corn\nis it").splitlines() == [
        "scout  (memory m)",
        "latent  gate  length  nearest after          nearest before  frame    without it",
        r'1       1.00  0.90    corn 0.93, maize 0.02  \n 0.11         is 0.40  "app\"le" (-8.12 nats)',
        r"2       0.00  0.00    is 0.97                \n 0.10         -        the same (+0.00 nats)",
        r'with all: "corn\nis it"',
    ]


def test_a_role_that_said_nothing_and_an_untrained_composer_without_slots() -> None:
    found = [LatentReading(None, 1.0, (("a", 0.5),), None)]
    assert format_reading("critic", found, None, [], "").splitlines() == [
        "critic",
        "latent  gate  length  nearest",
        "1       -     1.00    a 0.50",
        "it said nothing in the first turn",
    ]


def test_readings_are_plain_json() -> None:
    found = json.loads(
        json.dumps(readings_as_json("latent:lmpo", "latent:untrained", {"t1": {"scout": (AFTER, BEFORE)}}))
    )
    assert (found["memory"], found["before"], found["tasks"][0]["task"]) == ("latent:lmpo", "latent:untrained", "t1")
    (role,) = found["tasks"][0]["roles"]
    assert role["role"] == "scout"
    assert role["after"][0] == {
        "gate": 1,
        "length": 0.9,
        "nearest": [["corn", 0.93], ["maize", 0.02]],
        "frame": ["is", 0.4],
    }
    assert role["before"][1] == {"gate": 0, "length": 0, "nearest": [[r"\n", 0.1]], "frame": None}
