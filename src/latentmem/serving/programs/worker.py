"""A process that calls a user's function, once for each episode; it loads nothing of this package but this file.

It reads a request as a line of JSON (`task` and `environment`), calls the function, and writes a line with its
`answer`, or with the `error` that it raised.
"""

import asyncio
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Serve the function in the arguments: descriptors to read from and to write to, and `module:function`."""
    reading, writing, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with open(reading, encoding="utf-8") as requests, open(writing, "w", encoding="utf-8") as answers:

        def tell(**said: Any) -> None:
            answers.write(json.dumps(said) + "\n")
            answers.flush()

        sys.path.insert(0, os.getcwd())
        try:
            module, _, function = name.partition(":")
            call = getattr(importlib.import_module(module), function)
        except Exception as error:
            missing = {"missing": error.name} if isinstance(error, ModuleNotFoundError) else {}
            tell(error=f"{type(error).__name__}: {error}", **missing)
            return
        tell(ready=True)
        # One event loop for all episodes: clients that a framework keeps belong to the loop they were made in.
        with asyncio.Runner() as loop:
            for line in requests:
                request = json.loads(line)
                os.environ.update(request["environment"])
                try:
                    tell(answer=_answer(call, request["task"], loop))
                except Exception as error:
                    tell(error=f"{type(error).__name__}: {error}")


def _answer(call: Callable[[dict[str, Any]], Any], task: dict[str, Any], loop: asyncio.Runner) -> str:
    said = call(task)
    if inspect.iscoroutine(said):
        said = loop.run(said)
    if isinstance(said, dict):
        said = said.get("answer")
    if not isinstance(said, str):
        raise TypeError(f"the function returned {type(said).__name__}; expected the answer as text")
    return said


if __name__ == "__main__":
    main()
