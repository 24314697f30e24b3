"""Words on the command line become one call of a recipe. Loads no torch before a command needs it.

A user's mistake is one line on standard error and exit status 2; anything else is our bug and keeps its traceback.
"""

import argparse
import errno
import json
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from latentmem.errors import LatentMemError

if TYPE_CHECKING:
    from latentmem.bank import ExperienceBank
    from latentmem.config import Config

CONFIG_HELP = "a YAML file, or the name of a packaged configuration"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    for noisy in ("httpx", "httpx2", "matplotlib", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        options.run(options)
        sys.stdout.flush()  # a reader that has gone away is noticed here, not at the interpreter's end
    except LatentMemError as error:
        print(f"latentmem: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        _give_up(sys.stdout)
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        with suppress(OSError):  # the log may be on that disk
            print(f"latentmem: {where}{error.strerror}; free some and run the same command again", file=sys.stderr)
        _give_up(sys.stdout, sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("latentmem: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _give_up(*streams: TextIO) -> None:
    """Let what is still buffered go nowhere; the interpreter would fail on it at its end."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="latentmem", description="A learnable latent memory for teams of LLM agents.")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is going on")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    quickstart = commands.add_parser("quickstart", help="collect, train and evaluate with the embedded model, offline")
    quickstart.add_argument("--short", action="store_true", help="the same path in a fraction of the time, for checks")
    quickstart.add_argument("--reasoning", action="store_true", help="small number tasks in place of hidden facts")
    _takes_overrides(quickstart)
    quickstart.set_defaults(run=_quickstart, recipe="quickstart")

    collect = commands.add_parser("collect", help="play the experience split, else the train split, and fill the bank")
    _takes_config(collect)
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
        _takes_config(trainer)
        trainer.set_defaults(run=_run_recipe, recipe=name)

    evaluate = commands.add_parser(
        "evaluate", help="compare memories on the test or dev split, or in a whole grid of runs"
    )
    _takes_config(evaluate)
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
        _takes_config(parser_of)
        parser_of.add_argument(
            "--task", type=_count, default=1, metavar="N", help="its number in the split (default 1)"
        )
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

    bank = commands.add_parser("bank", help="look into an experience bank, search, export, import, verify, delete")
    _bank_commands(bank.add_subparsers(required=True, metavar="WHAT"))

    checkpoint = commands.add_parser("checkpoint", help="look into a checkpoint, import released weights")
    _checkpoint_commands(checkpoint.add_subparsers(required=True, metavar="WHAT"))

    retriever = commands.add_parser("retriever", help="serve a corpus of passages in the Search-R1 protocol")
    _retriever_commands(retriever.add_subparsers(required=True, metavar="WHAT"))
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def _takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    _takes_overrides(parser)


def _takes_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, as in lmpo.group_size=8")


def _bank_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    def command(name: str, text: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=text)
        parser.add_argument("bank", type=Path, metavar="BANK", help="the bank's SQLite file")
        return parser

    command("info", "what is stored").set_defaults(run=_bank_info)
    search = command("search", "the trajectories nearest to a text")
    search.add_argument("text")
    search.add_argument("-k", type=_count, default=3, help="how many (default 3)")
    search.add_argument("--success", choices=("yes", "no"), help="only successful, or only failed, trajectories")
    search.add_argument("--domain", help="only this domain")
    search.add_argument("--role", help="only trajectories with this role")
    search.set_defaults(run=_bank_search)
    export = command("export", "write all trajectories as JSON Lines")
    export.add_argument("file", type=Path, help="where to write; - is standard output")
    export.set_defaults(run=_bank_export)
    importer = command("import", "add the trajectories of a JSON Lines file or of a released bank")
    importer.add_argument(
        "source", type=Path, metavar="SOURCE", help="JSON Lines of `bank export`, a Chroma folder, or its data.json"
    )
    importer.set_defaults(run=_bank_import)
    command("verify", "check every record and the index").set_defaults(run=_bank_verify)
    delete = command("delete", "delete the trajectories that meet all filters given")
    delete.add_argument("--success", choices=("yes", "no"))
    delete.add_argument("--domain")
    delete.add_argument("--role")
    delete.add_argument("--team")
    delete.set_defaults(run=_bank_delete)


def _checkpoint_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    info = commands.add_parser("info", help="settings, tensors and size")
    info.add_argument("folder", type=Path, metavar="FOLDER")
    info.set_defaults(run=_checkpoint_info)
    importer = commands.add_parser("import", help="make a checkpoint of weights laid out as the authors publish them")
    importer.add_argument(
        "source", type=Path, metavar="SOURCE", help="a .safetensors file, an index of shards, a folder"
    )
    importer.add_argument("--base", required=True, metavar="MODEL", help="the composer's base: folder or hub id")
    importer.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the checkpoint to write")
    importer.add_argument("--agents", metavar="MODEL", help="the model that is given the latents (default: the base)")
    importer.add_argument("--alpha", type=_positive, help="LoRA's alpha, which the file does not tell (default 32)")
    importer.add_argument(
        "--template", type=Path, metavar="FILE", help="the text that the weights were trained to read"
    )
    importer.add_argument("--max-prompt-tokens", type=_count, metavar="N", help="longest such text (default 1024)")
    importer.set_defaults(run=_checkpoint_import)


def _retriever_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser("serve", help="index a corpus, or find its index, and answer POST /retrieve")
    serve.add_argument("corpus", type=Path, metavar="CORPUS", help="JSON Lines: id and contents, or id, title and text")
    serve.add_argument(
        "--method", choices=("bm25", "dense", "both"), default="bm25", help="by words, by meaning, or both (bm25)"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=_port, default=8000, help="port to listen on, 0 for a free one (default 8000)")
    serve.add_argument("--index", type=Path, metavar="DIR", help="folder of the index (default CORPUS.index)")
    serve.add_argument("--embedder", default="all-minilm-l6-v2", metavar="MODEL", help="of dense search: folder or id")
    serve.add_argument(
        "--on-bad-row", choices=("error", "skip"), default="error", help="rows that are no passages (default error)"
    )
    serve.set_defaults(run=_retriever_serve)


def _quickstart(options: argparse.Namespace) -> None:
    options.config = f"{'reasoning-' * options.reasoning}quickstart{'-short' * options.short}"
    _run_recipe(options)


def _run_recipe(options: argparse.Namespace) -> None:
    from latentmem.config import load_config

    config = load_config(options.config, options.overrides)  # before torch: a typing error is told at once
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


def _evaluate(options: argparse.Namespace) -> None:
    from latentmem.config import parse_config, read_values

    values = read_values(options.config, options.overrides)
    if "grid" in values:
        from latentmem.grid.file import load_grid

        grid = load_grid(values, options.config)  # before torch, as below
        from latentmem.grid.play import play_grid

        play_grid(grid)
        return
    config = parse_config(values, options.config)
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
    return load_config(options.config, [*options.overrides, *named])  # which refuses a memory that is none


def _report(options: argparse.Namespace) -> None:
    grids = [folder for folder in options.runs if (folder / "grid.json").exists()]
    if not grids:
        from latentmem.report import write_report

        print(write_report(options.runs, options.out))
        return
    from latentmem.errors import RunError

    if len(options.runs) > 1:
        raise RunError(f"{grids[0]}: is a grid, which has a page of its own; name it alone, or the runs in its cells/")
    from latentmem.grid.report import write_page

    print(write_page(grids[0], options.out))


def _open_bank(path: Path, embed: bool = False, make: bool = False) -> "ExperienceBank":
    """The bank; with the embedder that filled it if `embed`, and a new one if there is none and `make`."""
    from latentmem.bank import ExperienceBank
    from latentmem.errors import BankError

    if not make and not path.is_file():
        raise BankError(f"{path}: no such bank; give the bank.sqlite of a run")
    if not embed:
        return ExperienceBank(path)
    from latentmem.config import BankSection

    filled_by = None
    if path.exists():
        with ExperienceBank(path) as bank:
            filled_by = bank.info().embedder
    from latentmem.models.embedder import Embedder

    embedder = Embedder(filled_by or BankSection().embedder)
    return ExperienceBank(path, embedder, embedder=embedder.name)


def _success(options: argparse.Namespace) -> bool | None:
    return None if options.success is None else options.success == "yes"


def _bank_info(options: argparse.Namespace) -> None:
    with _open_bank(options.bank) as bank:
        info = bank.info()
    reward = "" if info.mean_reward is None else f", mean reward {info.mean_reward:.3f}"
    print(f"{info.path}: {info.num_trajectories} trajectories, {info.num_successes} successes{reward}")
    print(f"created {info.created}, schema {info.schema_version}, {info.num_bytes / 2**20:.1f} MB")
    print(f"embedder {info.embedder}, width {info.width}" if info.embedder else "embedder: none yet")
    for label in ("domains", "teams", "models", "roles"):
        counts = getattr(info, label)
        if counts:
            print(f"{label}: {', '.join(f'{name} {count}' for name, count in counts.items())}")


def _bank_search(options: argparse.Namespace) -> None:
    from latentmem.trajectory import Task

    with _open_bank(options.bank, embed=True) as bank:
        task = Task(id=None, domain=options.domain or "", text=options.text)
        for hit in bank.search(task, k=options.k, success=_success(options), domain=options.domain, role=options.role):
            text = " ".join(hit.trajectory.task.text.split())[:100]
            print(f"{hit.similarity:.3f}  {hit.trajectory.id}  reward {hit.trajectory.reward:g}  {text}")


def _bank_export(options: argparse.Namespace) -> None:
    with _open_bank(options.bank) as bank:
        if str(options.file) == "-":
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
            bank.export(sys.stdout)
        else:
            print(f"{bank.export(options.file)} trajectories written to {options.file}")


def _bank_import(options: argparse.Namespace) -> None:
    from latentmem.errors import DataError

    if not options.source.exists():  # before a new bank is made for it
        raise DataError(
            f"{options.source}: no such file or folder; give the JSON Lines of `latentmem bank export`, "
            "or a released bank, as Chroma folder or data.json"
        )
    from latentmem.released import is_released_bank, read_bank

    released = read_bank(options.source) if is_released_bank(options.source) else None
    with _open_bank(options.bank, embed=True, make=True) as bank:
        added = bank.import_jsonl(options.source) if released is None else bank.add(released.trajectories)
    print(f"{added.num_added} trajectories added, {added.num_duplicates} were there already")
    if released is not None and released.unreadable:
        print(f"{len(released.unreadable)} entries could not be read:")
        for why, count in Counter(entry.why for entry in released.unreadable).most_common():
            first = next(entry.where for entry in released.unreadable if entry.why == why)
            print(f"{count:6} {why} (first: {first})")


def _bank_verify(options: argparse.Namespace) -> None:
    from latentmem.errors import BankError

    with _open_bank(options.bank) as bank:
        result = bank.verify()
    for problem in result.problems:
        print(f"{problem.kind}: {problem.where}: {problem.found}")
    print(f"{result.num_checked} trajectories checked, {len(result.problems)} problems")
    if not result.ok:
        raise BankError(f"{options.bank}: {len(result.problems)} problems; restore it from an export or a copy")


def _bank_delete(options: argparse.Namespace) -> None:
    from latentmem.errors import BankError

    filters = {"success": _success(options), "domain": options.domain, "role": options.role, "team": options.team}
    if all(value is None for value in filters.values()):
        raise BankError("bank delete needs a filter: --success, --domain, --role or --team")
    with _open_bank(options.bank) as bank:
        print(f"{bank.delete(**filters)} trajectories deleted")


def _checkpoint_info(options: argparse.Namespace) -> None:
    from latentmem.memory.checkpoints import NAMES, kind_of, read_checkpoint, weights_file

    kind = kind_of(options.folder)
    settings, tensors = read_checkpoint(options.folder, kind)
    print(f"{'kind':18} {NAMES[kind]!r}")
    for key, value in settings.items():
        print(f"{key:18} {value!r}")
    # Layers that differ by their number only are one line.
    kinds = Counter((re.sub(r"\.\d+\.", ".*.", name), str(list(tensor.shape))) for name, tensor in tensors.items())
    for (name, shape), count in sorted(kinds.items()):
        print(f"{count:4} x {shape:14} {name}")
    num_bytes = weights_file(options.folder, kind).stat().st_size
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{len(tensors)} tensors, {parameters:,} parameters, {num_bytes / 2**20:.1f} MB")


def _checkpoint_import(options: argparse.Namespace) -> None:
    template = None if options.template is None else _read_template(options.template)
    from latentmem.memory.checkpoints import write_checkpoint
    from latentmem.released import read_weights, sections

    weights = read_weights(
        options.source,
        options.base,
        agents=options.agents,
        alpha=options.alpha,
        template=template,
        max_prompt_tokens=options.max_prompt_tokens,
    )
    write_checkpoint(options.out, weights.settings, weights.tensors)
    settings = weights.settings
    print(
        f"{len(weights.tensors)} tensors written to {options.out}: K {settings['num_latents']}, "
        f"rank {settings['rank']}, alpha {settings['alpha']:g}, {', '.join(settings['target_modules'])}, "
        f"width {settings['d_composer']} to {settings['d_agent']}"
    )
    print(weights.base_check)
    print(f"to evaluate it as 'latent:{options.out}', the configuration says:\n\n{sections(settings)}", end="")


def _retriever_serve(options: argparse.Namespace) -> None:
    from latentmem.server.retriever import serve

    serve(
        options.corpus,
        method=options.method,
        host=options.host,
        port=options.port,
        index=options.index,
        embedder=options.embedder,
        on_bad_row=options.on_bad_row,
        announce=lambda text: print(text, flush=True),
    )


def _read_template(path: Path) -> str:
    from latentmem.errors import ConfigError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the template cannot be read ({error}); give a UTF-8 text file") from None
    from latentmem.memory.composer import FIELDS
    from latentmem.templates import check_template

    check_template(text, FIELDS, str(path))
    return text.removesuffix("\n")  # editors add it


if __name__ == "__main__":
    sys.exit(main())
