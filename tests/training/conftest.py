"""Worlds to train in, made of the tiny models and sharing one bank."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import training_world

from latentmem.bank import ExperienceBank


@pytest.fixture
def make_world(
    tiny_model_dir: Path, other_model_dir: Path, tmp_path: Path, fake_embed: Callable[[list[str]], np.ndarray]
) -> Iterator[Callable[..., training_world.World]]:
    """`training_world.make_world` with a bank of this test."""
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        yield partial(training_world.make_world, bank, tiny_model_dir, other_model_dir)


@pytest.fixture
def world(make_world: Callable[..., training_world.World]) -> training_world.World:
    return make_world()
