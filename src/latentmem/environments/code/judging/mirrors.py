"""What one side of the channel holds for an object of the other: a mirror passes on whatever is done with it.

What a mirror is compared with stays here as far as it can, so that an object which claims to equal everything equals
nothing: plain data are compared with plain data. The operators of a class count where the tests name that class.
"""

import secrets
import types
from collections.abc import Callable
from typing import Any

_COMPARING = ("__lt__", "__le__", "__gt__", "__ge__")
_ARITHMETIC = tuple(
    f"__{side}{name}__"
    for name in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "divmod",
    ]
    for side in ("", "r", "i")
    if (side, name) != ("i", "divmod")
)
_BLIND = (
    *("__len__", "__iter__", "__next__", "__reversed__", "__getitem__", "__setitem__", "__delitem__", "__call__"),
    *("__int__", "__float__", "__index__", "__complex__", "__round__", "__trunc__", "__floor__", "__ceil__"),
    *("__neg__", "__pos__", "__abs__", "__invert__", "__enter__", "__bool__"),
)
"""Operators that tell the other side nothing of what is expected."""
OPERATORS = (*_COMPARING, *_ARITHMETIC, *_BLIND, "__contains__", "__exit__", "__eq__", "__hash__")
TEXTS = ("__str__", "__repr__", "__format__")

_TWINS = {
    kind.__name__: kind
    for kind in (
        *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.GeneratorType, types.CoroutineType),
        *(map, filter, zip, enumerate, reversed, type(iter([])), type(iter(())), type(iter({})), type(iter(range(0)))),
    )
}
"""Types without data of their own that are on either side: a mirror says that it is of such a type."""
_BASES = (int, float, complex, str, bytes, list, tuple, dict, set, frozenset)


def plain_base(kind: type) -> type | None:
    """The plain type that a class is derived from, if there is one."""
    return next((base for base in kind.__mro__ if base in _BASES), None)


def twin_of(kind: type) -> str | None:
    """The name of the type that stands for a class on the other side, to `isinstance`."""
    base = plain_base(kind) or _TWINS.get(kind.__name__)
    return base.__name__ if base is not None and issubclass(kind, base) else None


def plain_copy(value: Any) -> Any:
    """What an object of a derived class holds, as an object of its plain type; its own operators have no say."""
    base: Any = plain_base(type(value))
    if base is dict:
        return dict(dict.items(value))
    if base in (list, tuple, set, frozenset):
        return base(list(base.__iter__(value)))
    return base.__add__(value, base())


def operators_of(kind: type) -> tuple[str, ...]:
    """The operators that a class has and `object` has not."""
    return tuple(
        name
        for name in OPERATORS
        if getattr(kind, name, None) is not None and getattr(kind, name) is not getattr(object, name, None)
    )


