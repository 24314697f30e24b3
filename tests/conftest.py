"""Fixtures for everybody: two tiny random language models on disk, a hashing embedder, the shared data where it exists.

The models are made from a configuration and a seed, so nothing is downloaded; sizes differ wherever a mix-up could
hide.
"""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is first imported: workers of pytest-xdist would otherwise fight over the cores. No test asks the hub.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest

import latentmem
from postgres_server import TestServer, running_server
from tiny_models import SENTENCES, llama_config, save_model, save_tokenizer
from wordy import WORDS

assert latentmem.Embedder  # the package keeps what it loads first; a test may put another in its place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests have two hours instead of the limit in pyproject.toml."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(7200))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and width 32: 4 heads, 2 of keys and values, tied embeddings, float32, 320 tokens."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    config = llama_config(save_tokenizer(folder, vocab_size=320))
    save_model(folder, config, seed=1)
    return folder


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 3 layers and width 48: 4 heads, 1 of keys and values, untied embeddings, float32, 300 other tokens."""
    from transformers import Qwen3Config

    folder = tmp_path_factory.mktemp("tiny_qwen3")
    config = Qwen3Config(
        vocab_size=save_tokenizer(folder, vocab_size=300),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    save_model(folder, config, seed=2)
    return folder


@pytest.fixture(scope="session")
def wordy_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and width 32 with tied embeddings, of whose tokens some 180 are words."""
    folder = tmp_path_factory.mktemp("wordy_llama")
    config = llama_config(save_tokenizer(folder, vocab_size=1200, sentences=[*SENTENCES, *(f"{w} {w}" for w in WORDS)]))
    save_model(folder, config, seed=3)
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[TestServer]:
    """A PostgreSQL server of the tests' own; skips where none is installed."""
    with running_server() as server:
        yield server


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection to another machine, or a look-up of its name, fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was asked for: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # Not even the switch that the rest of the tests rely on: loading from a folder must need no network by itself.
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The data that lies beside a checkout on some machines; its rows never enter the project."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder


@pytest.fixture(scope="session")
def fake_embed() -> Callable[[list[str]], np.ndarray]:
    """An embedder without a model: texts [n] to float32 [n, 16] of length 1; texts that share words lie nearer."""
    from latentmem.models.embedder import HashingEmbedder

    hashing = HashingEmbedder(16)
    return lambda texts: hashing(texts)


@pytest.fixture
def no_embedding_model(monkeypatch: pytest.MonkeyPatch, fake_embed: Callable[[list[str]], np.ndarray]) -> None:
    """Commands and recipes embed by `fake_embed`, under whatever embedder's name they ask for."""

    class FakeEmbedder:
        def __init__(self, name: str = "all-minilm-l6-v2") -> None:
            self.name = name

        def __call__(self, texts: list[str]) -> np.ndarray:
            return fake_embed(texts)

    monkeypatch.setattr("latentmem.models.embedder.Embedder", FakeEmbedder)


class OddLength:
    """Pays for an action with an odd number of characters."""

    instructions = "Say something."

    def step(self, action: str) -> Any:
        from latentmem.environments.environment import Outcome

        return Outcome("", float(len(action) % 2), True, {"extracted": action or None})


@pytest.fixture
def lucky(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numeric tasks pay for an odd number of characters: a random model never solves a sum."""
    from latentmem.environments.reasoning import ReasoningDomain

    monkeypatch.setattr(ReasoningDomain, "start", lambda self, task: OddLength())
