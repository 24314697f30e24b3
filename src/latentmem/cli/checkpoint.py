"""`latentmem checkpoint`: inspect saved weights, import released weights, push to and pull from the hub."""

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.cli.arguments import count, positive, takes_pulled, takes_pushed

if TYPE_CHECKING:
    from latentmem.cli.arguments import Commands
    from latentmem.hub import Origin


def add_commands(commands: "Commands") -> None:
    """Add the command `checkpoint` and its subcommands."""
    checkpoint = commands.add_parser("checkpoint", help="look into a checkpoint, import released weights, push, pull")
    kinds = checkpoint.add_subparsers(required=True, metavar="WHAT")
    info = kinds.add_parser("info", help="settings, tensors and size")
    info.add_argument("folder", type=Path, metavar="FOLDER")
    info.set_defaults(run=_info)
    importer = kinds.add_parser("import", help="make a checkpoint of weights laid out as the authors publish them")
    importer.add_argument(
        "source", type=Path, metavar="SOURCE", help="a .safetensors file, an index of shards, a folder"
    )
    importer.add_argument("--base", required=True, metavar="MODEL", help="the composer's base: folder or hub id")
    importer.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the checkpoint to write")
    importer.add_argument("--agents", metavar="MODEL", help="the model that is given the latents (default: the base)")
    importer.add_argument("--alpha", type=positive, help="LoRA's alpha, which the file does not tell (default 32)")
    importer.add_argument(
        "--template", type=Path, metavar="FILE", help="the text that the weights were trained to read"
    )
    importer.add_argument("--max-prompt-tokens", type=count, metavar="N", help="longest such text (default 1024)")
    importer.set_defaults(run=_import)
    push = kinds.add_parser("push", help="send a checkpoint to the Hugging Face hub, with a model card")
    push.add_argument("folder", type=Path, metavar="FOLDER")
    takes_pushed(push)
    push.set_defaults(run=_push)
    pull = kinds.add_parser("pull", help="bring a checkpoint from the Hugging Face hub into a new folder")
    takes_pulled(pull)
    pull.add_argument("folder", type=Path, metavar="FOLDER", help="the checkpoint to write")
    pull.set_defaults(run=_pull)


def _info(options: argparse.Namespace) -> None:
    from latentmem.memory.checkpoints import NAMES, kind_of, read_checkpoint, weights_file

    kind = kind_of(options.folder)
    settings, tensors = read_checkpoint(options.folder, kind)
    print(f"{'kind':18} {NAMES[kind]!r}")
    for key, value in settings.items():
        print(f"{key:18} {value!r}")
    # Tensors whose names differ only in the layer's number share one line.
    kinds = Counter((re.sub(r"\.\d+\.", ".*.", name), str(list(tensor.shape))) for name, tensor in tensors.items())
    for (name, shape), num in sorted(kinds.items()):
        print(f"{num:4} x {shape:14} {name}")
    num_bytes = weights_file(options.folder, kind).stat().st_size
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{len(tensors)} tensors, {parameters:,} parameters, {num_bytes / 2**20:.1f} MB")


def _import(options: argparse.Namespace) -> None:
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


def _read_template(path: Path) -> str:
    from latentmem.errors import ConfigError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the template cannot be read ({error}); give a UTF-8 text file") from None
    from latentmem.memory.composer import FIELDS
    from latentmem.templates import check_template

    check_template(text, FIELDS, str(path))
    return text.removesuffix("\n")  # editors add a newline at the end


def _push(options: argparse.Namespace) -> None:
    from latentmem.hub import push_checkpoint

    print(push_checkpoint(options.folder, options.repo, _origin(options.folder.resolve()), public=options.public))


def _pull(options: argparse.Namespace) -> None:
    from latentmem.hub import pull_checkpoint
    from latentmem.memory.checkpoints import NAMES

    kind = pull_checkpoint(options.repo, options.folder, options.revision, force=options.force)
    name = "latent" if kind == "composer" else "grpo"
    print(f"{NAMES[kind]} written to {options.folder}; evaluate.memories names it '{name}:{options.folder}'")


def _origin(folder: Path) -> "Origin | None":
    """Return the run that a checkpoint comes from, if it lies where runs keep theirs: RUN/PHASE/checkpoints/step-N."""
    from latentmem.errors import RunError
    from latentmem.folders import RESULTS
    from latentmem.hub import Origin
    from latentmem.parsing import parse_yaml
    from latentmem.report import format_markdown
    from latentmem.report.read import read_results
    from latentmem.runs import PHASES
    from latentmem.training.checkpoint_folder import selected_checkpoint

    checkpoints, phase = folder.parent, folder.parent.parent
    run = phase.parent
    step = re.fullmatch(r"step-(\d+)", folder.name)
    kept = checkpoints.name == "checkpoints" and phase.name in PHASES and (run / "config.yaml").is_file()
    if step is None or not kept:
        return None
    results = None
    if (run / RESULTS["test"]).is_file() and selected_checkpoint(checkpoints) == folder:
        found = read_results(run / RESULTS["test"])
        if {f"latent:{phase.name}", phase.name} & {memory["name"] for memory in found.get("memories") or []}:
            results = format_markdown(found)
    path = run / "config.yaml"
    try:  # not as a configuration: a run of an older version may have keys that are no more
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}); restore it, or push the checkpoint from another folder"
        ) from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: holds no configuration; restore it, or push from another folder")
    return Origin(phase.name, int(step.group(1)), values, results)
