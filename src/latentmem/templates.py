"""Prompts are data: text with {fields}, checked when it is loaded and filled in one pass.

One pass, so that a field written inside a task or a model's response stays as it is.
"""

import re
from collections.abc import Collection

from latentmem.errors import ConfigError, suggest

_FIELD = re.compile(r"\{([A-Za-z_]+)\}")


def check_template(template: str, fields: Collection[str], where: str) -> None:
    """Refuse a template that names a field which does not exist.

    Raises:
        ConfigError: naming the field, where it stands, and the nearest known one.
    """
    for name in _FIELD.findall(template):
        if name not in fields:
            raise ConfigError(f"{where}: unknown field {{{name}}}; {suggest(name, fields)}")


def fields_in(*templates: str) -> frozenset[str]:
    """The fields that any of the templates names.

    >>> sorted(fields_in("{task} {x}", "{task}?"))
    ['task', 'x']
    """
    return frozenset(name for template in templates for name in _FIELD.findall(template))


def fill(template: str, **fields: str) -> str:
    """The template with its fields replaced.

    >>> fill("{task}? {x}", task="{x}", x="1")
    '{x}? 1'
    """
    return _FIELD.sub(lambda match: fields[match.group(1)] if match.group(1) in fields else match.group(), template)
