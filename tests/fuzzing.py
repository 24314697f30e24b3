"""Valid files damaged in the ways that find most: values of another type, keys twice, bytes gone, numbers without end.

A file is a JSON value with a form to write it in (`Sample`), because YAML reads JSON too. Damage is drawn by hypothesis
as plain data, so that what fails is shrunk to the least damage that does.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


class Raw(str):
    """Text that stands in a file as it is."""


class Pairs(list):
    """A mapping as its pairs, in which a key may stand twice."""


VALUES = [
    None, True, False, 0, -1, 1, 7, 1.5, -0.0, 1e308, 5e-324, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), "", "x", "none",
    "\n", "../../x", "/dev/null/x", "latent:", "latent:x", "{unknown}", "{0.__class__}", "%s%n", "a:b", "json:loads",
    "\u202e\u0000", "é" * 300, "x" * 5000, [], {}, [[]], [None], ["x", "x"], {"": ""}, {"kind": "x"}, {"0": {"1": 2}},
    Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 400), Raw("9" * 5000), Raw("-" + "9" * 30), Raw('"\\ud800"'),
    Raw('"\\udc00\\ud800"'), Raw("[" * 99 + "]" * 99), Raw("[" * 900 + "]" * 900), Raw('{"a":' * 300 + "1" + "}" * 300),
    Raw("[" * 5000), Raw('{"a": 1, "a": 2}'), Raw(""), Raw("1:60"), Raw("2026-13-01"), Raw("!!binary x"),
    Raw("!!python/object/apply:os.getcwd []"), Raw("&x [*x]"), Raw("*x"), Raw("{? [a] : b}"), Raw("0b_"), Raw(".inf"),
]  # fmt: skip
"""What takes the place of a value."""
PIECES = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\r", b"\xe2\x80\xa8", b"\x85", b"\t",
    b" ", b'"', b"'", b"\\", b"\\u", b"{", b"}", b"[", b"]", b"(", b")", b",", b":", b"-", b"#", b"!", b"&a ", b"*a",
    b"<<", b"? ", b"| ", b"> ", b"%YAML 9.9\n", b"---\n", b"...\n", b"@", b"`", b"!!set ", b"e999", b"0x", b"(" * 2000,
    b"[" * 2000, b"{a: " * 300, b"- " * 500, b"</answer>", b"\\boxed{", b"<answer>", b"```python\n", b"<|im_end|>",
]  # fmt: skip
"""What is put between bytes."""

PLACE = st.integers(0, 10_000)
DAMAGE = st.one_of(
    st.tuples(st.just("put"), PLACE, st.sampled_from(VALUES)),
    st.tuples(st.just("put"), PLACE, st.sampled_from(VALUES)),
    st.tuples(st.just("drop"), PLACE, st.none()),
    st.tuples(st.just("double"), PLACE, st.sampled_from(VALUES)),
    st.tuples(st.just("rename"), PLACE, st.sampled_from([str(v)[:300] for v in VALUES])),
    st.tuples(st.just("swap"), PLACE, PLACE),
    st.tuples(st.just("insert"), PLACE, st.sampled_from(PIECES)),
    st.tuples(st.just("cut"), PLACE, st.integers(1, 400)),
    st.tuples(st.just("end"), PLACE, st.none()),
    st.tuples(st.just("flip"), PLACE, st.integers(1, 255)),
)
DAMAGES = st.lists(DAMAGE, min_size=1, max_size=3)


@dataclass(frozen=True)
class Sample:
    """A valid file."""

    value: Any
    form: Callable[[bytes], bytes] = bytes
    """From the JSON of the value to the file."""


def damaged(sample: Sample, damages: list[tuple[str, int, Any]]) -> bytes:
    """The file of a sample after some damage, that to its value first."""
    value = pairs_of(sample.value)
    for kind, place, what in damages:
        value = _damaged_value(value, kind, place, what)
    content = sample.form(render(value).encode("utf-8", "surrogatepass"))
    for kind, place, what in damages:
        content = damaged_bytes(content, kind, place, what)
    return content


def damaged_bytes(content: bytes, kind: str, place: int, what: Any) -> bytes:
    """Bytes after some damage to them."""
    at = place % (len(content) + 1)
    if kind == "insert":
        return content[:at] + what + content[at:]
    if kind == "cut":
        return content[:at] + content[at + what :]
    if kind == "end":
        return content[:at]
    if kind == "flip" and at < len(content):
        return content[:at] + bytes([content[at] ^ what]) + content[at + 1 :]
    return content


def pairs_of(value: Any) -> Any:
    """The value with its mappings as pairs."""
    if isinstance(value, dict):
        return Pairs([[key, pairs_of(part)] for key, part in value.items()])
    return [pairs_of(part) for part in value] if isinstance(value, list) else value


def render(value: Any) -> str:
    """The value as JSON, or nearly."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {render(part)}" for key, part in value) + "}"
    return "[" + ", ".join(map(render, value)) + "]" if isinstance(value, list) else json.dumps(value)


def _slots(value: Any) -> list[tuple[list, int]]:
    """Where values stand: the list, or the pair, and the position in it."""
    found = []
    if isinstance(value, Pairs):
        for pair in value:
            found += [(pair, 1), *_slots(pair[1])]
    elif isinstance(value, list):
        for i, part in enumerate(value):
            found += [(value, i), *_slots(part)]
    return found


def _damaged_value(value: Any, kind: str, place: int, what: Any) -> Any:
    whole = [value]
    slots = [(whole, 0), *_slots(value)]
    holder, i = slots[place % len(slots)]
    mappings = [holder[i] for holder, i in slots if isinstance(holder[i], Pairs) and holder[i]]
    if kind == "put":
        holder[i] = pairs_of(what)
    elif kind == "swap":
        other, j = slots[what % len(slots)]
        holder[i], other[j] = deepcopy(other[j]), deepcopy(holder[i])
    elif mappings and kind in ("drop", "double", "rename"):
        mapping = mappings[place % len(mappings)]
        pair = mapping[place % len(mapping)]
        if kind == "drop":
            mapping.remove(pair)
        elif kind == "double":
            mapping.append([pair[0], pairs_of(what)])
        else:
            pair[0] = what
    return whole[0]
