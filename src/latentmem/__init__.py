"""LatentMem: a learnable memory for teams of LLM agents, composed into latent tokens for each role and task.

Names are imported when first asked for, so `import latentmem` loads no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmem.bank import ExperienceBank
    from latentmem.environments.environment import Domain, Environment, Outcome
    from latentmem.errors import LatentMemError
    from latentmem.evaluation import evaluate
    from latentmem.memory.composer import Composer
    from latentmem.memory.latent import LatentMemory
    from latentmem.memory.memory import Memory, NoMemory, Recall
    from latentmem.memory.text import TextMemory
    from latentmem.models.language_model import LanguageModel, ScriptedModel
    from latentmem.rollout import rollout
    from latentmem.teams.turn import Team
    from latentmem.training.lmpo import LMPOTrainer
    from latentmem.training.losses import lmpo_loss
    from latentmem.training.sft import SFTTrainer
    from latentmem.trajectory import Message, Role, Step, Task, Trajectory

__all__ = [
    "Composer",
    "Domain",
    "Environment",
    "ExperienceBank",
    "LMPOTrainer",
    "LanguageModel",
    "LatentMemError",
    "LatentMemory",
    "Memory",
    "Message",
    "NoMemory",
    "Outcome",
    "Recall",
    "Role",
    "SFTTrainer",
    "ScriptedModel",
    "Step",
    "Task",
    "Team",
    "TextMemory",
    "Trajectory",
    "evaluate",
    "lmpo_loss",
    "rollout",
]

_HOMES = {
    "Composer": "memory.composer",
    "Domain": "environments.environment",
    "Environment": "environments.environment",
    "ExperienceBank": "bank",
    "LMPOTrainer": "training.lmpo",
    "LanguageModel": "models.language_model",
    "LatentMemError": "errors",
    "LatentMemory": "memory.latent",
    "Memory": "memory.memory",
    "Message": "trajectory",
    "NoMemory": "memory.memory",
    "Outcome": "environments.environment",
    "Recall": "memory.memory",
    "Role": "trajectory",
    "SFTTrainer": "training.sft",
    "ScriptedModel": "models.language_model",
    "Step": "trajectory",
    "Task": "trajectory",
    "Team": "teams.turn",
    "TextMemory": "memory.text",
    "Trajectory": "trajectory",
    "evaluate": "evaluation",
    "lmpo_loss": "training.losses",
    "rollout": "rollout",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # from now on it is found without asking here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `latentmem.rollout` the function: importing the module of that name would otherwise put itself there."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = isinstance(value, ModuleType) and name in _HOMES
        super().__setattr__(name, getattr(value, name) if is_module else value)


sys.modules[__name__].__class__ = _Package
