"""A session's calls again, with and without memory."""

import doctest

import torch

from latentmem.memory.memory import Recall
from latentmem.models.agent import ScriptedModel
from latentmem.models.language_model import LanguageModel
from latentmem.serving.rights import replay as room
from latentmem.serving.rights.replay import Part, replay
from latentmem.trajectory import Conversation, Message, Recalled, Served

CHAT = Conversation(messages=({"role": "user", "content": "What is 12 + 7?"},))


def message(recalled, call="call-1", served=True):
    return Message(
        role="solver", system="", user=CHAT.user, response="then", token_ids=(1,), logps=(0.0,), finish="stop",
        temperature=1.0, num_prompt_tokens=3, recalled=recalled,
        served=Served(call=call, conversation=CHAT, prompt_ids=(), lineage="0") if served else None,
    )  # fmt: skip


TEXT = Recalled(kind="text", text="Remember: 19.", sources=("a",))
LATENT = Recalled(kind="latent", text="composed of this", sources=("b",), num_latents=3)


class Again:
    def __init__(self, latents):
        self.latents = latents

    def again(self, record, composer):
        return Recall(record, self.latents if record.num_latents else None)


class Texts:
    """Serves memories that are text alone."""

    def again(self, record, composer):
        return None if record.num_latents else Recall(record)


def test_both_are_sampled_greedily_from_the_conversation_that_was_sent():
    model = ScriptedModel({"solver": ["it is 19", "it is 20, no doubt"]})
    (found,) = replay([message(TEXT)], model, Texts(), limit=50, tenant="acme")
    assert {prompt.owner for prompt in model.prompts} == {"acme"}  # what is read of them serves nobody else
    assert [prompt.conversation.user for prompt in model.prompts] == ["Remember: 19.\n\nWhat is 12 + 7?", CHAT.user]
    assert (found.with_memory.text, found.without_memory.text) == ("it is 19", "it is 20, no doubt")
    assert found.with_memory.num_tokens == 9  # bytes, and the end
    assert found.first_difference == 6
    assert found.difference == (
        Part("both", "it is"),
        Part("with memory", "19"),
        Part("without memory", "20, no doubt"),
    )
    assert (found.call, found.recorded, found.sources) == ("call-1", "then", ("a",))


def test_equal_responses_have_no_difference():
    model = ScriptedModel({"solver": ["19"]})
    (found,) = replay([message(TEXT)], model, Texts(), limit=50, tenant="acme")
    assert found.first_difference is None
    assert found.difference == (Part("both", "19"),)


def test_calls_without_memory_or_of_a_memory_that_is_gone_are_left_out():
    model = ScriptedModel({"solver": ["19"]})
    asked = [message(Recalled(kind="none")), message(TEXT, served=False), message(LATENT), message(TEXT, "call-4")]
    assert [found.call for found in replay(asked, model, Texts(), limit=5, tenant="acme")] == ["call-4"]
    assert replay(asked[:3], model, Texts(), limit=5, tenant="acme") == []


def test_it_is_told_what_was_left_out():
    gone = Recalled(kind="text", text="", sources=("a",))
    none = message(Recalled(kind="none"))
    assert room.left_out([none]) == "no call of this session had a memory; nothing to replay"
    assert room.left_out([message(gone), none]) == "the memory of 1 call was forgotten; nothing to replay"
    assert room.left_out([message(gone)] * 2) == "the memory of 2 calls was forgotten; nothing to replay"
    assert room.left_out([message(gone), message(TEXT)]) == "the memory of 1 call was forgotten"
    assert room.left_out([message(TEXT), none]) is None


def test_latents_are_made_again_and_greedy_decoding_agrees_with_a_pass_written_out(tiny_model_dir):
    model = LanguageModel.from_pretrained(str(tiny_model_dir), device="cpu", fused="never")
    latents = torch.randn(3, model.width, generator=torch.Generator().manual_seed(1))
    (found,) = replay([message(LATENT)], model, Again(latents), limit=4, tenant="acme")

    def slow(extra):
        embed = model.model.get_input_embeddings()
        rows = torch.cat([embed(torch.tensor(model.chat.encode_conversation(CHAT))), *extra])
        ids = []
        with torch.no_grad():
            while len(ids) < 4 and (not ids or ids[-1] not in model.eos_ids):
                ids.append(int(model.model(inputs_embeds=rows[None]).logits[0, -1].argmax()))
                rows = torch.cat([rows, embed(torch.tensor(ids[-1:]))])
        return model.decode(ids).strip(), len(ids)

    assert (found.with_memory.text, found.with_memory.num_tokens) == slow([latents])
    assert (found.without_memory.text, found.without_memory.num_tokens) == slow([])


def test_no_more_than_a_number_of_calls_is_sampled(monkeypatch):
    monkeypatch.setattr(room, "MAX_CALLS", 2)
    model = ScriptedModel({"solver": ["19"]})
    assert len(replay([message(TEXT)] * 5, model, Texts(), limit=5, tenant="acme")) == 2
    assert len(model.prompts) == 4


def test_the_example_of_the_difference_holds():
    assert doctest.testmod(room).failed == 0
