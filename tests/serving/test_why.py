"""What a call's memory did to its response, against a forward pass written out."""

import pytest
import torch

from latentmem.bank import ExperienceBank
from latentmem.config import Sampling
from latentmem.memory.composer import Composer
from latentmem.memory.latent import LatentMemory
from latentmem.models.agent import Prompt
from latentmem.models.language_model import LanguageModel
from latentmem.rollout import digest_of
from latentmem.serving.rights.why import why
from latentmem.trajectory import Conversation, Message, Origin, Recalled, Role, Served, Step, Task, Trajectory


class Remade:
    """A latent memory whose recalls can be made again."""

    def __init__(self, memory):
        self.memory = memory

    def again(self, record, composer):
        return self.memory.compose([record])[0]

    def made_of(self, kind, composer, task, role, trajectories):
        return self.memory.recall_from([(task, role)], {task.key: trajectories})[0]


class Gone:
    """No memory is served any more."""

    def again(self, record, composer):
        return None


TASK = Task(id="asked", domain="d", text="What is 12 + 7?")
ROLE = Role(name="solver", profile="Solves the task.")
CHAT = Conversation(messages=({"role": "system", "content": "Solve."}, {"role": "user", "content": "What is 12 + 7?"}))


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return LanguageModel.from_pretrained(str(tiny_model_dir), device="cpu", fused="never")


def episode(text, *replies, tenant="", judged=True):
    said = Message(role="solver", system="s", user=text, response="19", token_ids=(40,), logps=(0.0,), finish="stop",
                   temperature=1.0, num_prompt_tokens=3, recalled=Recalled(kind="none"))  # fmt: skip
    steps = tuple(Step(messages=(said,), action=f"{i}", observation=reply) for i, reply in enumerate(replies))
    origin = Origin(tenant=tenant, session="s", is_judged=judged) if tenant else None
    return Trajectory(task=Task(id=None, domain="d", text=text), team="t", model="m", steps=steps, reward=1.0,
                      success=True, seed=1, origin=origin)  # fmt: skip


@pytest.fixture(scope="module")
def bank(tmp_path_factory, fake_embed):
    bank = ExperienceBank(tmp_path_factory.mktemp("why") / "bank.sqlite", fake_embed)
    bank.add([episode("What is 12 + 8?", "Right."), episode("What is 40 - 15?", "Wrong.", "Right: 25.")])
    yield bank
    bank.close()


@pytest.fixture(scope="module")
def memory(model, bank):
    composer = Composer(model, num_latents=3, initial_scale=1.0, seed=4)
    yield LatentMemory(bank, composer, num_retrieved=2)
    composer.detach()


@pytest.fixture(scope="module")
def message(model, memory):
    recall = memory.recall_many([(TASK, ROLE)])[0]
    prompt = Prompt("solver", "", "", "g", 3, latents=recall.latents, conversation=CHAT)
    (sampled,) = model.respond([prompt], Sampling(temperature=1.0, max_response_tokens=6))
    return Message(
        role="solver", system=CHAT.system, user=CHAT.user, response=sampled.text, token_ids=sampled.token_ids,
        logps=sampled.logps, finish=sampled.finish, temperature=1.0, num_prompt_tokens=sampled.num_prompt_tokens,
        recalled=recall.record,
        served=Served(call="call-1", conversation=CHAT, prompt_ids=sampled.prompt_ids, lineage="0", composer="c1",
                      latents=digest_of(recall.latents)),
    )  # fmt: skip


def slow_logp(model, message, latents):
    """Log-probability of the response, by one pass over [prompt ; latents ; response]."""
    embed = model.model.get_input_embeddings()
    prompt = torch.tensor(model.chat.encode_conversation(CHAT))
    response = torch.tensor(message.token_ids)
    parts = [embed(prompt), *([] if latents is None else [latents]), embed(response)]
    logits = model.model(inputs_embeds=torch.cat(parts)[None]).logits[0]
    before = len(torch.cat(parts)) - len(response) - 1
    logps = logits[before:-1].double().log_softmax(-1)
    return float(logps.gather(1, response[:, None]).sum())