class MirrorClass(type):
    """The class of the mirrors of one class of the other side."""

    _mirror_peer: Any
    _mirror_number: int
    _mirror_is_known = False
    """Whether the tests name it."""

    def _mirror_of(cls, number: int) -> Any:
        kind: Any = cls
        mirror: Any = kind.__new__(kind)
        object.__setattr__(mirror, "_mirror_peer", cls._mirror_peer)
        object.__setattr__(mirror, "_mirror_number", number)
        return mirror

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        """Make an object of the class, over there."""
        return cls._mirror_peer.ask(cls._mirror_number, "call", *arguments, **keywords)

    def __getattr__(cls, name: str) -> Any:
        """What the class of the other side has under a name."""
        if name.startswith("_mirror_") or name == "__abstractmethods__":
            raise AttributeError(name)
        return cls._mirror_peer.ask(cls._mirror_number, "get", name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if name.startswith("_mirror_"):
            type.__setattr__(cls, name, value)
        else:
            cls._mirror_peer.ask(cls._mirror_number, "set", name, value)

    def __iter__(cls) -> Any:
        return cls._mirror_peer.ask(cls._mirror_number, "__iter__")

    def __len__(cls) -> int:
        return int(cls._mirror_peer.ask(cls._mirror_number, "__len__"))

    def __bool__(cls) -> bool:
        return True

    def __getitem__(cls, key: Any) -> Any:
        return cls._mirror_peer.ask(cls._mirror_number, "__getitem__", key)

    def __contains__(cls, value: Any) -> bool:
        return any(value is found for found in cls)

    def __hash__(cls) -> int:
        return id(cls)

    def __eq__(cls, other: object) -> bool:
        return cls is other


class Mirror:
    """Stands for one object of the other side."""

    _mirror_peer: Any
    _mirror_number: int
    _mirror_base: type | None = None
    """The plain type that its class is derived from."""

    def _mirror_ask(self, action: str, *arguments: Any, **keywords: Any) -> Any:
        return self._mirror_peer.ask(self._mirror_number, action, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_mirror_"):
            raise AttributeError(name)
        return self._mirror_ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._mirror_ask("set", name, value)

    def __delattr__(self, name: str) -> None:
        self._mirror_ask("del", name)

    def __str__(self) -> str:
        return _text(self._mirror_ask("__str__"))

    def __repr__(self) -> str:
        return _text(self._mirror_ask("__repr__"))

    def __format__(self, form: str) -> str:
        return _text(self._mirror_ask("__format__", form))

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> Any:
        return equal(self, other)

    def __ne__(self, other: object) -> Any:
        same = equal(self, other)
        return same if same is NotImplemented else not same


def _text(said: Any) -> str:
    if type(said) is not str:
        raise TypeError(f"a text was due, not {type(said).__name__}")
    return said


def equal(mirror: Mirror, other: Any) -> Any:
    """Whether the other side's object equals something, asked in such a way that a yes to everything is a no."""
    kind: Any = type(mirror)
    if mirror is other:
        return True
    ours = not isinstance(other, Mirror | MirrorClass)
    if kind._mirror_base is not None and not (ours and kind._mirror_is_known):
        value = mirror._mirror_ask("plain")
        if type(value) is not kind._mirror_base:
            return False
        if isinstance(other, Mirror) and type(other)._mirror_base is not None:
            other = other._mirror_ask("plain")
        return value == other
    if "__eq__" not in kind._mirror_operators or (ours and not kind._mirror_is_known):
        return NotImplemented
    if mirror._mirror_ask("__eq__", other) is not True:
        return False
    return not any(_says_equal(mirror, decoy) for decoy in _decoys(other))


def _says_equal(mirror: Mirror, decoy: Any) -> bool:
    try:
        return mirror._mirror_ask("__eq__", decoy) is True
    except Exception:
        return False


def _decoys(value: Any) -> list[Any]:
    """Values that equal no more than by chance what equals this one."""
    text = secrets.token_hex(8)
    found: list[Any] = [text, secrets.randbits(60) + 0.5]
    if type(value) in (int, float):
        found += [value + 1, value - 1]
    elif type(value) in (list, tuple):
        found.append(value + type(value)([text]))
    elif type(value) is dict:
        found.append({**value, text: text})
    elif type(value) is str:
        found.append(value + text)
    secrets.SystemRandom().shuffle(found)
    return found


def _exit(mirror: Any, kind: Any, error: Any, trace: Any) -> Any:
    return mirror._mirror_ask("__exit__", None if error is None else type(error), error, None)


def _contains(mirror: Any, value: Any) -> Any:
    if type(mirror)._mirror_is_known:
        return mirror._mirror_ask("__contains__", value)
    base = type(mirror)._mirror_base
    return value in (mirror._mirror_ask("plain") if base is not None else list(mirror))


def _hash(mirror: Any) -> int:
    if type(mirror)._mirror_base is not None:
        return hash(mirror._mirror_ask("plain"))
    return int(mirror._mirror_ask("__hash__"))


def _blind(name: str) -> Callable[..., Any]:
    def operator(mirror: Any, *arguments: Any, **keywords: Any) -> Any:
        return mirror._mirror_ask(name, *arguments, **keywords)

    return operator


def _two_sided(name: str) -> Callable[..., Any]:
    def operator(mirror: Any, other: Any, *more: Any) -> Any:
        kind = type(mirror)
        if kind._mirror_is_known or isinstance(other, Mirror):
            return mirror._mirror_ask(name, other, *more)
        if kind._mirror_base is None:
            return NotImplemented
        function = getattr(kind._mirror_base, name, None)
        return NotImplemented if function is None else function(mirror._mirror_ask("plain"), other, *more)

    return operator


def make_class(
    peer: Any, number: int, name: str, bases: list[type], operators: tuple[str, ...], twin: str | None
) -> type:
    """The class whose objects are the mirrors of a class of the other side.

    bases: mirrors of its bases, and exception types that are the same on both sides. twin: the name of a type of either
    side that it is or that it is derived from.
    """
    space: dict[str, Any] = {"_mirror_peer": peer, "_mirror_number": number, "_mirror_operators": tuple(operators)}
    kept: list[type] = [
        b for b in bases if isinstance(b, MirrorClass) or (isinstance(b, type) and issubclass(b, BaseException))
    ]
    plain = next((b for b in _BASES if b.__name__ == twin), None)
    space["_mirror_base"] = plain
    claimed = plain or _TWINS.get(str(twin))
    if claimed is not None:
        space["__class__"] = property(lambda self: claimed)
    for operator in operators:
        if operator in _BLIND:
            space[operator] = _blind(operator)
        elif operator in _COMPARING or operator in _ARITHMETIC:
            space[operator] = _two_sided(operator)
    if "__contains__" in operators:
        space["__contains__"] = _contains
    if "__exit__" in operators:
        space["__exit__"] = _exit
    space["__eq__"], space["__ne__"] = Mirror.__eq__, Mirror.__ne__
    if "__hash__" in operators:
        space["__hash__"] = _hash
    elif "__eq__" in operators:
        space["__hash__"] = None
    if not any(isinstance(b, MirrorClass) for b in kept):
        kept.insert(0, Mirror)
    try:
        return MirrorClass(str(name), tuple(kept), space)
    except TypeError:  # bases that do not go together here
        return MirrorClass(str(name), (Mirror,), space)
