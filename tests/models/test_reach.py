"""Names of models that nobody knows: told at once, with the network asked once or not at all."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError

from latentmem.errors import ModelError
from latentmem.models.assets import is_in_reach, resolve_config, resolve_model
from latentmem.models.loading import load


@pytest.mark.parametrize("resolve", [resolve_model, resolve_config])
def test_a_misspelt_embedded_name_is_told_before_any_network(resolve, no_network):
    for name in ("smollm2-135", "smolm2-135m", "smollm-135m"):
        with pytest.raises(ModelError) as caught:
            resolve(name)
        assert str(caught.value) == (
            f"{name!r}: no such folder; did you mean 'smollm2-135m'? A model of the hub is named ORGANISATION/MODEL"
        )
    assert resolve("gpt2") in ("gpt2", ("gpt2", None))


def test_a_hub_without_an_answer_is_asked_once_and_the_cache_does_the_rest(monkeypatch, caplog):
    asked = []

    def answer(self, name, timeout):
        asked.append(name)
        raise reply

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", answer)
    reply = ConnectionError("Name or service not known")
    with pytest.raises(ModelError, match=r"^model 'someone/nothing' cannot be loaded"):
        load("someone/nothing", "float32")
    assert asked == ["someone/nothing"]
    (warning,) = caplog.messages
    assert warning == ("the hub of models cannot be reached (Name or service not known); only what is cached is used")
    reply = HFValidationError("it answered")
    assert is_in_reach("someone/nothing")
    assert not is_in_reach(Path("/a/folder"))
