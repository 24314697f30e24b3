"""The command line: words -> one call of a recipe, of the bank or of a server."""

from latentmem.cli.program import main

__all__ = ["main"]
