"""The embedder without a model: equal everywhere, and nearer where texts share words."""

import numpy as np
import pytest

from latentmem.models.embedder import HashingEmbedder, load_embedder


def test_vectors_are_of_length_one_equal_for_equal_words_and_the_same_in_every_process() -> None:
    rows = HashingEmbedder(16)(["a red door", "A RED door", "a blue door", ""])
    assert rows.shape == (4, 16)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert np.array_equal(rows[0], rows[1])
    word = np.random.default_rng(int("ca978112ca1bbdca", 16)).standard_normal(16)  # the first 8 bytes of sha256("a")
    np.testing.assert_allclose(HashingEmbedder(16)(["a"])[0], word / np.linalg.norm(word), rtol=1e-6)


def test_texts_that_share_words_lie_nearer() -> None:
    asked, near, far = load_embedder("hashing")(["the red door of the mill", "a red door", "seven small boats"])
    assert asked @ near > 0.3
    assert abs(asked @ far) < 0.3


@pytest.mark.parametrize("width", [8, 64])
def test_the_width_is_told(width: int) -> None:
    embedder = HashingEmbedder(width)
    assert embedder(["x"]).shape == (1, embedder.width)
