"""Model folders as people have them: what is missing, renamed or too many is told, and refused where it matters."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from latentmem.errors import ModelError
from latentmem.models.language_model import LanguageModel


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        LanguageModel.from_pretrained(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_weights_refuse_a_model_and_unexpected_ones_are_named(folder: Path) -> None:
    change(folder, lambda weights: {name: w for name, w in weights.items() if ".layers.1." not in name})
    said = refusal(folder)
    assert said.startswith(f"model '{folder}' lacks model.layers.1.")
    assert " more; save the whole model again" in said


def test_weights_of_other_names_refuse_a_model(folder: Path) -> None:
    change(folder, lambda weights: {f"wrapped.{name}": w for name, w in weights.items()})
    assert "; it holds wrapped." in refusal(folder)


def test_weights_of_another_shape_refuse_a_model(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda weights: {**weights, name: weights[name][:-1].clone()})
    assert name in refusal(folder)


def test_weights_that_are_too_many_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, lambda weights: {**weights, "value_head.weight": torch.zeros(2)})
    LanguageModel.from_pretrained(str(folder))
    assert "holds weights that its architecture does not use: value_head.weight" in caplog.text


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(str(folder))
    assert "comes with an adapter (adapter_config.json)" in refusal(folder)
    assert "merge_and_unload" in refusal(folder)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)
    assert "its tokenizer has a token of id 328, but there are embeddings for 320" in refusal(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "no_such_method"])
def test_a_quantised_folder_is_refused_by_the_name_of_what_it_needs(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert refusal(folder).startswith(f"model '{folder}' ")
