"""`latentmem engine`: start a server that samples for the agents, and check it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.cli.arguments import count, takes_config

if TYPE_CHECKING:
    from latentmem.cli.arguments import Commands


def add_commands(commands: "Commands") -> None:
    """Add the command `engine` and its subcommands."""
    engine = commands.add_parser("engine", help="servers of vLLM that sample for the agents")
    kinds = engine.add_subparsers(required=True, metavar="WHAT")
    text = "start a server for the model of a configuration, at an address of model.engine.urls"
    start = kinds.add_parser("start", help=text, description=text)
    takes_config(start)
    start.add_argument("--print", action="store_true", help="print the command instead of running it")
    start.add_argument(
        "--venv", type=Path, default=Path(".vllm"), metavar="DIR", help="virtual environment of vLLM (default .vllm)"
    )
    start.add_argument("--number", type=count, default=1, metavar="N", help="which of the addresses (default 1)")
    start.add_argument(
        "--max-model-len",
        type=count,
        metavar="N",
        help="longest prompt with latents and response, in tokens (default: the model's window, at most 8192)",
    )
    start.set_defaults(run=_start)
    text = "compare what servers answer with what the model computes here"
    check = kinds.add_parser("check", help=text, description=text)
    takes_config(check)
    check.set_defaults(run=_check)


def _start(options: argparse.Namespace) -> None:
    from latentmem.config import load_config

    config = load_config(options.config, options.overrides)
    from latentmem.recipes.engine import start_engine

    start_engine(config, options.venv, options.number, options.max_model_len, options.print)


def _check(options: argparse.Namespace) -> None:
    from latentmem.config import load_config

    config = load_config(options.config, options.overrides)
    from latentmem.recipes.engine import check_engine

    check_engine(config)
