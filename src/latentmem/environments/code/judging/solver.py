"""The process that holds the solution and nothing else: it imports it, and answers the judge's calls until it ends.

Neither the tests nor what they expect ever comes here; the verdict is written elsewhere.
"""

import os
import sys

from .wire import Gone, Peer


def load(imports: str) -> dict[str, object]:
    """Import the solution, and give it what its tests import; its names."""
    import solution  # type: ignore[import-not-found]

    names = vars(solution)
    exec(imports, names)  # noqa: S102  # lines that import, no others
    return {name: value for name, value in names.items() if not name.startswith("__")}


def main() -> None:
    """Serve on the two descriptors of the command line, and leave at once when the judge has ended."""
    leave = os._exit
    peer = Peer(int(sys.argv[1]), int(sys.argv[2]))
    peer.show(load)
    try:
        peer.serve()
    except Gone:
        leave(0)


if __name__ == "__main__":
    main()
