"""Prompts are data: text with {fields}, checked when it is loaded and filled in one pass.

A single pass leaves alone what looks like a field inside a task or a model's response.
"""

import re
from collections.abc import Collection

from latentmem.errors import ConfigError, suggest

_FIELD = re.compile(r"\{([A-Za-z_]+)\}")


def check_template(template: str, fields: Collection[str], where: str) -> None:
    """Refuse a template that names an unknown field.

    Raises:
        ConfigError: the field is unknown; the message names it, its place, and the nearest known field.
    """
    for name in _FIELD.findall(template):
        if name not in fields:
            raise ConfigError(f"{where}: unknown field {{{name}}}; {suggest(name, fields)}")


def fields_in(*templates: str) -> frozenset[str]:
    """Return the fields that occur in any of the templates.

    >>> sorted(fields_in("{task} {x}", "{task}?"))
    ['task', 'x']
    """
    return frozenset(name for template in templates for name in _FIELD.findall(template))


def fill(template: str, **fields: str) -> str:
    """Return the template with its fields replaced.

    >>> fill("{task}? {x}", task="{x}", x="1")
    '{x}? 1'
    """
    return _FIELD.sub(lambda match: fields[match.group(1)] if match.group(1) in fields else match.group(), template)
