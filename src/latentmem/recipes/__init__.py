"""The recipes: each builds one phase of an experiment from a whole configuration, and runs it.

Only these modules see a whole configuration and choose parts by name. They build the parts from their sections and run
them.
"""

from latentmem.recipes.collecting import collect
from latentmem.recipes.evaluate import compare, play_test
from latentmem.recipes.main_path import quickstart
from latentmem.recipes.parts import Parts, Shared
from latentmem.recipes.phase import trainings, what_decides
from latentmem.recipes.plan import Planner
from latentmem.recipes.prompts import show_prompts
from latentmem.recipes.readings import show_latents
from latentmem.recipes.train import train_grpo, train_lmpo, train_sft, train_warmup

__all__ = [
    "Parts",
    "Planner",
    "Shared",
    "collect",
    "compare",
    "play_test",
    "quickstart",
    "show_latents",
    "show_prompts",
    "train_grpo",
    "train_lmpo",
    "train_sft",
    "train_warmup",
    "trainings",
    "what_decides",
]
