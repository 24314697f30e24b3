"""Make objects of a user's own classes: a configuration names one as `module:Name`, with its arguments beside it.

The module is looked for in the folder where the command is started, and among the installed packages. Naming a module
runs its code, as importing it does.
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
    """Return whether a name has the form `module:Name`, where the class begins with a capital letter.

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
    """Make an object of the class that `name` names.

    Args:
        name: `module:Name`.
        parameters: keyword arguments for the class, as the configuration gives them.
        key: the configuration key of the parameters, for errors.
        needs: attributes that the object must have.
        offered: by name, functions that make further arguments. One is called only if the class asks for its name;
            the configuration cannot give these arguments.

    Raises:
        ConfigError: there is no such module or class; a parameter is unknown, missing, or of another type than its
            annotation; or the class lacks a needed attribute.
    """
    return bind(name, parameters, key, needs, offered)()


def bind(
    name: str,
    parameters: Mapping[str, Any],
    key: str,
    needs: Sequence[str],
    offered: Mapping[str, Callable[[], Any]] | None = None,
) -> Callable[[], Any]:
    """Return a function that makes the object; what `make` checks beforehand is checked now."""
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
    """Return in one line where a user's own code raised an error or led to it; None if no such code took part.

    A user's own code is all code outside this package and outside the installed packages.
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
            raise ConfigError(f"{key}: {match['module']} needs module {error.name!r}, which is not installed") from None
        near = get_close_matches(match["module"], [path.stem for path in Path(here).glob("*.py")], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{key}: no module {match['module']!r} in {here} or among the installed packages{hint}"
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
    except (NameError, TypeError, AttributeError):  # annotations may use names that only type checkers import
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
        except PydanticUserError:  # a class that pydantic does not know; it checks its arguments itself
            continue


def _own(cls: Any) -> set[str]:
    """Return the attributes that a class annotates and all names in its constructor, among them those it sets."""
    annotated = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}
    constructor = getattr(cls.__init__, "__code__", None)
    return annotated | set(constructor.co_names if constructor is not None else ())
