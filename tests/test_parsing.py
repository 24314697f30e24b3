"""What is read of YAML and JSON is plain values; what hurts, or is only nearly a value, is refused in one line."""

import math

import pytest
import yaml

from latentmem.parsing import MAX_DEPTH, Form, PlainDumper, checked, parse_json, parse_yaml


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", {"a": 1e-4}),
        ("a: 2026-13-01\nb: 2026-01-31", {"a": "2026-13-01", "b": "2026-01-31"}),
        ("a: =", {"a": "="}),
        ("a: [0x10, -1, 1.5, yes, null, '1']", {"a": [16, -1, 1.5, True, None, "1"]}),
        ("base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}", {"base": {"x": 1, "y": 2}, "more": {"x": 1, "y": 3}}),
        ("", None),
    ],
)
def test_yaml_has_the_values_of_json_and_merges(text: str, value: object) -> None:
    assert parse_yaml(text) == value


def test_what_an_alias_repeats_is_no_shared_object() -> None:
    values = parse_yaml("a: &a {x: [1]}\nb: *a")
    values["a"]["x"].append(2)
    assert values["b"] == {"x": [1]}


BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)  # a billion values
MERGES = BOMB.replace("[", "{<<: [").replace("]", "]}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2", "key 'a' is given twice in line 2, column 1"),
        ("1: x\n0x1: y", "key 1 is given twice"),
        ("{? [a] : b}", "a key is a list or a mapping"),
        ("a: !!int x", "the tag 'tag:yaml.org,2002:int' is not allowed"),
        ("a: !!python/object/apply:os.getcwd []", "the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd' is not"),
        ("a: &a [*a]", r"the alias \*a stands inside the value"),
        (BOMB, "more than 100000 values, those of aliases included"),
        (MERGES, "more than 100000 values, those of aliases included"),
        (nested(MAX_DEPTH + 1), "nested deeper than 100 levels"),
        (nested(900), "nested deeper than 100 levels"),
        ("a: " + "9" * 5000, "'9{20}' is not a number"),
        ("a: 0xfffffffffffffffffff", "does not fit into 64 bits"),
        ("a: 1e999", "'1e999' is not a finite number"),
        ("a: .nan", "'.nan' is not a finite number"),
        ("a: 0b_", "'0b_' is not a number"),
        ('a: "x\\0y"', "a NUL or half of a surrogate pair stands in a text"),
        ('a: "\\ud800"', "a NUL or half of a surrogate pair stands in a text"),
        ('a: "\\UFFFFFFFF"', "too large"),
        ("a\0b", "special characters are not allowed"),
        ("---\na\n---\nb", "expected a single document"),
    ],
)
def test_yaml_that_is_refused_says_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)


def test_both_read_what_is_nested_as_deeply_as_is_allowed() -> None:
    assert parse_yaml(nested(MAX_DEPTH)) == parse_json(nested(MAX_DEPTH))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"b": 1, "a": 1, "a": 2}', "key 'a' is given twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("1e999", "1e999 is too large for a number"),
        ("9" * 301, "too large for a number"),
        ("9" * 5000, "too large for a number"),
        (nested(MAX_DEPTH + 1), "nested deeper than 100 levels"),
        (nested(900), "nested deeper than 100 levels"),
        ("[" * 100_000, "nested deeper than 100 levels"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested deeper than 100 levels"),
        (r'["x\ud800"]', "half of a surrogate pair stands in a text"),
        (b"\xff{}", "byte 0 is not UTF-8"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_is_refused_says_why(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        parse_json(text)
    assert "\n" not in str(error.value)


def test_json_that_only_looks_odd_is_read() -> None:
    assert parse_json(r'["\ud83d\ude00", "[[[[", 18446744073709551615000, 1e300]') == [
        "😀",
        "[[[[",
        1000 * (2**64 - 1),
        1e300,
    ]
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
    assert parse_json('"' + "[" * 200 + '"') == "[" * 200


def test_what_is_dumped_is_read_back() -> None:
    values = {"a": ["1e-4", "2026-01-01", "yes", "", 1e-4, 1e20, None, True, math.pi], "b": {"c": []}}
    assert parse_yaml(yaml.dump(values, Dumper=PlainDumper)) == values


class Example(Form):
    count: int
    names: tuple[str, ...] = ()


def test_a_form_takes_what_is_relied_on_and_names_what_does_not_fit() -> None:
    assert checked({"count": 3, "names": ["a"], "more": {}}, Example) == Example(count=3, names=("a",))
    with pytest.raises(ValueError, match=r"^count: input should be a valid integer$"):
        checked({"count": "3"}, Example)
    with pytest.raises(ValueError, match=r"^names.0: input should be a valid string$"):
        checked({"count": 3, "names": [1]}, Example)
    with pytest.raises(ValueError, match=r"^input should be an object$"):
        checked([], Example)
