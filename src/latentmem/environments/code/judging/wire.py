"""Calls between two processes that do not trust each other: the judge of a solution, and the solution.

Plain data cross by value, everything else stays where it is and the other side holds a mirror of it (`mirrors.py`).
Containers among the arguments of a call keep their identity: what the called side changes in them is changed here, too.
The form is a pickle whose only names are those in `PLAIN`, so reading one runs no code.
"""

import builtins
import collections
import io
import os
import pickle
import struct
import types
from collections.abc import Callable
from typing import Any

from .mirrors import Mirror, MirrorClass, make_class, operators_of, plain_copy, twin_of

_TYPES = "NoneType bool int float complex str bytes bytearray list tuple dict set frozenset range slice"
PLAIN: dict[str, set[str]] = {
    "builtins": {
        *_TYPES.split(),
        *("NotImplemented", "Ellipsis"),
        *(n for n, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, BaseException)),
    },
    "collections": {"OrderedDict", "Counter", "defaultdict", "deque"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal", "InvalidOperation", "DivisionByZero"},
    "fractions": {"Fraction"},
    "uuid": {"UUID", "SafeUUID"},
    "json.decoder": {"JSONDecodeError"},
    "statistics": {"StatisticsError"},
    "re": {"error"},
    "struct": {"error"},
    "binascii": {"Error"},
    "_queue": {"Empty"},
    "queue": {"Full"},
}
"""Types that cross by value, under the names that a pickle gives them."""
SHARED_MODULES = frozenset(
    [
        "abc",
        "bisect",
        "cmath",
        "collections",
        "copy",
        "dataclasses",
        "datetime",
        "decimal",
        "enum",
        "fractions",
        "functools",
        "heapq",
        "itertools",
        "json",
        "math",
        "numbers",
        "operator",
        "pytest",
        "re",
        "statistics",
        "string",
        "textwrap",
        "time",
        "typing",
        "unittest",
        "uuid",
    ]
)
"""Modules that mean the same in either process."""

_BOXES = (
    *(list, dict, set, bytearray, collections.deque),
    *(collections.OrderedDict, collections.Counter, collections.defaultdict),
)
_VIEWS: dict[type, str] = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_LENGTH = struct.Struct("<Q")


class Gone(BaseException):
    """The other side has ended, or says what nobody understands."""


def _is_plain(kind: type) -> bool:
    module, name = kind.__module__, kind.__qualname__
    return name in PLAIN.get(module, ()) or kind in (type(None), type(NotImplemented), type(...))


def boxes(values: Any) -> list[Any]:
    """All plain containers among some values that can be changed, in an order that a copy of the values has, too."""
    found: dict[int, Any] = {}
    waiting = [values]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in (list, tuple, dict, collections.deque) or kind in _BOXES:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if kind in _BOXES:
                found[id(value)] = value
            if isinstance(value, dict):
                waiting.extend(value.values())
            elif not isinstance(value, bytearray):
                waiting.extend(v for v in value if not isinstance(v, int | float | str))
    return list(found.values())


def _contents(box: Any) -> Any:
    if isinstance(box, bytearray):
        return bytes(box)
    return list(box.items()) if isinstance(box, dict) else list(box)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, bytes):
        return bool(old == new)
    if len(old) != len(new):
        return False
    return all(a is b or (type(a) is tuple is type(b) and len(a) == len(b) == 2 and a[0] is b[0] and a[1] is b[1])
               for a, b in zip(old, new, strict=True))  # fmt: skip


def _refill(box: Any, contents: Any) -> None:
    if isinstance(box, list | bytearray):
        box[:] = contents
    elif isinstance(box, dict):
        box.clear()
        for key, value in contents:
            box[key] = value
    else:
        box.clear()
        (box.update if isinstance(box, set) else box.extend)(contents)


