"""Several adapters on one backbone: bit for bit what each computes alone, whatever was put there before or after."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from latentmem.errors import ConfigError
from latentmem.models.language_model import LanguageModel

IDS = torch.tensor([[5, 9, 30, 77, 200], [8, 8, 12, 3, 4]])
TARGETS = {"first": ("q_proj", "v_proj"), "second": ("v_proj", "down_proj")}  # one layer in common


class Loaded(NamedTuple):
    model: LanguageModel
    names: dict[str | None, str | None]
    """Of each kind of adapter its name on the model."""


@pytest.fixture
def load(tiny_model_dir: Path) -> Callable[..., Loaded]:
    """The backbone with adapters of these kinds, put on it in this order."""

    def load(*kinds: str) -> Loaded:
        model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
        names: dict[str | None, str | None] = {None: None}
        for kind in kinds:
            torch.manual_seed(len(kind))
            adapter = model.adapters.add(rank=2, alpha=4.0, target_modules=TARGETS[kind], key="x")
            with torch.no_grad():
                for matrix in adapter.matrices.values():
                    matrix += 0.1 * torch.randn(matrix.shape)
            names[kind] = adapter.name
        return Loaded(model, names)

    return load


@torch.no_grad()
def logits(model: LanguageModel) -> Tensor:
    found: Tensor = model.model(IDS).logits
    return found


def only(model: LanguageModel, name: str | None) -> Tensor:
    with model.adapters.only(name):
        return logits(model)


def alone(load: Callable[..., Loaded], kind: str) -> Tensor:
    model, names = load(kind)
    return only(model, names[kind])


@pytest.mark.parametrize("kinds", [("first", "second"), ("second", "first")])
def test_each_adapter_gives_what_it_gives_alone_bit_for_bit(
    load: Callable[..., Loaded], kinds: tuple[str, str]
) -> None:
    model, names = load(*kinds)
    expected: dict[str | None, Tensor] = {kind: alone(load, kind) for kind in kinds}
    expected[None] = logits(load().model)
    assert not torch.allclose(expected["first"], expected["second"], atol=1e-2)
    assert not torch.allclose(expected["first"], expected[None], atol=1e-2)
    for kind in ("first", None, "second", "first"):
        assert torch.equal(only(model, names[kind]), expected[kind])
        assert torch.equal(logits(model), expected[None])
    with model.adapters.only(names["second"]):
        with model.adapters.only(None):
            assert torch.equal(logits(model), expected[None])
        assert torch.equal(logits(model), expected["second"])
    with pytest.raises(RuntimeError, match="stumble"), model.adapters.only(names["second"]):
        raise RuntimeError("stumble")
    assert torch.equal(logits(model), expected[None])


def test_two_adapters_of_one_kind_are_two(load: Callable[..., Loaded]) -> None:
    model, names = load("first")
    again = model.adapters.add(rank=2, alpha=4.0, target_modules=TARGETS["first"], key="x")
    assert again.name != names["first"]
    assert torch.equal(only(model, again.name), logits(load().model))  # a fresh one changes nothing
    assert torch.equal(only(model, names["first"]), alone(load, "first"))


def test_a_backward_pass_reaches_the_adapter_that_was_on_and_may_come_when_it_is_off_again(
    load: Callable[..., Loaded],
) -> None:
    model, names = load("first", "second")
    with model.as_agent(names["second"]) as agent:
        loss = agent.model(IDS).logits.square().mean()
    loss.backward()
    moved = {path for path, p in model.model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    every = {path for path, _ in model.model.named_parameters() if f".{names['second']}." in path}
    assert moved == every
    assert len(every) == 2 * 2 * 2  # layers, targets, A and B


@pytest.mark.parametrize(("gone", "left"), [("first", "second"), ("second", "first")])
def test_an_adapter_that_is_removed_leaves_the_other_and_then_the_backbone_as_they_were(
    load: Callable[..., Loaded], gone: str, left: str
) -> None:
    (model, names), plain = load("first", "second"), load().model
    model.adapters.remove(names[gone])
    assert names[gone] not in model.adapters
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(only(model, names[left]), alone(load, left))
    assert not any(f".{names[gone]}." in path for path, _ in model.model.named_modules())
    model.adapters.remove(names[left])
    assert [path for path, _ in model.model.named_modules()] == [path for path, _ in plain.model.named_modules()]
    assert torch.equal(logits(model), logits(plain))


def test_layers_that_are_not_there_or_not_within_the_decoder_are_told(
    load: Callable[..., Loaded], tiny_model_dir: Path
) -> None:
    model = load("first").model  # whose layers lie inside others now

    def refused(*target_modules: str) -> str:
        with pytest.raises(ConfigError) as error:
            model.adapters.add(rank=2, alpha=4.0, target_modules=target_modules, key="grpo.target_modules")
        return str(error.value)

    where = f"model {str(tiny_model_dir)!r}"
    assert refused("q_proj", "vproj") == (f"grpo.target_modules: {where} has no layer 'vproj'; did you mean 'v_proj'?")
    for end in ("lm_head", "embed_tokens"):
        assert refused("q_proj", end) == (
            f"grpo.target_modules: {end!r} is the embedding or the output layer of {where}; name layers between them, "
            "such as q_proj"
        )
    assert "more" not in model.adapters
