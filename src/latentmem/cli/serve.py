"""`latentmem serve`: serve agent programs of any framework, with a memory."""

import argparse
import sys
from typing import TYPE_CHECKING

from latentmem.cli.arguments import port, serving_packages, takes_config

if TYPE_CHECKING:
    from latentmem.cli.arguments import Commands


def add_commands(commands: "Commands") -> None:
    """Add the command `serve`."""
    text = "serve agent programs over OpenAI's API, with a memory; of the configuration, data may be left out"
    serve = commands.add_parser("serve", help="serve agent programs over OpenAI's API, with a memory", description=text)
    takes_config(serve)
    serve.add_argument("--host", help="address to listen on (default: serve.host)")
    serve.add_argument("--port", type=port, help="port to listen on, 0 for a free one (default: serve.port)")
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    from latentmem.config import load_serving_config

    given = [f"serve.{name}={value}" for name in ("host", "port") if (value := getattr(options, name)) is not None]
    config = load_serving_config(options.config, [*options.overrides, *given])
    from latentmem.cli.early import check_serving

    check_serving(config)
    with serving_packages():
        from latentmem.recipes.serve import serve

    serve(
        config,
        begin=lambda text: print(text, file=sys.stderr, flush=True),
        announce=lambda text: print(text, flush=True),
    )
