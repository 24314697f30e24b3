"""Stand-ins at both ends of a program: a model that says what is scripted and keeps its prompts, and a memory."""

import json
from threading import Lock
from types import SimpleNamespace

import torch

from latentmem import Outcome, Recall, Recalled
from latentmem.memory.memory import Recalls
from latentmem.models.agent import Sampled
from latentmem.models.chat_forms import begun_call

PLACE = "You have reached the Crimson Mill."
ARGUMENTS = {"kind_of_place": {"name": "the Crimson Mill"}, "ask_porter": {"input": "The Crimson Mill?"}}
"""What the tools of the programs are called with."""
WORDS = {"scout": "corn", "porter": "lion"}


class Talker:
    """A model that calls the tool it is given, once, and then says its role's word; `final_answer` if it has to."""

    name = "served"
    concurrent = True
    chat = SimpleNamespace(
        tool_form="hermes", said=lambda token_ids: bytes(i for i in token_ids if i < 256).decode("utf-8", "replace")
    )

    def __init__(self, finish="stop"):
        self.finish = finish
        self.prompts = []
        self._lock = Lock()

    def respond(self, prompts, sampling):
        with self._lock:
            self.prompts += prompts
        return [self._said(prompt) for prompt in prompts]

    def _said(self, prompt):
        text, begun = self._text(prompt), begun_with(prompt.conversation)
        text = text[text.index(begun) + len(begun) :]
        ids = (*text.encode(), 256) if self.finish == "stop" else tuple(text.encode())
        for i in range(0, len(ids), 2):
            assert prompt.on_tokens is None or prompt.on_tokens(ids[i : i + 2])
        logps = tuple(-0.5 for _ in ids)
        return Sampled(text, ids, logps, self.finish, num_prompt_tokens=7, prompt_ids=(1, 2, 3), weights="w")

    def _text(self, prompt):
        names = {tool["function"]["name"] for tool in prompt.conversation.tools}
        has_seen = any(results_in(message) for message in prompt.conversation.messages)
        first = next((name for name in ARGUMENTS if name in names), None)
        if first is not None and not has_seen:
            return f"I look. {call_of(first, ARGUMENTS[first])}"
        (word,) = [word for name, word in WORDS.items() if name in prompt.system]
        if "final_answer" in names:
            return call_of("final_answer", {"answer": word})
        return word


def begun_with(conversation):
    """What the prompt has begun a response with that has to call a tool; the model goes on from there."""
    names = [tool["function"]["name"] for tool in conversation.tools]
    return begun_call("hermes", conversation.must_call, names)


def call_of(name, arguments):
    """A call of a tool, as a model of the Hermes family writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def results_in(message):
    """Whether a message tells what a tool has returned: smolagents tells it as the user."""
    return message["role"] == "tool" or (message["role"] == "user" and "Observation:" in json.dumps(message))


class RoleLatents:
    """A memory of other latents for each role."""

    kind = "latent"

    def recall_many(self, queries):
        return Recalls([self.recall(task, role) for task, role in queries])

    def recall(self, task, role):
        record = Recalled(
            kind="latent", text=f"{task.text} {role.name}: {role.profile}", sources=("t1",), num_latents=2
        )
        return Recall(record, torch.full((2, 3), float(len(role.name))), composer="c")

    def add(self, trajectory):
        raise AssertionError("nothing is learnt here")


class BothWords:
    """Pays if the scout's word and then the porter's were said."""

    instructions = "Say two words."

    def step(self, action):
        right = action.split() == list(WORDS.values())
        return Outcome("", float(right), True, {"extracted": action})
