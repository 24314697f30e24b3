"""No password of a URL is shown or written down, wherever a user put the URL."""

import json
import re
from pathlib import Path

import pytest
import yaml

from latentmem import cli
from latentmem.bank_place import read_url
from latentmem.config import dump_config, load_config, parse_config, read_values
from latentmem.errors import ConfigError, LatentMemError
from latentmem.grid.file import load_grid
from latentmem.passwords import hidden, hidden_in
from latentmem.recipes import what_decides

URL = "postgresql://me:hunter2@db.example.org:5432/latentmem?sslmode=require&bank=camel"
SHOWN = URL.replace(":hunter2", "")
DATA = {"kind": "hidden_facts"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URL, SHOWN),
        (f"a {URL}, b '{URL}': c", f"a {SHOWN}, b '{SHOWN}': c"),
        ("postgres://me:hun/t@er2@h", "postgres://me@h"),
        ("postgresql://me:hun?ter2@h/d", "postgresql://me@h/d"),
        ("postgresql://:hunter2@h", "postgresql://@h"),
        ("HTTPS://me:hunter2@h/a:b@c", "HTTPS://me@h/a:b@c"),
        ("postgresql://h/d?password=hunter2&sslpassword=hunter2", "postgresql://h/d?password=***&sslpassword=***"),
        # What has none stays.
        (SHOWN, SHOWN),
        ("http://127.0.0.1:8000/v1, me@home", "http://127.0.0.1:8000/v1, me@home"),
        ("postgresql://h:5432/d?options=a@b", "postgresql://h:5432/d?options=a@b"),
        ("task:7 {a: b@c}", "task:7 {a: b@c}"),
    ],
)
def test_passwords_leave_a_text_and_all_else_stays(text: str, shown: str) -> None:
    assert hidden(text) == shown
    assert hidden(shown) == shown
    assert str(LatentMemError(text)) == shown
    assert hidden_in({text: [text, {"a": (text, 1, None)}]}) == {shown: [shown, {"a": [shown, 1, None]}]}


def test_what_a_server_shows_of_itself_is_the_same() -> None:
    assert str(read_url(URL)) == hidden(URL)


@pytest.mark.parametrize(
    "overrides",
    [
        [f"bank.path='{URL}"],
        ["bank.path='postgresql://me:hunter2' x@h"],
        ["bank.path=postgresql://me:hunter2: x@h"],
        ["bank.path=[postgresql://me:it's hunter2@h"],
        [f"bank.path=[{URL}]"],
        [f"bank={URL}"],
        [f"seed={URL}"],
        [f"bank.index={URL}"],
        [f"bank.path:{URL}"],
        [f"bank.path={URL}#hunter2"],
        [f"{URL}=1"],
        [f"bank.'{URL}'=1"],
        [f"team={URL}"],
        [f"evaluate.memories=['latent:{URL}']", f"bank={{x: {URL}}}"],
    ],
)
def test_no_mistake_in_a_setting_shows_its_password(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), "data": DATA}))
    assert cli.main(["collect", str(file), *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("latentmem: ")
    assert "hunter2" not in captured.out + captured.err


def test_a_file_that_is_no_yaml_is_not_quoted_where_it_holds_addresses(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"run: r\nbank:\n  path: postgresql://{'x' * 99}:it's hunter2: x@h\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: mapping values are not allowed here in line 3") as error:
        load_config(str(file))
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["bank", "inform", URL],
        ["bank", "info", URL, URL],
        ["bank", "search", URL, "x", "-k", URL],
        ["report", "-x", URL],
    ],
)
def test_a_mistake_on_the_command_line_shows_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "hunter2" not in capsys.readouterr().err


def test_a_configuration_is_written_down_without_them(tmp_path: Path) -> None:
    own = {"mine:Memory": {"store": URL, "more": [URL]}}
    values = {
        "run": str(tmp_path), "data": {"kind": "mine:Domain", "rows": URL}, "own": own,
        "bank": {"path": URL}, "evaluate": {"memories": ["none", "mine:Memory"]},
    }  # fmt: skip
    config = parse_config(values)
    assert "hunter2" not in dump_config(config)
    assert "hunter2" not in json.dumps(what_decides(config, "evaluate"))
    assert config.own["mine:Memory"]["store"] == URL  # the class itself is given it
    assert config.bank.path == URL


def test_a_grid_is_written_down_without_them(tmp_path: Path) -> None:
    section = {
        "benchmarks": {"facts": {"data": DATA, "bank.path": URL}},
        "variants": {"here": {"bank.path": URL}, "there": {"bank": {"path": URL}}},
    }
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"run": str(tmp_path / "g"), "grid": section}))
    grid = load_grid(read_values(str(file)), str(file))
    written = json.dumps(grid.section.model_dump(mode="json"))
    assert "hunter2" not in written
    assert re.findall(r"postgresql://me@db", written)
    assert all(run.config.bank.path == URL for run in grid.runs)  # a run itself is given it
