"""Things of one's own: a class that a configuration names as `module:Name`, and makes with the keys beside it.

The module is looked for in the folder that the command is started in, and among what is installed. Naming one runs its
code, as importing it would.
"""

import importlib
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from latentmem.errors import ConfigError, LatentMemError, suggest

_NAME = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Z]\w*)")


def is_own(name: str) -> bool:
    """Whether a name is of the form `module:Name`; the class begins with a capital letter.

    >>> is_own("my_module:MyTeam"), is_own("latent:lmpo"), is_own("autogen")
    (True, False, False)
    """
    return _NAME.fullmatch(name) is not None


def make(
    name: str,
    parameters: Mapping[str, Any],
    key: str,
    needs: Sequence[str],
    offered: Mapping[str, Callable[[], Any]] | None = None,
) -> Any:
    """An object of the class that `name` tells.

    Args:
        name: `module:Name`.
        parameters: keyword arguments of the class, as they stand in the configuration.
        key: where they stand there, for errors.
        needs: attributes that the object has to have.
        offered: arguments that the class may ask for by name and that the configuration does not give, each with what
            makes it; it is made only where it is asked for.

    Raises:
        ConfigError: no such module or class, a parameter that the class does not take, lacks or that is of another
            type than its annotation tells, or an object that lacks something needed.
    """
    return bind(name, parameters, key, needs, offered)()


def bind(
    name: str,
    parameters: Mapping[str, Any],
    key: str,
    needs: Sequence[str],
    offered: Mapping[str, Callable[[], Any]] | None = None,
) -> Callable[[], Any]:
    """What makes the object; everything that `make` checks beforehand is checked now."""
    cls = _load(name, key)
    offered = offered or {}
    takes = inspect.signature(cls).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    named = {n: p for n, p in takes.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for given in parameters:
        if given in offered or (given not in named and not open_ended):
            known = [n for n in named if n not in offered]
            hint = suggest(given, known) if known else "it takes none"
            raise ConfigError(f"{key}.{given}: {name} takes no such parameter; {hint}")
    for needed, parameter in named.items():
        if parameter.default is parameter.empty and needed not in parameters and needed not in offered:
            raise ConfigError(f"{key}.{needed}: missing; {name} has no default for it")
    _check_types(cls, parameters, key)
    if lacks := [attribute for attribute in needs if not hasattr(cls, attribute) and attribute not in _own(cls)]:
        raise ConfigError(f"{key}: {name} lacks {', '.join(lacks)}; it needs {', '.join(needs)}")
    asked = {n: offered[n] for n in named if n in offered}

    def made() -> Any:
        given = {n: give() for n, give in asked.items()}
        try:
            return cls(**given, **parameters)
        except LatentMemError:
            raise
        except Exception as error:
            raise ConfigError(f"{key}: {name} cannot be made: {type(error).__name__}: {error}") from error

    return made


def blame(error: BaseException) -> str | None:
    """Where code of one's own raised an error or led to it, in one line; None if no such code took part.

    One's own is what belongs neither to this package nor to what is installed.
    """
    others = [Path(__file__).parent, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in others):
            return f"{path}:{frame.lineno}, in {frame.name}: {type(error).__name__}: {error}"
    return None


def _load(name: str, key: str) -> Any:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that no file here stands in for a package
    try:
        module = importlib.import_module(match["module"])
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{match['module']}.".startswith(f"{error.name}."):
            raise ConfigError(f"{key}: {match['module']} needs module {error.name!r}, which is not there") from None
        near = get_close_matches(match["module"], [path.stem for path in Path(here).glob("*.py")], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{key}: no module {match['module']!r}; it is looked for in {here} and among what is installed{hint}"
        ) from None
    except Exception as error:
        raise ConfigError(f"{key}: {match['module']} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, match["name"], None)
    if not inspect.isclass(found):
        classes = [
            n for n, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        hint = suggest(match["name"], classes) if classes else "it has none"
        raise ConfigError(f"{key}: {match['module']} has no class {match['name']!r}; {hint}")
    return found


def _check_types(cls: Any, parameters: Mapping[str, Any], key: str) -> None:
    try:
        hints = get_type_hints(cls.__init__)
    except (NameError, TypeError, AttributeError):  # annotations of names that are there for type checkers only
        return
    for given, value in parameters.items():
        if given not in hints:
            continue
        try:
            TypeAdapter(hints[given], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            problem = f"{message[0].lower()}{message[1:]}"
            raise ConfigError(f"{key}.{given} is {value!r} ({type(value).__name__}); {problem}") from None
        except PydanticUserError:  # a class of its own, which says for itself what it takes
            continue


def _own(cls: Any) -> set[str]:
    """Attributes that a class annotates or sets in its constructor, which an object will have."""
    annotated = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}
    constructor = getattr(cls.__init__, "__code__", None)
    return annotated | set(constructor.co_names if constructor is not None else ())
