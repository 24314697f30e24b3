"""No memory tells a tenant what another one did, nor what nobody judged, whatever it is made of."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_composer import trajectory
from test_learned import Answering

from latentmem.bank import ExperienceBank
from latentmem.config import load_config
from latentmem.memory.composer import Composer
from latentmem.memory.controls import ControlMemory, corrupted
from latentmem.memory.graph import Graph
from latentmem.memory.insights import Insights
from latentmem.memory.latent import LatentMemory
from latentmem.memory.learned import LearnedMemory, Scribe, Similarity
from latentmem.memory.memory import Memory, Spent
from latentmem.memory.stream import Stream
from latentmem.memory.summaries import Summaries
from latentmem.memory.text import TextMemory
from latentmem.models.language_model import LanguageModel
from latentmem.recipes.parts import Parts
from latentmem.trajectory import Origin, Role, Task, Trajectory

Embed = Callable[[list[str]], np.ndarray]
ROLE = Role(name="assistant", profile="Solves.")
ASKED = Task(id=None, domain="sums", text="the sum of 2 and 4")
WORDS = {"": "oakword", "acme": "elmword", "bolt": "ashword"}
"""A word that only the episodes of a tenant hold."""


def episode(tenant: str, number: int, *, is_judged: bool = True) -> Trajectory:
    word = WORDS[tenant] if is_judged else f"un{WORDS[tenant]}"
    text = f"the sum of 2 and {number} {word}"
    origin = Origin(tenant=tenant, session=f"s{number}", is_judged=is_judged)
    return trajectory(text, {"assistant": f"said {word}"}, success=is_judged).model_copy(update={"origin": origin})


@pytest.fixture
def bank(tmp_path: Path, fake_embed: Embed) -> Iterator[ExperienceBank]:
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed, embedder="fake") as bank:
        for number in range(3):
            bank.add([episode(tenant, number) for tenant in WORDS])
        bank.add([episode(tenant, 9, is_judged=False) for tenant in ("acme", "bolt")])
        yield bank


class Even:
    """Finds all episodes equally useful."""

    spent = Spent()

    def __call__(self, pairs: Any) -> list[float]:
        return [5.0] * len(pairs)


def memories(bank: ExperienceBank, model: LanguageModel, embed: Embed, folder: Path) -> dict[str, Memory]:
    """Every kind of memory over one bank, which failures do not keep out."""
    scribe, similarity, every = Scribe(Answering()), Similarity(embed), {"num_retrieved": 9, "only_successes": False}
    text = TextMemory(bank, **every)
    methods: dict[str, Any] = {
        "voyager": Summaries(scribe, similarity, **every),
        "generative": Stream(Even(), Even(), **every),
        "oagents": Insights(scribe, **every),
        "gmemory": Graph(scribe, similarity, Even(), **every),
    }
    made: dict[str, Memory] = {
        "text": text,
        "latent": LatentMemory(bank, Composer(model, num_latents=3, rank=2, max_prompt_tokens=2000), **every),
        "text@corrupt": ControlMemory(text, corrupted(0)),
    }
    for name, method in methods.items():
        learned = LearnedMemory(bank, method, folder / f"{name}.json")
        learned.learn()
        made[name] = learned
    return made


@pytest.mark.parametrize("tenant", ["", "acme", "bolt", "newcomer"])
def test_no_memory_recalls_what_is_not_for_the_tenant(
    bank: ExperienceBank, tiny_model_dir: Path, fake_embed: Embed, tmp_path: Path, tenant: str
) -> None:
    seen = {"", tenant}
    view = bank.seen_by(seen)
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")
    owners = {t.id: t.origin.tenant for t in bank if t.origin is not None}
    for name, memory in memories(view, model, fake_embed, tmp_path).items():
        (recall,) = memory.recall_many([(ASKED, ROLE)])
        assert recall.record.sources, name
        assert {owners[id_] for id_ in recall.record.sources} <= seen, name
        assert all(word not in recall.record.text for owner, word in WORDS.items() if owner not in seen), name
        for notes in tmp_path.glob("*.json"):
            assert all(word not in notes.read_text() for owner, word in WORDS.items() if owner not in seen), name


def test_an_unjudged_episode_is_recalled_by_its_own_tenant_at_most(bank: ExperienceBank) -> None:
    def told(*tenants: str, only_successes: bool) -> str:
        memory = TextMemory(bank.seen_by(tenants), num_retrieved=9, only_successes=only_successes)
        return "".join(recall.record.text for recall in memory.recall_many([(ASKED, ROLE)]))

    assert "unelmword" in told("", "acme", only_successes=False)
    assert "unashword" not in told("", "acme", only_successes=False)
    assert "un" not in told("", only_successes=False).replace("unsolved", "")
    assert "unelmword" not in told("", "acme", only_successes=True)


@pytest.mark.usefixtures("no_embedding_model")
@pytest.mark.parametrize(("setting", "seen"), [([], {""}), (["bank.tenants=['', acme]"], {"", "acme"}),
                                               (["bank.tenants=null"], set(WORDS))])  # fmt: skip
def test_a_run_opens_its_bank_for_the_tenants_of_its_configuration(
    tmp_path: Path, setting: list[str], seen: set[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {tmp_path / 'run'}\ndata: {{kind: hidden_facts}}\n")
    parts = Parts(load_config(str(config), setting))
    try:
        parts.bank.add([episode(tenant, 1) for tenant in WORDS])
        assert {t.origin.tenant for t in parts.bank if t.origin is not None} == seen
        assert len(parts.bank.search(ASKED, k=9)) == len(seen)
        copy = parts.bank_copy(tmp_path / "copy.sqlite")
        assert len(copy.search(ASKED, k=9)) == len(seen)
        copy.close()
    finally:
        parts.close()
