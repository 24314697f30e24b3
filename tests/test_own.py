"""Classes that a configuration names: made with the keys beside them; each mistake is one line."""

from pathlib import Path

import pytest

from latentmem import own
from latentmem.config import load_config
from latentmem.errors import ConfigError
from latentmem.memory_names import MemoryName
from latentmem.teams.team import load_team

MODULE = """
class Mine:
    name = "mine"

    def __init__(self, size: int = 3, words: list[str] = [], *, bank=None):
        self.size, self.words, self.bank = size, words, bank


class Needy:
    def __init__(self, must):
        self.name = must


class Broken:
    name = "broken"

    def __init__(self):
        raise ValueError("out of order")


class Open:
    name = "open"

    def __init__(self, **keys):
        self.keys = keys
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of its own for each test, in the folder that a command would be started in."""
    name = f"own_{abs(hash(tmp_path.as_posix()))}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    return name


def test_a_class_is_made_with_its_parameters_and_what_it_asks_for(module: str) -> None:
    made = own.make(f"{module}:Mine", {"size": 5}, "data", ["name", "size"], {"bank": lambda: "the bank", "x": never})
    assert (made.size, made.words, made.bank) == (5, [], "the bank")
    assert own.make(f"{module}:Open", {"any": 1}, "data", ["name"]).keys == {"any": 1}


def never() -> None:
    raise AssertionError("made although nobody asks for it")


def test_checking_makes_nothing(module: str) -> None:
    make = own.bind(f"{module}:Broken", {}, "data", ["name"])
    with pytest.raises(ConfigError, match=r":Broken cannot be made: ValueError: out of order$"):
        make()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("Mine", {"sise": 5}, "data.sise: {0} takes no such parameter; did you mean 'size'?"),
        ("Mine", {"bank": 5}, "data.bank: {0} takes no such parameter; "),
        ("Mine", {"size": "five"}, "data.size is 'five' (str); input should be a valid integer"),
        ("Mine", {"words": [1]}, "data.words is [1] (list); input should be a valid string"),
        ("Needy", {}, "data.must: missing; {0} has no default for it"),
        ("Broken", {}, "data: {0} cannot be made: ValueError: out of order"),
        ("Mien", {}, "no class 'Mien'; did you mean 'Mine'?"),
        ("Open", {"a": 1}, None),
    ],
)
def test_a_mistake_is_one_line(module: str, name: str, parameters: dict, message: str | None) -> None:
    full = f"{module}:{name}"
    if message is None:
        own.make(full, parameters, "data", ["name"], {"bank": lambda: None})
        return
    with pytest.raises(ConfigError) as error:
        own.make(full, parameters, "data", ["name"], {"bank": lambda: None})
    assert message.format(full) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_an_object_lacks_is_told(module: str) -> None:
    with pytest.raises(ConfigError, match=r"^team: .*:Mine lacks roles, turn; it needs name, roles, turn$"):
        load_team(f"{module}:Mine")


def test_a_module_that_is_not_there_or_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data: no module 'nowhere_at_all' in "):
        own.make("nowhere_at_all:Mine", {}, "data", [])
    (tmp_path / "own_fails.py").write_text("import no_such_package_anywhere", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"^data: own_fails needs module 'no_such_package_anywhere', which is not installed$"
    ):
        own.make("own_fails:Mine", {}, "data", [])
    (tmp_path / "own_wrong.py").write_text("def (", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^data: own_wrong cannot be imported: SyntaxError: "):
        own.make("own_wrong:Mine", {}, "data", [])


def test_a_configuration_names_them_and_holds_their_parameters(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "run: r\nteam: a_module:Team\ndata: {kind: a_module:Domain, size: 3, words: [a, b]}\n"
        "own: {a_module:Team: {rounds: 2}}\nevaluate: {memories: [none, a_module:Memory]}\n",
        encoding="utf-8",
    )
    config = load_config(str(path))
    assert config.data.parameters == {"size": 3, "words": ["a", "b"]}
    assert config.own == {"a_module:Team": {"rounds": 2}}
    name = config.evaluate.memories[1]
    assert (name.is_own, name.needs_bank, name.learns, str(name)) == (True, True, False, "a_module:Memory")
    with pytest.raises(ConfigError, match=r"own has parameters for 'a_module:Taem', which is not a team or memory"):
        load_config(str(path), ["own={a_module:Taem: {rounds: 2}}"])


def test_names_that_are_nearly_those_of_memories_stay_mistakes() -> None:
    assert not MemoryName.parse("latent:lmpo").is_own
    assert not MemoryName.parse("latnet:lmpo").is_own
    assert not MemoryName.parse("latent:Folder").is_own
