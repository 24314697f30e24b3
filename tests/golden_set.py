"""The numbers that the original computed on a tiny model (`../shared/golden/reference-a`), and ours with its weights.

Its README describes every file. Texts are read there at run time; none enters the project.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from latentmem.memory.composer import Composer
from latentmem.models.assets import quiet_loading
from latentmem.models.language_model import LanguageModel
from latentmem.templates import fill
from latentmem.training.scoring import Example, score_all
from latentmem.trajectory import Message, Recalled, Step, Task, Trajectory

LARGE = 10**6
"""A budget that one micro-batch never fills."""
PLACEHOLDER = "<|Memory_Empty|>"
"""What the original's rollout stores in a message instead of the memory that it composed from."""
EOS = 2

_LM = "weaver.model.base_model.model."


def our_name(name: str) -> str:
    """The name in `Composer.trainable` of a tensor of the original's checkpoint or gradients."""
    name = name.removeprefix("centralized_memory.")
    if name.startswith(_LM):
        return "lora." + name.removeprefix(_LM).replace(".default.", ".")
    return name.replace("weaver2agent_proj", "projection").removeprefix("weaver.")


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def plain_logps(
    model: PreTrainedModel,
    prompt: Sequence[int],
    latents: Tensor,
    response: Sequence[int],
    temperature: float = 1.0,
    cut: int = 0,
) -> Tensor:
    """One message in one pass over its whole sequence but the first `cut` positions: no cache, no mask, no batch."""
    embed = model.get_input_embeddings()
    sequence = torch.cat([embed(torch.tensor(prompt)), latents, embed(torch.tensor(response))])[cut:]
    with torch.no_grad():
        logits = model(inputs_embeds=sequence[None]).logits[0, -len(response) - 1 : -1]
    logps: Tensor = (logits / temperature).log_softmax(1).gather(1, torch.tensor(response)[:, None])[:, 0]
    return logps


def success(task: Task, said: str) -> Trajectory:
    """A solved episode of one message."""
    message = Message(
        role="assistant agent",
        system="",
        user=task.text,
        response=said,
        token_ids=(),
        logps=(),
        finish="stop",
        temperature=1.0,
        num_prompt_tokens=0,
        recalled=Recalled(kind="none"),
    )
    step = Step(messages=(message,), action=said, observation="")
    return Trajectory(task=task, team="autogen", model="golden", steps=(step,), reward=1.0, success=True, seed=0)


class Golden:
    """The original's files, and our composer and agents with its weights."""

    def __init__(
        self, shared: Path, dtype: torch.dtype = torch.float32, control_tokens: bool = False, device: str = "cpu"
    ) -> None:
        """Load everything.

        Args:
            shared: the folder of shared data; the test is skipped where the golden numbers are not in it.
            dtype: of our models.
            control_tokens: encode texts for the composer as the original does: a control token that is written in a
                task or trajectory becomes one. Ours never does that; so the seam is the tokenizer, and what follows
                it is our own code.
            device: of our models.
        """
        self.folder = shared / "golden" / "reference-a"
        if not self.folder.is_dir():
            pytest.skip(f"no golden numbers at {self.folder}")
        config = self.json("meta")["config"]
        self.model = LanguageModel.from_pretrained(str(self.folder / "model"), device, "float32")
        self.model.model.to(dtype)
        self.base = {name: parameter.detach().clone() for name, parameter in self.model.model.named_parameters()}
        self.composer = Composer(
            self.model,
            num_latents=config["latents"],
            rank=config["r"],
            alpha=float(config["alpha"]),
            target_modules=config["tm"],
        )
        self.checkpoint = load_file(self.folder / "checkpoint" / "model.safetensors")
        found = {our_name(name): tensor for name, tensor in self.checkpoint.items()}
        with torch.no_grad():
            for name, parameter in self.composer.trainable().items():
                parameter.copy_(found[name])
        if control_tokens:
            self.model.encode = self.encode_with_control_tokens  # type: ignore[method-assign]

    def json(self, name: str) -> Any:
        """The content of a JSON file."""
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def numbers(self, name: str) -> dict[str, Tensor]:
        """The arrays of an npz file."""
        with np.load(self.folder / f"{name}.npz") as file:
            return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}

    def encode_with_control_tokens(self, text: str) -> list[int]:
        """Token ids as the original makes them."""
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def plain_model(self) -> PreTrainedModel:
        """The agents' model as transformers loads it, without anything of ours."""
        with quiet_loading():
            return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32).eval()

    def composer_text(self, message: dict[str, Any]) -> str:
        """What the original composes from when it updates on a message: from the memory that was stored with it."""
        fields = message["user_prompt_fields"]
        said = fields.get("extra_fields", {}).get("agent_responses", "")
        return self.written(fields["task_description"], message["state"]["role"], fields["memory_content"], said)

    def written(self, task: str, role: str, memory: str | None, said: str) -> str:
        """The original's composer text; it has one form with what the role said, and one without."""
        case = self.json("composer")[6 if said else 3]
        template: str = case["prompt"]
        for field in ("agent_responses", "task", "text_memory", "role"):
            template = template.replace(str(case[field]) or "\0", f"{{{field}}}")
        return fill(template, task=task, role=role, text_memory=str(memory), agent_responses=said)

    def chat(self, message: dict[str, Any]) -> tuple[str, str]:
        """System and user text of a message, where the placeholder stands for its memory."""
        user = {**message["user_prompt_fields"], "memory_content": PLACEHOLDER}
        return (
            message["system_prompt_template"].format(**message["system_prompt_fields"]),
            message["user_prompt_template"].format(**user),
        )

    def examples(self) -> list[Example]:
        """The messages of `messages.json`, from the original's token ids, at temperature 1."""
        numbers = self.numbers("logps")
        return [
            Example(
                self.composer_text(message),
                tuple(numbers[f"prompt_ids_{i}"].tolist()),
                tuple(numbers[f"response_ids_{i}"].tolist()),
                1.0,
            )
            for i, message in enumerate(self.json("messages"))
        ]

    def lmpo_examples(self) -> list[list[Example]]:
        """The LMPO batch: for each agent, in the order of updates, its 8 messages."""
        batch, numbers = self.json("lmpo_messages"), self.numbers("lmpo")
        return [
            [
                Example(
                    self.composer_text(message),
                    tuple(self.model.encode_prompt(*self.chat(message))),
                    tuple(numbers[f"labels/{k}"][i][numbers[f"mask/{k}"][i]].tolist()),
                    1.0,
                )
                for i, message in enumerate(batch["messages"][role])
            ]
            for k, role in enumerate(batch["agent_order"])
        ]

    def logps(self, examples: list[Example], budget: int = LARGE) -> list[Tensor]:
        """Our log-probabilities of the examples' tokens."""
        found: dict[int, Tensor] = {}
        for rows, logps, mask in score_all(self.composer, self.model, examples, budget):
            found |= {row: logps[i, mask[i]] for i, row in enumerate(rows)}
        return [found[row] for row in range(len(examples))]

    def take_gradients(self) -> dict[str, Tensor]:
        """Those of the composer's parameters, by our names; they are cleared."""
        found = {}
        for name, parameter in self.composer.trainable().items():
            assert parameter.grad is not None
            found[name], parameter.grad = parameter.grad, None
        return found
