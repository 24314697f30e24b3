"""A LoRA of the agents as a memory: nothing until it is trained, saved strictly, and apart from a composer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentmem.config import Sampling
from latentmem.errors import CheckpointError
from latentmem.memory.composer import Composer
from latentmem.memory.memory import recall_one
from latentmem.memory.parametric import ParametricMemory
from latentmem.models.agent import Prompt
from latentmem.models.language_model import LanguageModel
from latentmem.trajectory import Role, Task

TASK, ROLE = Task(id="1", domain="sums", text="What is 12 + 7?"), Role(name="assistant", profile="helps")


@pytest.fixture
def make(tiny_model_dir: Path, other_model_dir: Path) -> Callable[..., ParametricMemory]:
    def make(other: bool = False, **kwargs) -> ParametricMemory:
        model = LanguageModel.from_pretrained(str(other_model_dir if other else tiny_model_dir), "cpu")
        return ParametricMemory(model, **{"rank": 2, "alpha": 4.0, **kwargs})

    return make


def change(memory: ParametricMemory) -> None:
    with torch.no_grad():
        for parameter in memory.trainable().values():
            parameter += 0.1


def copied(memory: ParametricMemory) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in memory.trainable().items()}


def test_it_recalls_the_adapter_and_no_text_and_untrained_changes_nothing(make: Callable) -> None:
    memory = make()
    (recall,) = memory.recall_many([(TASK, ROLE)])
    assert recall == recall_one(memory, TASK, ROLE)
    assert (recall.record.kind, recall.record.before("user"), recall.latents) == ("parametric", "user", None)

    def said(adapter: str | None) -> tuple[float, ...]:
        prompt = Prompt("assistant", "Solve it.", TASK.text, "g", seed=5, adapter=adapter)
        (response,) = memory.model.respond([prompt], Sampling(max_response_tokens=6))
        return response.logps

    untrained = said(None)
    assert said(recall.adapter) == untrained
    change(memory)
    assert said(None) == untrained
    assert said(recall.adapter) != untrained


def test_equal_seeds_give_equal_weights_also_beside_a_composer(make: Callable) -> None:
    first, second, other = make(seed=1), make(seed=1), make(seed=2)
    beside = LanguageModel.from_pretrained(first.model.name, "cpu")
    Composer(beside, num_latents=3, rank=2, seed=9)
    third = ParametricMemory(beside, rank=2, alpha=4.0, seed=1)
    for name, value in copied(first).items():
        assert torch.equal(copied(second)[name], value)
        assert torch.equal(copied(third)[name], value)
    assert not torch.equal(*(copied(m)["lora.model.layers.0.self_attn.q_proj.lora_A.weight"] for m in (first, other)))


def test_save_load_save_gives_identical_bytes_and_weights(make: Callable, tmp_path: Path) -> None:
    memory = make(seed=1)
    change(memory)
    memory.save_pretrained(tmp_path / "a")
    loaded = make(seed=2)
    loaded.load_weights(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["agents.json", "agents.safetensors"]
    assert json.loads((tmp_path / "a" / "agents.json").read_text())["rank"] == 2
    assert (tmp_path / "a/agents.safetensors").read_bytes() == (tmp_path / "b/agents.safetensors").read_bytes()
    assert all(torch.equal(copied(loaded)[name], value) for name, value in copied(memory).items())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rank": 4}, "rank 2, this adapter 4"),
        ({"alpha": 8.0}, "alpha 4.0, this adapter 8.0"),
        ({"target_modules": ("q_proj",)}, "target_modules ['q_proj', 'v_proj'], this adapter ['q_proj']"),
        ({"other": True}, "d_agent 32, this adapter 48"),
    ],
)
def test_weights_made_for_something_else_are_refused_and_change_nothing(
    make: Callable, tmp_path: Path, changed: dict, says: str
) -> None:
    make(seed=1).save_pretrained(tmp_path)
    memory = make(**changed)
    before = copied(memory)
    with pytest.raises(CheckpointError) as error:
        memory.load_weights(tmp_path)
    assert str(error.value) == (f"{tmp_path}: checkpoint has {says}; use the configuration it was trained with")
    assert all(torch.equal(copied(memory)[name], value) for name, value in before.items())


def test_missing_and_misshapen_tensors_and_renamed_agents_are_told(
    make: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = make()
    memory.save_pretrained(tmp_path)
    memory.model.name = "renamed"
    memory.load_weights(tmp_path)
    assert [record.message.endswith("now it is 'renamed'") for record in caplog.records] == [True]
    path = tmp_path / "agents.safetensors"
    header = {"latentmem": json.dumps({"format_version": 1, **memory.settings()})}
    good = load_file(path)
    name = "lora.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file({key: tensor for key, tensor in good.items() if key != name}, path, header)
    with pytest.raises(CheckpointError, match=r": 1 tensors missing \['lora.*v_proj.lora_B.weight'\], 0 unexpected"):
        memory.load_weights(tmp_path)
    save_file({**good, name: torch.ones(3, 2)}, path, header)
    with pytest.raises(CheckpointError, match=r"lora_B.weight has shape \[3, 2\], expected \[16, 2\]"):
        memory.load_weights(tmp_path)


def test_a_composer_is_not_taken_for_agents_nor_agents_for_a_composer(make: Callable, tmp_path: Path) -> None:
    memory = make()
    composer = Composer(memory.model, num_latents=3, rank=2)
    memory.save_pretrained(tmp_path / "agents")
    composer.save_pretrained(tmp_path / "composer")
    with pytest.raises(CheckpointError) as error:
        composer.load_weights(tmp_path / "agents")
    assert str(error.value) == (
        f"{tmp_path / 'agents'}: holds a LoRA of agents, not a composer; write grpo:FOLDER to use it"
    )
    with pytest.raises(CheckpointError) as error:
        memory.load_weights(tmp_path / "composer")
    assert str(error.value) == (
        f"{tmp_path / 'composer'}: holds a composer, not a LoRA of agents; write latent:FOLDER to use it"
    )
    with pytest.raises(CheckpointError) as error:
        memory.load_weights(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no LoRA of agents here (agents.safetensors is missing); name a folder that holds one"
    )