class Peer:
    """One end of the channel: it asks the other end, and answers it meanwhile.

    shows: whether an object may be mirrored on the other side. permits: whether the other side may do this with it.
    """

    def __init__(
        self,
        reading: int,
        writing: int,
        shows: Callable[[Any], bool] = lambda value: True,
        permits: Callable[[Any, str, tuple[Any, ...]], bool] = lambda value, action, arguments: True,
    ) -> None:
        self._reading, self._writing = reading, writing
        self._shows, self._permits = shows, permits
        self._own: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._theirs: dict[int, Any] = {}
        self._described: set[int] = set()
        self.gone = False

    # What is said

    def show(self, value: Any) -> int:
        """The number that an object of this side has on the other."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._own)
            self._own.append(value)
        return self._numbers[id(value)]

    def ask(self, number: int, action: str, *arguments: Any, **keywords: Any) -> Any:
        """Do something with an object of the other side, and return or raise what that gives."""
        mutable = boxes((arguments, keywords))
        self._send(("ask", number, action, arguments, keywords), [])
        while True:
            message = self._receive(mutable)
            if message[0] == "ask":
                self._answer(*message[1:])
                continue
            if len(message) != 3 or not isinstance(message[2], dict):
                raise self._lost("an answer of another form")
            kind, value, changed = message
            for index, contents in changed.items():
                _refill(mutable[index], contents)
            if kind == "raise" and isinstance(value, BaseException):
                raise value
            if kind != "value":
                raise self._lost("an answer of another form")
            return value

    def serve(self) -> None:
        """Answer the other side until it ends."""
        while True:
            message = self._receive([])
            if message[0] != "ask":
                raise self._lost("an answer that was not asked for")
            self._answer(*message[1:])

    def _answer(self, number: int, action: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        mutable = boxes((arguments, keywords))
        before = [_contents(box) for box in mutable]
        try:
            target = self._own[number]
            if not self._permits(target, action, arguments):
                raise AttributeError(f"{action} of a test's {type(target).__name__}")
            kind, value = "value", _do(target, action, arguments, keywords)
        except Gone:
            raise
        except BaseException as error:
            error.__traceback__ = None
            kind, value = "raise", error
        changed = {
            i: now
            for i, (box, old) in enumerate(zip(mutable, before, strict=True))
            if not _same(old, now := _contents(box))
        }
        try:
            self._send((kind, value, changed), mutable)
        except Gone:
            raise
        except BaseException as error:
            self._send(("raise", TypeError(f"{type(value).__name__}: {error}"[:300]), {}), [])

    # The form

    def _lost(self, what: str) -> Gone:
        self.gone = True
        return Gone(what)

    def _send(self, message: Any, mutable: list[Any]) -> None:
        buffer = io.BytesIO()
        buffer.write(bytes(8))
        _Writer(buffer, self, mutable).dump(message)
        view = buffer.getbuffer()
        _LENGTH.pack_into(view, 0, len(view) - 8)
        try:
            sent = 0
            while sent < len(view):
                sent += os.write(self._writing, view[sent:])
        except OSError:
            raise self._lost("the other side has ended") from None

    def _receive(self, mutable: list[Any]) -> Any:
        (length,) = _LENGTH.unpack(self._read(8))
        content = self._read(length)
        try:
            message = _Reader(io.BytesIO(content), self, mutable).load()
            if not (isinstance(message, tuple) and len(message) in (3, 5)):
                raise ValueError(type(message))
        except MemoryError:
            raise
        except Exception as error:
            raise self._lost(f"not to be understood: {error!r:.200}") from None
        return message

    def _read(self, length: int) -> bytearray:
        content = bytearray()
        while len(content) < length:
            chunk = os.read(self._reading, min(length - len(content), 1 << 20))
            if not chunk:
                raise self._lost("the other side has ended")
            content += chunk
        return content

    def describe(self, kind: type) -> tuple[Any, ...]:
        """What the other side has to know of a class of this side; the whole only the first time."""
        number = self.show(kind)
        if number in self._described:
            return ("class", number)
        self._described.add(number)
        bases = [base if _is_plain(base) else self.describe(base) for base in kind.__bases__ if base is not object]
        return ("class", number, kind.__name__, bases, operators_of(kind), twin_of(kind))

    def their_class(self, description: tuple[Any, ...]) -> type:
        """The mirror of a class of the other side."""
        _, number, *rest = description
        if rest and number not in self._theirs:
            name, bases, operators, twin = rest
            found = [b if isinstance(b, type) else self.their_class(b) for b in bases]
            self._theirs[number] = make_class(self, number, name, found, operators, twin)
        kind = self._theirs[number]
        if not isinstance(kind, MirrorClass):
            raise ValueError(number)
        return kind

    def reference(self, value: Any, mutable: dict[int, int]) -> Any:
        """How a value is written that does not cross as it is; None for one that does."""
        kind = type(value)
        if id(value) in mutable:
            return ("box", mutable[id(value)])
        if isinstance(value, Mirror) and value._mirror_peer is self:
            return ("yours", value._mirror_number)
        if isinstance(value, MirrorClass):
            return ("yours", value._mirror_number)
        if isinstance(value, type):
            return None if _is_plain(value) else self._checked(value) and self.describe(value)
        if _is_plain(kind):
            return None
        if isinstance(value, types.ModuleType):
            return ("module", value.__name__)
        if kind in _VIEWS:
            return ("view", _VIEWS[kind], dict(value) if kind is type({}.items()) else list(value))
        if kind.__module__ == "numpy" and hasattr(value, "dtype") and getattr(value, "shape", None) == ():
            return ("number", value.item())
        self._checked(value)
        return ("mine", self.show(value), self.describe(kind))

    def _checked(self, value: Any) -> bool:
        if not self._shows(value):
            raise TypeError(f"{type(value).__name__} is not shown to the solution")
        return True

    def resolve(self, reference: Any, mutable: list[Any]) -> Any:
        """The value that a reference stands for."""
        kind, *rest = reference
        if kind == "box":
            return mutable[rest[0]]
        if kind == "yours":
            return self._own[rest[0]]
        if kind == "class":
            return self.their_class(reference)
        if kind == "module":
            name = rest[0]
            return __import__(name) if name in SHARED_MODULES else types.ModuleType(str(name))
        if kind == "view":
            values: Any = rest[1]
            if rest[0] == "values":
                return dict(enumerate(values)).values()
            return dict(values).items() if rest[0] == "items" else dict.fromkeys(values).keys()
        if kind == "number":
            return rest[0]
        if kind != "mine":
            raise ValueError(kind)
        number, description = rest
        if number not in self._theirs:
            mirror_class: Any = self.their_class(description)
            self._theirs[number] = mirror_class._mirror_of(number)
        return self._theirs[number]


def _do(target: Any, action: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if action == "call":
        return target(*arguments, **keywords)
    if action == "get":
        return getattr(target, *arguments)
    if action == "set":
        return setattr(target, *arguments)
    if action == "del":
        return delattr(target, *arguments)
    if action == "plain":
        return plain_copy(target)
    function = getattr(type(target), action, None)
    if function is None:
        raise TypeError(f"{type(target).__name__} has no {action}")
    return function(target, *arguments, **keywords)


class _Writer(pickle.Pickler):
    def __init__(self, file: Any, peer: Peer, mutable: list[Any]) -> None:
        super().__init__(file, protocol=5)
        self._peer = peer
        self._boxes = {id(box): i for i, box in enumerate(mutable)}

    def persistent_id(self, value: Any) -> Any:
        """See `Peer.reference`."""
        return self._peer.reference(value, self._boxes)


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, peer: Peer, mutable: list[Any]) -> None:
        super().__init__(file)
        self._peer, self._boxes = peer, mutable

    def persistent_load(self, reference: Any) -> Any:
        """See `Peer.resolve`."""
        return self._peer.resolve(reference, self._boxes)

    def find_class(self, module: str, name: str) -> Any:
        """The type of a name, if it crosses by value."""
        if name not in PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not cross")
        if name == "NoneType":
            return type(None)
        return getattr(__import__(module, fromlist=[name]), name)
