"""Several adapters on one backbone: bit for bit what each computes alone, whatever was put there before or after."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentmem.errors import ConfigError
from latentmem.models.language_model import LanguageModel

IDS = torch.tensor([[5, 9, 30, 77, 200], [8, 8, 12, 3, 4]])
TARGETS = {"first": ("q_proj", "v_proj"), "second": ("v_proj", "down_proj")}  # one layer in common


@pytest.fixture
def load(tiny_model_dir: Path) -> Callable[..., LanguageModel]:
    """The backbone with adapters of these names, put on it in this order; none of them changes nothing."""

    def load(*names: str, rests_on: str | None = None) -> LanguageModel:
        model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
        for name in names:
            torch.manual_seed(len(name))
            matrices = model.adapters.add(
                name, rank=2, alpha=4.0, target_modules=TARGETS[name], key="x", rests_on=name == rests_on
            )
            with torch.no_grad():
                for matrix in matrices.values():
                    matrix += 0.1 * torch.randn(matrix.shape)
        return model

    return load


@torch.no_grad()
def logits(model: LanguageModel) -> Tensor:
    found: Tensor = model.model(IDS).logits
    return found


def only(model: LanguageModel, name: str | None) -> Tensor:
    with model.adapters.only(name):
        return logits(model)


@pytest.mark.parametrize("names", [("first", "second"), ("second", "first")])
@pytest.mark.parametrize("rests_on", [None, "first", "second"])
def test_each_adapter_gives_what_it_gives_alone_bit_for_bit(
    load: Callable, names: tuple[str, str], rests_on: str | None
) -> None:
    model = load(*names, rests_on=rests_on)
    expected: dict[str | None, Tensor] = {name: only(load(name), name) for name in names}
    expected[None] = logits(load())
    assert not torch.allclose(expected["first"], expected["second"], atol=1e-2)
    assert not torch.allclose(expected["first"], expected[None], atol=1e-2)
    for name in ("first", None, "second", "first"):
        assert torch.equal(only(model, name), expected[name])
        assert torch.equal(logits(model), expected[rests_on])
    with model.adapters.only("second"):
        with model.adapters.only(None):
            assert torch.equal(logits(model), expected[None])
        assert torch.equal(logits(model), expected["second"])
    with pytest.raises(RuntimeError, match="stumble"), model.adapters.only("second"):
        raise RuntimeError("stumble")
    assert torch.equal(logits(model), expected[rests_on])


def test_a_backward_pass_reaches_the_adapter_that_was_on_and_may_come_when_it_is_off_again(load: Callable) -> None:
    model = load("first", "second")
    with model.as_agent("second") as agent:
        loss = agent(IDS).logits.square().mean()
    loss.backward()
    moved = {path for path, p in model.model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    every = {path for path, _ in model.model.named_parameters() if ".second." in path}
    assert moved == every
    assert len(every) == 2 * 2 * 2  # layers, targets, A and B


@pytest.mark.parametrize(("gone", "left"), [("first", "second"), ("second", "first")])
def test_an_adapter_that_is_removed_leaves_the_other_and_then_the_backbone_as_they_were(
    load: Callable, gone: str, left: str
) -> None:
    model, plain = load("first", "second", rests_on=gone), load()
    expected = only(load(left), left)
    model.adapters.remove(gone)
    assert gone not in model.adapters
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(only(model, left), expected)
    assert not any(f".{gone}." in path for path, _ in model.model.named_modules())
    model.adapters.remove(left)
    assert [path for path, _ in model.model.named_modules()] == [path for path, _ in plain.model.named_modules()]
    assert torch.equal(logits(model), logits(plain))


def test_layers_that_are_not_there_or_not_within_the_decoder_are_told(load: Callable, tiny_model_dir: Path) -> None:
    model = load("first")  # whose layers lie inside others now

    def refused(*target_modules: str) -> str:
        with pytest.raises(ConfigError) as error:
            model.adapters.add("more", rank=2, alpha=4.0, target_modules=target_modules, key="grpo.target_modules")
        return str(error.value)

    where = f"model {str(tiny_model_dir)!r}"
    assert refused("q_proj", "vproj") == (f"grpo.target_modules: {where} has no layer 'vproj'; did you mean 'v_proj'?")
    for end in ("lm_head", "embed_tokens"):
        assert refused("q_proj", end) == (
            f"grpo.target_modules: {end!r} is the embedding or the output layer of {where}; name layers between them, "
            "such as q_proj"
        )
    assert "more" not in model.adapters
