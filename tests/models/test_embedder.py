import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from latentmem.errors import ModelError
from latentmem.models import embedder as embedder_module
from latentmem.models.assets import resolve_embedder
from latentmem.models.embedder import Embedder

TEXTS = [
    "State the final answer to the following arithmetic problem: 12 + 7 =",
    "Who wrote the first novel set on the moon?",
    "Sum the two numbers twelve and seven.",
    "Write a function that reverses a linked list, " * 12,
    "",
]


@pytest.fixture(scope="module")
def embedder():
    return Embedder()


@pytest.fixture
def forgetful(embedder):
    """The same embedder with nothing remembered."""
    embedder._remembered.clear()
    return embedder


def test_vectors_are_float32_of_length_one(embedder):
    rows = embedder(TEXTS)
    assert rows.shape == (5, 384)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=0, atol=1e-6)
    assert embedder.width == 384
    assert embedder.name == "all-minilm-l6-v2"


def test_no_texts_give_no_rows(embedder):
    assert embedder([]).shape == (0, 384)


def test_vectors_are_the_mean_over_tokens_of_the_last_hidden_states(embedder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    from latentmem.models.assets import quiet_loading

    folder = resolve_embedder("all-minilm-l6-v2")
    with quiet_loading():
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for row, text in zip(embedder(TEXTS), TEXTS, strict=True):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            mean = model(**ids).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), rtol=0, atol=1e-6)


def test_a_vector_does_not_depend_on_its_neighbours_to_the_last_bit(forgetful):
    together = forgetful(TEXTS)
    for text, row in zip(TEXTS, together, strict=True):
        forgetful._remembered.clear()
        np.testing.assert_array_equal(forgetful([text])[0], row)


def test_several_texts_at_once_give_the_same_vectors_to_rounding(embedder):
    texts = ["one", "a longer text about gears and their sizes", "two words"]
    together = Embedder(batch_size=2)
    np.testing.assert_allclose(together(texts), embedder(texts), atol=1e-6)


def test_rows_come_in_the_order_of_the_texts_repeats_included(forgetful):
    first = forgetful(TEXTS)
    again = forgetful([TEXTS[3], TEXTS[0], TEXTS[3]])
    np.testing.assert_array_equal(again, first[[3, 0, 3]])


def test_a_remembered_text_is_not_embedded_again(forgetful, monkeypatch):
    asked = []
    encode = forgetful._model.encode

    def count(texts, **options):
        asked.append(list(texts))
        return encode(texts, **options)

    monkeypatch.setattr(forgetful._model, "encode", count)
    forgetful(["a", "b", "a"])
    forgetful(["b", "c"])
    forgetful(["c", "a"])
    assert asked == [["a", "b"], ["c"]]


def test_the_text_asked_for_longest_ago_is_forgotten_first(forgetful, monkeypatch):
    monkeypatch.setattr(embedder_module, "MAX_REMEMBERED", 2)
    forgetful(["a", "b"])
    forgetful(["a"])
    forgetful(["c"])
    assert list(forgetful._remembered) == ["a", "c"]
    assert forgetful(["a", "b", "c"]).shape == (3, 384)  # more than it may remember in one call
    assert len(forgetful._remembered) == 2


def test_many_threads_get_the_same_vectors_and_the_model_embeds_for_one_at_a_time(forgetful, monkeypatch):
    texts = [f"Task {i}" for i in range(12)]
    expected = {text: forgetful([text])[0] for text in texts}
    forgetful._remembered.clear()
    monkeypatch.setattr(embedder_module, "MAX_REMEMBERED", 3)  # what one thread knows, another forgets
    embed, inside, most = forgetful._embed, [], []

    def watched(asked):
        inside.append(1)
        most.append(len(inside))
        rows = embed(asked)
        inside.pop()
        return rows

    monkeypatch.setattr(forgetful, "_embed", watched)
    with ThreadPoolExecutor(8) as pool:
        asked = [[texts[(i + j) % 12] for j in range(3)] for i in range(12)] * 4
        for some, rows in zip(asked, pool.map(forgetful, asked), strict=True):
            np.testing.assert_array_equal(rows, [expected[text] for text in some])
    assert set(most) == {1}
    assert len(forgetful._remembered) == 3


def test_what_a_caller_does_to_a_row_is_not_remembered(forgetful):
    rows = forgetful(["a"])
    before = rows.copy()
    rows[:] = 0
    np.testing.assert_array_equal(forgetful(["a"]), before)


def test_a_rephrased_task_is_nearer_than_another(embedder):
    rows = embedder(TEXTS)
    assert rows[0] @ rows[2] > rows[0] @ rows[1] + 0.2


def test_loading_and_embedding_is_silent_and_needs_no_network(no_network, capfd):
    Embedder()(["some text"])
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_holds_another_kind_of_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be loaded by sentence-transformers") as caught:
        Embedder(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_vector_without_a_direction_is_an_error(forgetful, monkeypatch, value):
    monkeypatch.setattr(forgetful._model, "encode", lambda texts, **options: np.full((len(texts), 384), value))
    with pytest.raises(ModelError, match="all-minilm-l6-v2: gave a vector without a direction"):
        forgetful(["a"])


@pytest.mark.parametrize(("weight", "is_needed"), [("encoder.layer.3.output.dense.weight", True), ("pooler.", False)])
def test_weights_that_are_not_there_are_told(tmp_path, weight, is_needed):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(resolve_embedder("all-minilm-l6-v2"), tmp_path / "mine")
    weights = load_file(folder / "model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if not name.startswith(weight)}
    assert left.keys() < weights.keys(), "nothing was left out; the test is void"
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    if is_needed:
        with pytest.raises(ModelError, match=f"mine: the embedder's files lack 1 of its weights, such as {weight}"):
            Embedder(str(folder))
    else:
        Embedder(str(folder))