@torch.no_grad()
def test_carried_and_each_share_are_differences_of_log_probabilities(model, bank, memory, message, fake_embed):
    found = why(message, TASK, ROLE, bank, fake_embed, Remade(memory), model)
    sources = bank.get(message.recalled.sources)

    def logp(trajectories):
        return slow_logp(model, message, memory.recall_from([(TASK, ROLE)], {TASK.key: trajectories})[0].latents)

    whole = logp(sources)
    assert whole == pytest.approx(sum(message.logps), abs=1e-3)
    assert found.carried == pytest.approx(whole - slow_logp(model, message, None), abs=1e-4)
    assert sum(found.per_token) == pytest.approx(found.carried, abs=1e-5)
    for place, source in enumerate(found.sources):
        left = sources[:place] + sources[place + 1 :]
        assert source.nats == pytest.approx(whole - logp(left), abs=1e-4)
    (two_steps,) = [source for source in found.sources if source.steps]
    place = [source.id for source in found.sources].index(two_steps.id)
    for share in two_steps.steps:
        steps = [step for i, step in enumerate(sources[place].steps) if i != share.step]
        cut = [*sources]
        cut[place] = sources[place].model_copy(update={"steps": tuple(steps)})
        assert share.nats == pytest.approx(whole - logp(cut), abs=1e-4)
    assert [share.step for share in two_steps.steps] == [0, 1]
    assert found.is_exact
    assert (found.call, found.role, found.memory, found.composer) == ("call-1", "solver", "latent", "c1")


def test_sources_tell_their_similarity_and_whose_they_are(bank, memory, message, model, fake_embed):
    found = why(message, TASK, ROLE, bank, fake_embed, Remade(memory), model)
    hits = {hit.trajectory.id: hit.similarity for hit in bank.search(TASK, k=5)}
    assert {source.id: source.similarity for source in found.sources} == pytest.approx(hits, abs=1e-6)
    assert [source.tenant for source in found.sources] == ["", ""]
    assert [source.is_judged for source in found.sources] == [True, True]


def test_latents_that_come_out_otherwise_today_are_told(bank, memory, message, model, fake_embed):
    served = message.served.model_copy(update={"latents": "another digest"})
    found = why(message.model_copy(update={"served": served}), TASK, ROLE, bank, fake_embed, Remade(memory), model)
    assert not found.is_exact
    assert found.carried is not None


def test_a_source_that_was_forgotten_is_named_and_nothing_of_it_shown(
    tmp_path, memory, message, model, fake_embed, bank
):
    with ExperienceBank(tmp_path / "bank.sqlite", fake_embed) as other:
        other.add(bank.get(message.recalled.sources[:1]))
        found = why(message, TASK, ROLE, other, fake_embed, Remade(memory), model)
    assert found.sources[0].task is not None
    assert (found.sources[1].task, found.sources[1].similarity, found.sources[1].nats) == (None, None, None)
    assert found.carried is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"recalled": Recalled(kind="none")}, "no memory was given"),
        ({"recalled": Recalled(kind="text", sources=("gone",))}, "what its memory was made of was forgotten"),
        ({"token_ids": (), "logps": ()}, "a server of another model was asked, which scores nothing"),
        ({"served": None}, "it was not asked for over HTTP"),
    ],
)
def test_what_cannot_be_measured_says_why(bank, memory, message, model, fake_embed, change, reason):
    found = why(message.model_copy(update=change), TASK, ROLE, bank, fake_embed, Remade(memory), model)
    assert (found.carried, found.unmeasured) == (None, reason)
    assert len(found.sources) == len(message.model_copy(update=change).recalled.sources)


def test_a_memory_that_is_not_served_any_more_leaves_the_sources(bank, message, model, fake_embed):
    found = why(message, TASK, ROLE, bank, fake_embed, Gone(), model)
    assert found.unmeasured == "this server has no memory of kind 'latent' now"
    assert all(source.similarity is not None for source in found.sources)
