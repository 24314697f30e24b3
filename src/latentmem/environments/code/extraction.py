"""Finds the code in a response that may hold several blocks, and completes a prompt with it."""

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence

from latentmem.environments.answers import tagged, without_thoughts

# A fence that names a language opens a block, even where another is open: SmolLM2 writes an empty fence before it.
_FENCED = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```(?![ \t]*\w)|(?=^[ \t]*```[ \t]*\w)|\Z)", re.MULTILINE | re.DOTALL
)
_DEFINITION = re.compile(r"^(?:async def|def|class)\s", re.MULTILINE)


def extract_code(response: str, *, asked: Sequence[str] = (), bare_body: bool = False) -> str | None:
    """The code in a response, or None.

    Of the fenced blocks those marked python count, else those unmarked, else all. Of these the last of those that
    define most of the names in `asked`; if none defines any, the last that defines a function or class, else the
    longest. A block that the response ends within counts. Without a block: what stands in the answer tags, else the
    whole response if it is Python that defines a function (or, with `bare_body`, if it is Python once it stands in a
    function). A block of thought before the answer counts for nothing.
    """
    response = without_thoughts(response)
    blocks: list[tuple[str, str]] = [
        (language.lower(), text) for language, text in _FENCED.findall(response) if text.strip()
    ]
    for languages in (("python", "py", "python3"), ("",), None):
        found: list[str] = [text for language, text in blocks if languages is None or language in languages]
        if found:
            most = max(_num_defined(text, asked) for text in found)
            defining: list[str] = [
                text for text in found if (_num_defined(text, asked) == most if most else _DEFINITION.search(text))
            ]
            return defining[-1] if defining else max(found, key=len)
    tag = tagged(response)
    if tag:
        return tag
    if syntax_problem(response) is None and _DEFINITION.search(response):
        return response
    if bare_body and response.strip() and syntax_problem(_as_body(response)) is None:
        return response
    return None


def _num_defined(text: str, names: Sequence[str]) -> int:
    return sum(
        re.search(
            rf"^(?:(?:async )?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*[:=](?!=)", text, re.MULTILINE
        )
        is not None
        for name in names
    )


def complete(prompt: str, code: str, entry_point: str) -> str:
    """One program of a prompt and an answer to it, which is either the whole function or the rest of it.

    An answer that defines `entry_point` takes the place of the prompt's function; the imports and helpers before that
    stay. Any other is taken for the function's body, and indented if need be.
    """
    definition = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    if definition.search(code):
        begin = definition.search(prompt)
        return (prompt[: begin.start()] if begin else prompt) + "\n" + code
    separator = "" if prompt.endswith("\n") else "\n"
    as_it_is = prompt + separator + code
    if syntax_problem(as_it_is) is None and code[:1] in (" ", "\t", "\n"):
        return as_it_is
    return prompt + separator + textwrap.indent(textwrap.dedent(code), "    ")


def _as_body(code: str) -> str:
    return "def function():\n" + textwrap.indent(textwrap.dedent(code), "    ")


def syntax_problem(code: str) -> str | None:
    """Where and why a text is no Python, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string is the model's business
        try:
            ast.parse(code)
        except SyntaxError as error:
            return f"line {error.lineno}: {error.msg}"
        except (ValueError, RecursionError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
    return None
