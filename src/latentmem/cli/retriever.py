"""`latentmem retriever`: serve a corpus of passages."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem.cli.arguments import port

if TYPE_CHECKING:
    from latentmem.cli.arguments import Commands


def add_commands(commands: "Commands") -> None:
    """Add the command `retriever` and its subcommand."""
    retriever = commands.add_parser("retriever", help="serve a corpus of passages in the Search-R1 protocol")
    kinds = retriever.add_subparsers(required=True, metavar="WHAT")
    serve = kinds.add_parser("serve", help="index a corpus, or find its index, and answer POST /retrieve")
    serve.add_argument("corpus", type=Path, metavar="CORPUS", help="JSON Lines: id and contents, or id, title and text")
    serve.add_argument(
        "--method", choices=("bm25", "dense", "both"), default="bm25", help="by words, by meaning, or both (bm25)"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=port, default=8000, help="port to listen on, 0 for a free one (default 8000)")
    serve.add_argument("--index", type=Path, metavar="DIR", help="folder of the index (default CORPUS.index)")
    serve.add_argument("--embedder", default="all-minilm-l6-v2", metavar="MODEL", help="of dense search: folder or id")
    serve.add_argument(
        "--on-bad-row", choices=("error", "skip"), default="error", help="rows that are no passages (default error)"
    )
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
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
