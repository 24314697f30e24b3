"""The commands of an experiment: each reads a configuration or run folders, and calls one recipe."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.cli.arguments import count, positive, takes_config, takes_overrides

if TYPE_CHECKING:
    from latentmem.cli.arguments import Commands
    from latentmem.config import Config


def add_commands(commands: "Commands") -> None:
    """Add the commands quickstart, plan, collect, train, evaluate, show and report."""
    quickstart = commands.add_parser("quickstart", help="collect, train and evaluate with the embedded model, offline")
    quickstart.add_argument("--short", action="store_true", help="the same path in a fraction of the time, for checks")
    quickstart.add_argument("--reasoning", action="store_true", help="small number tasks in place of hidden facts")
    takes_overrides(quickstart)
    quickstart.set_defaults(run=_quickstart, recipe="quickstart")

    plan = commands.add_parser("plan", help="tell what memory, disk and network a run takes; nothing is run or loaded")
    takes_config(plan)
    plan.add_argument(
        "--prompt-tokens",
        type=count,
        metavar="N",
        help="longest prompt of an agent (default: the longest in the run's bank, or 512)",
    )
    plan.add_argument(
        "--composer-tokens",
        type=count,
        metavar="N",
        help="longest text of the composer (default: composer.max_prompt_tokens)",
    )
    plan.add_argument("--processes", type=count, default=1, metavar="N", help="processes launched together (default 1)")
    plan.add_argument("--fit", type=positive, metavar="GIB", help="say whether it fits this memory, and what to lower")
    plan.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    plan.set_defaults(run=_plan)

    collect = commands.add_parser("collect", help="play the experience split, else the train split, and fill the bank")
    takes_config(collect)
    collect.set_defaults(run=_run_recipe, recipe="collect")

    train = commands.add_parser("train", help="train the composer, or its rival, the agents themselves")
    trainers = train.add_subparsers(required=True, metavar="TRAINER")
    for name, text in (
        ("warmup", "the composer: learn to pass words on, before any data"),
        ("sft", "the composer: warm start on the bank's successes"),
        ("lmpo", "the composer: learn from the team's reward"),
        ("grpo", "the agents: learn from the team's reward in a LoRA of their own, without memory"),
    ):
        trainer = trainers.add_parser(name, help=text, description=text)
        takes_config(trainer)
        trainer.set_defaults(run=_run_recipe, recipe=name)

    evaluate = commands.add_parser(
        "evaluate", help="compare memories on the test or dev split, or in a whole grid of runs"
    )
    takes_config(evaluate)
    evaluate.set_defaults(run=_evaluate)

    show = commands.add_parser("show", help="show exactly what the agents read, and what latents say")
    shown = show.add_subparsers(required=True, metavar="WHAT")
    for name, text, default, run in (
        (
            "prompts",
            "play one task and print each agent's prompt; nothing is stored",
            "latent:untrained if there is a bank, else none",
            _show_prompts,
        ),
        (
            "latents",
            "play one task and print what each latent says, said before training, and does; nothing is stored",
            "the latent memory of the run that is furthest trained",
            _show_latents,
        ),
    ):
        parser_of = shown.add_parser(name, help=text, description=text)
        takes_config(parser_of)
        parser_of.add_argument("--task", type=count, default=1, metavar="N", help="its number in the split (default 1)")
        parser_of.add_argument(
            "--split",
            choices=("experience", "train", "dev", "test"),
            default="train",
            help="whose task (default train)",
        )
        parser_of.add_argument("--memory", metavar="NAME", help=f"as in evaluate.memories (default: {default})")
        parser_of.set_defaults(run=run)

    report = commands.add_parser("report", help="tables and plots of runs: an HTML page, PNG and JSON")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    report.add_argument("--out", type=Path, help="folder to write to; default is RUN/report")
    report.set_defaults(run=_report)


def _quickstart(options: argparse.Namespace) -> None:
    options.config = f"{'reasoning-' * options.reasoning}quickstart{'-short' * options.short}"
    _run_recipe(options)


def _run_recipe(options: argparse.Namespace) -> None:
    from latentmem.config import load_config

    config = load_config(options.config, options.overrides)  # before torch loads, so that a typing error shows at once
    from latentmem.cli.early import check_run

    check_run(config, options.recipe)
    from latentmem import recipes

    chosen: dict[str, Callable[[Config], object]] = {
        "quickstart": recipes.quickstart,
        "collect": recipes.collect,
        "warmup": recipes.train_warmup,
        "sft": recipes.train_sft,
        "lmpo": recipes.train_lmpo,
        "grpo": recipes.train_grpo,
    }
    chosen[options.recipe](config)


def _plan(options: argparse.Namespace) -> None:
    from latentmem.config import load_config

    config = load_config(options.config, options.overrides)
    from latentmem.recipes import Planner

    planner = Planner(config, options.prompt_tokens, options.composer_tokens, options.processes)
    plan = planner.plan()
    told = None if options.fit is None else planner.to_fit(round(options.fit * 2**30))
    if options.json:
        print(plan.as_json(told))
        return
    print(plan.table())
    if told is not None:
        print(f"\n{told}")


def _evaluate(options: argparse.Namespace) -> None:
    from latentmem.config import parse_config, read_values

    values = read_values(options.config, options.overrides)
    if "grid" in values:
        from latentmem.grid.file import load_grid

        grid = load_grid(values, options.config)  # before torch loads, as in _run_recipe
        from latentmem.grid.play import play_grid

        play_grid(grid)
        return
    config = parse_config(values, options.config)
    from latentmem.cli.early import check_run

    check_run(config, "evaluate")
    from latentmem.recipes import compare

    compare(config)


def _show_prompts(options: argparse.Namespace) -> None:
    config = _config_to_show(options)
    from latentmem.recipes import show_prompts

    show_prompts(config, options.split, options.task, options.memory)


def _show_latents(options: argparse.Namespace) -> None:
    config = _config_to_show(options)
    from latentmem.recipes import show_latents

    show_latents(config, options.split, options.task, options.memory)


def _config_to_show(options: argparse.Namespace) -> "Config":
    from latentmem.config import load_config

    named = [] if options.memory is None else [f"evaluate.memories={json.dumps([options.memory])}"]
    return load_config(options.config, [*options.overrides, *named])  # this refuses an unknown memory


def _report(options: argparse.Namespace) -> None:
    grids = [folder for folder in options.runs if (folder / "grid.json").exists()]
    if not grids:
        from latentmem.report import write_report

        print(write_report(options.runs, options.out))
        return
    from latentmem.errors import RunError

    if len(options.runs) > 1:
        raise RunError(f"{grids[0]}: is a grid; report it alone, or name the runs in its cells/")
    from latentmem.grid.report import write_page

    print(write_page(grids[0], options.out))
