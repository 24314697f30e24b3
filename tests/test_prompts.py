"""The page of prompts shows what an agent read, of a chat of any form too."""

from pathlib import Path

import pytest
import torch

from latentmem.config import Sampling
from latentmem.latent_reading import leave_out_each
from latentmem.memory.memory import Recall
from latentmem.models.agent import Prompt
from latentmem.models.language_model import LanguageModel
from latentmem.prompts import format_prompts
from latentmem.rollout.prompts import message_of, prompt_of
from latentmem.teams.turn import Call, ServedCall
from latentmem.trajectory import Conversation, Message, Recalled, Role, Step, Task, Trajectory

CHAT = Conversation(
    messages=(
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    )
)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(str(tiny_model_dir), "cpu")


def asked(model: LanguageModel, recall: Recall) -> Message:
    """A message that a program asked for."""
    call = Call(
        role=Role(name="adder", profile="Adds."),
        system=CHAT.system,
        user=CHAT.user,
        served=ServedCall(call="c1", conversation=CHAT, lineage="l"),
    )
    (sampled,) = model.respond([prompt_of(call, recall, "g", 0)], Sampling(temperature=0, max_response_tokens=4))
    return message_of(call, sampled, recall, 0.0)


def episode(message: Message) -> Trajectory:
    return Trajectory(
        task=Task(id="1", domain="d", text="1 + 1?"),
        team="program",
        model="tiny",
        steps=(Step(messages=(message,), action="2", observation=""),),
        reward=0.0,
        success=False,
        seed=0,
    )


def test_a_served_chat_is_shown_as_the_model_read_it(model: LanguageModel) -> None:
    message = asked(model, Recall(Recalled(kind="text", text="Once upon a time.")))
    read = model.spell(model.chat.encode_conversation(CHAT.before("Once upon a time.")))
    page = format_prompts(model, episode(message))
    assert read in page
    assert page.count("Once upon a time.") == 1
    assert ", cut by the limit" in page or message.finish == "stop"
    cut = format_prompts(model, episode(message.model_copy(update={"finish": "cut"})))
    assert "tokens, cut at a text to stop at" in cut


def test_a_served_message_is_asked_for_again_with_its_own_chat(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    message = asked(model, Recall(Recalled(kind="latent", text="past", num_latents=2), latents))
    seen: list[Prompt] = []
    respond = model.respond
    monkeypatch.setattr(model, "respond", lambda prompts, sampling: seen.extend(prompts) or respond(prompts, sampling))
    assert len(leave_out_each(model, message, latents, 3)) == 2
    assert [model.prompt_ids(prompt) for prompt in seen] == [model.chat.encode_conversation(CHAT)] * 2
