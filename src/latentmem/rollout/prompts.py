"""What an agent reads and what is kept of its response: a call and a recall make a prompt, and then a message."""

import hashlib
import re
from collections.abc import Sequence

from torch import Tensor

from latentmem.memory.memory import Recall
from latentmem.models.agent import Prompt, Sampled
from latentmem.teams.turn import Call, ServedCall
from latentmem.trajectory import Message, Served, Task

LOOKED_BACK = 64
"""How many earlier messages a prompt is searched for."""


def prompt_of(call: Call, recall: Recall, group: str, seed: int, owner: str = "") -> Prompt:
    """Return the prompt of a call, with the memory in it; what is read of it serves its owner's prompts alone."""
    served = call.served
    memory = "" if recall.record.num_latents else recall.record.text
    return Prompt(
        role=call.role.name,
        system=call.system,
        user=recall.record.before(call.user),
        group=group,
        seed=seed,
        latents=recall.latents,
        adapter=recall.adapter,
        conversation=None if served is None else served.conversation.before(memory),
        limit=None if served is None else served.limit,
        stop=() if served is None else served.stop,
        on_tokens=None if served is None else served.on_tokens,
        owner=owner,
    )


def message_of(call: Call, sampled: Sampled, recall: Recall, temperature: float) -> Message:
    """Return the message that answers a call."""
    served = call.served
    return Message(
        role=call.role.name,
        system=call.system,
        user=call.user,
        response=sampled.text,
        token_ids=sampled.token_ids,
        logps=sampled.logps,
        finish=sampled.finish,
        temperature=temperature,
        num_prompt_tokens=sampled.num_prompt_tokens,
        reads=call.reads,
        recalled=recall.record,
        served=None if served is None else _served(served, sampled, recall),
    )


def _served(asked: ServedCall, sampled: Sampled, recall: Recall) -> Served:
    return Served(
        call=asked.call,
        conversation=asked.conversation,
        prompt_ids=sampled.prompt_ids,
        lineage=asked.lineage,
        weights=sampled.weights,
        composer=recall.composer,
        latents="" if recall.latents is None else digest_of(recall.latents),
    )


def digest_of(latents: Tensor) -> str:
    """Return a hash of latents [K, d_agent]."""
    return hashlib.sha256(latents.float().cpu().numpy().tobytes()).hexdigest()[:32]


def group_of(task: Task, role: str) -> str:
    """Name the prompts of one role at one task, which begin alike; errors show this name."""
    return f"task {_label(task)}, {role}"


def _label(task: Task) -> str:
    """Describe the task in a few words, for errors; a task without an id by the beginning of its text."""
    text = " ".join(task.text.split())
    return task.key if task.id is not None else repr(text if len(text) <= 60 else f"{text[:60]}...")


def read_by(asked: str, earlier: Sequence[Message], shown: str) -> tuple[int, ...]:
    """Return the positions of the earlier messages whose responses a prompt quotes word for word.

    Args:
        asked: the prompt.
        earlier: the messages before it; the last `LOOKED_BACK` are looked at.
        shown: what a prompt may quote without having read a message, such as the task.
    """
    first = max(0, len(earlier) - LOOKED_BACK)
    return tuple(
        first + i
        for i, message in enumerate(earlier[first:])
        if _quotes(asked, message.response) and not _quotes(shown, message.response)
    )


def _quotes(text: str, response: str) -> bool:
    said = response.strip()
    return bool(said) and said in text and re.search(rf"(?<!\w){re.escape(said)}(?!\w)", text) is not None
