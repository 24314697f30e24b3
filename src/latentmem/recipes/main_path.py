"""The main path, read from top to bottom: collect -> warm-up -> SFT -> LMPO -> evaluate -> report."""

from collections.abc import Callable

from latentmem.config import Config
from latentmem.recipes.collecting import collect
from latentmem.recipes.evaluate import compare
from latentmem.recipes.parts import Parts
from latentmem.recipes.phase import prepare, say_once
from latentmem.recipes.train import train_lmpo, train_sft, train_warmup


def quickstart(config: Config) -> None:
    """Run the whole main path; its phases share the model, the embedder and the bank."""
    parts = prepare(config)
    phases: list[tuple[str, Callable[[Config, Parts], object]]] = [
        ("collect: the team plays without memory; the bank fills", collect),
        ("warmup: the agents learn to read a slot, whatever word is in it", train_warmup),
        ("sft: the composer learns from right responses", train_sft),
        ("lmpo: the composer learns from the team's reward", train_lmpo),
        ("evaluate: memories compared on held-out tasks", compare),
    ]
    for title, recipe in phases:
        if recipe is train_warmup and "warmup" not in (config.sft.initial, config.lmpo.initial):
            continue
        say_once(f"\n== {title}")
        recipe(config, parts)
