"""The tiny model, and a server that speaks as vLLM does and has the same model."""

import pytest
from standin import stand_in

from latentmem.models.language_model import LanguageModel


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return LanguageModel.from_pretrained(str(tiny_model_dir))


@pytest.fixture
def server(model):
    with stand_in(model.model, model.name) as running:
        yield running
