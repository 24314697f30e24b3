"""The public names and where they live: the one list, read by type checkers and when the package is imported."""

from .bank import ExperienceBank as ExperienceBank
from .environments.environment import Domain as Domain
from .environments.environment import Environment as Environment
from .environments.environment import Outcome as Outcome
from .errors import LatentMemError as LatentMemError
from .evaluation import evaluate as evaluate
from .memory.composer import Composer as Composer
from .memory.latent import LatentMemory as LatentMemory
from .memory.memory import Memory as Memory
from .memory.memory import NoMemory as NoMemory
from .memory.memory import Recall as Recall
from .memory.text import TextMemory as TextMemory
from .models.language_model import LanguageModel as LanguageModel
from .models.language_model import ScriptedModel as ScriptedModel
from .rollout import rollout as rollout
from .teams.turn import Team as Team
from .training.lmpo import LMPOTrainer as LMPOTrainer
from .training.losses import lmpo_loss as lmpo_loss
from .training.sft import SFTTrainer as SFTTrainer
from .trajectory import Message as Message
from .trajectory import Role as Role
from .trajectory import Step as Step
from .trajectory import Task as Task
from .trajectory import Trajectory as Trajectory
