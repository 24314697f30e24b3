"""Configuration: read strictly, overridden by dotted keys, written out whole; a mistake is one line with its remedy."""

from datetime import date
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmem.config import (
    Config,
    EvaluateSection,
    Section,
    dump_config,
    load_config,
    packaged_configs,
    parse_config,
)
from latentmem.errors import ConfigError
from latentmem.memory_names import MemoryName
from latentmem.parsing import parse_yaml

DATA = "data: {kind: reasoning_gym, families: [{name: chain_sum}]}\n"
ROWS = "run: r\ndata: {kind: qa, schema: popqa, train: {path: a}, test: {path: b}}\n"


@pytest.fixture
def load(tmp_path):
    def load(text="", *overrides):
        path = tmp_path / "c.yaml"
        path.write_text(text if "data:" in text else f"run: r\n{DATA}{text}")
        return load_config(str(path), list(overrides))

    return load


def test_overrides_reach_sections_lists_and_parts_that_the_file_leaves_out(load):
    config = load(
        "lmpo:\n",
        "lmpo.group_size=4",
        "sampling.temperature=0.5",
        "data.families.0.params={max_terms: 2}",
        "evaluate.memories=[none]",
        "composer.model=null",
        "run=a=b",
    )
    assert (config.lmpo.group_size, config.sampling.temperature, config.run) == (4, 0.5, "a=b")
    assert config.data.families[0].params == {"max_terms": 2}
    assert [*map(str, config.evaluate.memories)] == ["none"]


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "1.e-4"])
def test_numbers_with_an_exponent_are_numbers_in_file_and_override(load, number):
    assert load(f"lmpo: {{learning_rate: {number}}}\n").lmpo.learning_rate == 1e-4
    assert load("", f"lmpo.learning_rate={number}").lmpo.learning_rate == 1e-4


def test_a_whole_number_does_where_a_fraction_is_expected_but_not_the_reverse(load):
    assert load("", "sampling.temperature=1").sampling.temperature == 1.0
    with pytest.raises(ConfigError, match=r"seed is 1\.5"):
        load("", "seed=1.5")


MISTAKES = [
    # text of the file (the needed keys are added), overrides, what the line says after "FILE: "
    ("lmpo: {group_sise: 4}\n", [], "unknown key 'lmpo.group_sise'; did you mean 'group_size'?"),
    ("", ["lmop.group_size=4"], "unknown key 'lmop'; did you mean 'lmpo'?"),
    ("", ["data.familes=[]"], "unknown key 'data.familes'; did you mean 'families'?"),
    ("", ["data.families.0.nmae=x"], "unknown key 'data.families.0.nmae'; did you mean 'name'?"),
    ("rnu: r\n" + DATA, [], "unknown key 'rnu'; did you mean 'run'?"),
    (ROWS, ["data.train={pth: a}"], "unknown key 'data.train.pth'; did you mean 'path'?"),
    (ROWS, ["data.schema=popq"], "data.schema is 'popq'; expected 'popqa', 'triviaqa', 'strategyqa' or 'gsm8k'"),
    (ROWS, ["data.train.hub=x/y"], "data.train needs either path or hub, and not both; to replace the whole section"),
    (ROWS, ["data.train={hub: x/y}"], "data.train names a hub data set without its split; add split"),
    ("", ["team={kind: programm}"], "team.kind is 'programm'; expected 'program'"),
    ("", ["team={command: [x]}"], "team.kind: missing; it has no default"),
    ("", ["team={kind: program}"], "team has neither command nor call; give one of them"),
    ("", ["team={kind: program, command: [a], call: 'a:b'}"], "team has command and call; give one of them"),
    ("", ["team={kind: program, comand: [a]}"], "unknown key 'team.comand'; did you mean 'command'?"),
    ("", ["team={kind: program, call: solve}"], "team.call is 'solve'; expected module:function, such as my_module:"),
    ("", ["team={kind: program, command: [a], roles: [{name: x}]}"], "team.roles.0.profile: missing; it has no defau"),
    ("", ["train_teams=[{kind: program, comand: [a]}]"], "unknown key 'train_teams.0.comand'; did you mean 'command'?"),
    ("", ["team=3"], "team is 3 (int); input should be a valid string"),
    ("", ["model.engine.kind=vlm"], "model.engine.kind is 'vlm'; did you mean 'vllm'?"),
    ("", ["model.engine=vllm"], "model.engine is 'vllm' (str); expected a section of keys and values"),
    ("", ["model.engine={kind: vllm}"], "model.engine.urls: missing; it has no default"),
    ("", ["model.engine={kind: vllm, url: [x]}"], "unknown key 'model.engine.url'; did you mean 'urls'?"),
    ("", ["model.engine={kind: vllm, urls: [x]}"], "model.engine.urls.0 is 'x'; expected a web address such as http"),
    ("", ["model.engine={kind: vllm, urls: ['http://x', 'http://x']}"], "model.engine names one address twice"),
    (ROWS, ["data.search.topk=2"], "data.search.url: missing; it has no default"),
    (ROWS, ["data.search={url: 'http://x', topkk: 2}"], "unknown key 'data.search.topkk'; did you mean 'topk'?"),
    (ROWS, ["data.search.url=localhost"], "data.search.url is 'localhost'; expected a web address such as http://127"),
    (ROWS, ["data.search.url=http://x"], "max_turns is 1; data.search needs a turn to search and one to answer, set it "
     "to 2 or more"),
    ("", ["data.kind=resoning_gym"], "data.kind is 'resoning_gym'; did you mean 'reasoning_gym'?"),
    ("", ["data.families=[]"], "data.families is [] (list); expected at least one entry"),
    ("", ["data={kind: pddl, worlds: [hanoi]}"], "data.worlds.0 is 'hanoi'; expected 'gripper', 'blockworld', "
     "'barman' or 'tyreworld'"),
    ("", ["data={kind: pddl, sise: small}"], "unknown key 'data.sise'; did you mean 'size'?"),
    ("", ["data=3"], "data is 3 (int); expected a section of keys and values"),
    (DATA, [], "run: missing; it has no default"),
    ("", ["run="], "run is None (NoneType); input should be a valid string"),
    ("", ["run=''"], "run is '' (str); expected some text"),
    ("lmpo:\n", [], "lmpo is empty; give it keys and values, or remove the line"),
    ("1: 2\n", [], "key '1' is not text; quote it, or remove it"),
    ("", ["lmpo.group_size=four"], "lmpo.group_size is 'four' (str); input should be a valid integer"),
    ("", ["lmpo.group_size='4'"], "lmpo.group_size is '4' (str); input should be a valid integer"),
    ("", ["lmpo.group_size=1"], "lmpo.group_size is 1; advantages need at least 2 rollouts per task, set it to 4 or "
     "more"),
    ("", ["lmpo.delta=1.1"], "lmpo has delta 1.1; it must be above 1 + epsilon_high = 1.2"),
    ("", ["sampling.temperature=-1"], "sampling.temperature is -1 (int); input should be greater than or equal to 0"),
    ("run: r\nsampling: {temperature: .nan}\n" + DATA, [], "not valid YAML: '.nan' is not a finite number in line 2"),
    ("", ["bank.rating=logit"], "bank.rating is 'logit'; expected 'none' or 'logits'"),
    ("", ["bank.rating_max_tokens=0"], "bank.rating_max_tokens is 0 (int); input should be greater than 0"),
    ("", ["memory.step={acton}"], "memory.step is {'acton': None} (dict); input should be a valid string"),
    ("", ["memory.step='{acton}'"], "memory.step is a template: unknown field {acton}; did you mean 'action'?"),
    ("", ["memory.solved='{task}'"], "memory.solved is a template: unknown field {task}; known: "),
    ("", ["memory.steps=x"], "unknown key 'memory.steps'; did you mean 'step'?"),
    ("", ["rivals.gmemory.hop=2"], "unknown key 'rivals.gmemory.hop'; did you mean 'hops'?"),
    ("", ["rivals.voyager.summary='{episod}'"], "rivals.voyager.summary is a template: unknown field {episod}; did you "
     "mean 'episode'?"),
    ("", ["rivals.gmemory.project='{task} {insights}'"], "rivals.gmemory.project lacks the field {role}, "
     "which this prompt needs; add it"),
    ("", ["rivals.gmemory.threshold=2"], "rivals.gmemory.threshold is 2 (int); input should be less than or equal to"),
    ("", ["evaluate.memories=[gmemry]"], "evaluate.memories names 'gmemry', which is not a memory; did you mean 'gmem"),
    ("", ["collect.memory=oagent"], "collect.memory is 'oagent'; expected 'none', 'text', 'latent', 'metagpt', "
     "'voyager', 'generative', 'oagents' or 'gmemory'"),
    ("", ["evaluate.memories=[txt]"], "evaluate.memories names 'txt', which is not a memory; did you mean 'text'?"),
    ("", ["evaluate.memories=['latent:warmup:randm']"], "evaluate.memories names 'latent:warmup:randm', which is not"),
    ("", ["sft.initial=sft"], "sft.initial is 'sft'; expected untrained, warmup or a compo"),
    ("", ["sft.demonstrations=bnak"], "sft.demonstrations is 'bnak'; expected bank, domain or the path of a .jsonl"),
    ("", ["evaluate.memories=[grop]"], "evaluate.memories names 'grop', which is not a memory; did you mean 'grpo'?"),
    ("", ["evaluate.memories=['grpo:']"], "evaluate.memories names 'grpo:', which is not a memory; did you mean 'gr"),
    ("", ["grpo.group_size=1"], "grpo.group_size is 1; advantages need at least 2 rollouts per task, set it to 4 or "
     "more"),
    ("", ["grpo.delta=1.1"], "grpo has delta 1.1; it must be above 1 + epsilon_high = 1.2"),
    ("", ["grpo.projection_rate=1"], "unknown key 'grpo.projection_rate'; "),
    ("", ["grpo.target_modules=[]"], "grpo.target_modules is [] (list); expected at least one entry"),
    ("", ["evaluate.memories=['latent:sft:randm']"], "evaluate.memories names 'latent:sft:randm', which is not a "
     "memory; did you mean 'latent:sft:random'?"),
    ("", ["evaluate.memories=['latent:lmpo:random:other-role']"], "evaluate.memories names "
     "'latent:lmpo:random:other-role', which is not a memory; "),
    ("", ["evaluate.memories=['text:random']"], "evaluate.memories names 'text:random', but random is a control "
     "for latents, and text has none; take one of empty, shuffle, irrelevant, corrupt, filler, or a latent memory"),
    ("", ["evaluate.memories=['text:fillr']"], "evaluate.memories names 'text:fillr', which is not a memory; "
     "did you mean 'text:filler'?"),
    ("", ["evaluate.memories=['voyager:empty']"], "evaluate.memories names 'voyager:empty', which is not a memory; "),
    ("", ["evaluate.memories=['latent:sft:irrelevant', 'latent:sft:other-task']"],
     "evaluate.memories names one memory twice"),
    ("", ["evaluate.memories=[none, none]"], "evaluate.memories names one memory twice"),
    ("", ["evaluate.memories=none"], "evaluate.memories is 'none' (str); expected a list"),
    ("", ["evaluate.memories=[]"], "evaluate.memories is [] (list); expected at least one entry"),
    ("run: r\nrun: s\n" + DATA, [], "not valid YAML: key 'run' is given twice in line 2, column 1: run: s ^"),
    (ROWS.replace("path: a", "path: " + "a" * 300), [], f"data.train.path is '{'a' * 40}'..., which cannot name"),
    ("", ["team=" + "x" * 5000], f"team is '{'x' * 40}'..., which cannot name a file; a name has at most 255 bytes"),
    ("", ["evaluate.memories=['latent:" + "é" * 130 + "']"], "evaluate.memories is 'latent:"),
    ("run: r\nteam: \"a\\0b\"\n" + DATA, [], "not valid YAML: a NUL or half of a surrogate pair stands in a text"),
    ("seed: 2026-13-01\nrun: r\n" + DATA, [], "seed is '2026-13-01' (str); input should be a valid integer"),
    ("run: r\ndata: {? [a] : b}\n", [], "not valid YAML: a key is a list or a mapping; a key is text"),
    ("- data:\n", [], "expected a mapping of keys to values, found list"),
    ("data: [\n", [], "not valid YAML: while parsing a flow node"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "message"), MISTAKES, ids=[m[2][:50] for m in MISTAKES])
def test_a_mistake_names_file_key_value_and_remedy(load, tmp_path, text, overrides, message):
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    assert str(error.value).startswith(f"{tmp_path / 'c.yaml'}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lmpo.group_size", "'lmpo.group_size' is not an override; write key=value, as in lmpo.group_size=8"),
        ("=3", "'=3' is not an override; write key=value, as in lmpo.group_size=8"),
        ("lmpo..x=3", "'lmpo..x=3' is not an override; write key=value, as in lmpo.group_size=8"),
        ("lmpo.group_size=[", "'lmpo.group_size=[': the value is not valid YAML"),
        ("data.families." + "9" * 5000 + "=x", "'data.families.999"),
        ("seed=!!int 3", "'seed=!!int 3': the value is not valid YAML: the tag"),
        ("run.x=3", "'run.x=3': run is a value, not a section"),
        ("data.families.3.name=x", "'data.families.3.name=x': the list there has 1 entries; give a position from 0"),
        ("data.families.a.name=x", "'data.families.a.name=x': the list there has 1 entries; give a position from 0"),
        ("data.families.1=x", "'data.families.1=x': the list there has 1 entries; give a position from 0"),
    ],
)
def test_a_wrong_override_is_quoted(load, override, message):
    with pytest.raises(ConfigError) as error:
        load("", override)
    assert str(error.value).startswith(message)


def test_a_line_break_at_the_end_of_a_template_is_the_editors(load):
    assert load("memory:\n  text: |\n    Past:\n    {memory}\n").memory.text == "Past:\n{memory}"


def test_a_missing_file_names_the_nearest_packaged_configuration(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config("quickstat")
    assert str(error.value) == (
        "quickstat: no such file, and no packaged configuration of that name; did you mean 'quickstart'?"
    )
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize("name", sorted(packaged_configs()))
def test_packaged_configurations_are_valid_and_survive_being_written_out(name, tmp_path):
    config = load_config(name)
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "resolved.yaml")) == config


BENCHMARKS = ("bigcodebench", "gsm8k", "humaneval", "kodcode", "mbpp", "popqa", "strategyqa", "triviaqa")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_packaged_benchmarks_cut_train_and_test_from_the_hub_without_overlap(name):
    data = load_config(name).data
    assert data.schema_ == name
    train, test = data.train, data.test
    if (train.hub, train.name, train.split) == (test.hub, test.name, test.split):
        assert train.skip + train.limit <= test.skip
    assert data.train.on_bad_row == data.test.on_bad_row == "error"


def test_the_original_sizes_are_the_packaged_ones():
    # From KANABOON1/LatentMem @ efbbdeb, data/{kodcode,triviaqa,popqa}/builder.py; validation counts as train here.
    sizes = {}
    for name in ("kodcode", "popqa", "triviaqa"):
        config = load_config(name)
        sizes[name] = (config.data.train.limit, config.lmpo.eval_tasks, config.data.test.skip)
    assert sizes == {"kodcode": (7000 + 1000, 1000, 8000), "popqa": (7000, 1000, 7000), "triviaqa": (5000, 1000, 1000)}


TEXTS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])  # those two are in no file of ours


@settings(deadline=None, max_examples=30)
@given(st.text(TEXTS, min_size=1), st.floats(min_value=1e-300, max_value=1e300), st.text(TEXTS))
def test_any_text_and_number_survives_being_written_out(run, rate, value):
    config = parse_config(
        {
            "run": run,
            "data": {"kind": "reasoning_gym", "families": [{"name": "x", "params": {"a": value}}]},
            "sft": {"learning_rate": rate},
        }
    )
    assert parse_config(parse_yaml(dump_config(config))) == config


@pytest.mark.parametrize("run", ["1e5", "+2E-3", "yes", "null", "1_0", "2020-01-01", "a: b"])
def test_texts_that_look_like_something_else_stay_texts_when_written_out(run, tmp_path):
    config = parse_config({"run": run, "data": {"kind": "reasoning_gym", "families": [{"name": "x"}]}})
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "c.yaml")).run == run


def test_the_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config("quickstart").run = "x"


def sections(section=Config):
    """All sections below one, itself included."""
    yield section
    for field in section.model_fields.values():
        arguments = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in [get_args(a)[0] if get_origin(a) is Annotated else a for a in arguments]:
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind)


def test_every_key_is_documented():
    missing = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if not (field.description or name in Config.model_fields)  # a section of Config is told by its own docstring
    ]
    assert missing == []


# docs/configuration.md is made from the docstrings: `python tests/test_config.py` writes it anew.

DOCS = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- Made from the docstrings in src/latentmem/config/ by `python tests/test_config.py`; edit them there. -->"


def reference():
    """The tables of all keys, a heading for each section."""
    skip = {s for s in Config.model_fields if nested(Config, s) and s != "team"}
    parts = ["## At the top", "", *table(Config, skip)]
    for name in Config.model_fields:
        for section in nested(Config, name):
            title = name if name not in ("team", "data") else f"{name}, kind: {kind_of(section)}"
            parts += ["", f"## {title}", "", " ".join(section.__doc__.split()), "", *table(section)]
    for title, (section, preset) in parts_of_sections().items():
        parts += ["", f"## {title}", "", *table(section, preset=preset)]
    return "\n".join(parts) + "\n"


ELSEWHERE = {
    "Rows": "Rows: data.train and data.test",
    "Family": "One of data.families",
    "MixPart": "One of data.train or data.test, kind: mix",
    "ServedRole": "One of serve.roles or team.roles",
}
"""Headings of sections that stand in several places."""


def parts_of_sections():
    """The sections within sections by their headings, each with the default that its key has."""
    found = {}
    for name in Config.model_fields:
        for key, field in ((k, f) for section in nested(Config, name) for k, f in section.model_fields.items()):
            kinds = nested_in(field)
            for part in kinds:
                title = f"{name}.{key}" + (f", kind: {kind_of(part)}" if len(kinds) > 1 else "")
                found.setdefault(ELSEWHERE.get(part.__name__, title), (part, field.default))
    return found


def kind_of(section):
    kinds = get_args(section.model_fields["kind"].annotation)
    return kinds[0] if kinds else "module:Name"


def nested(section, name):
    return nested_in(section.model_fields[name])


def nested_in(field):
    annotation = field.annotation
    kinds = [get_args(a)[0] if get_origin(a) is Annotated else a for a in (annotation, *get_args(annotation))]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def table(section, skip=(), preset=None):
    """Its rows; with the values of `preset` as defaults, where the key of a section has one."""
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name not in skip:
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            told = default(field, getattr(preset, name, field.default))
            rows.append(f"| `{field.alias or name}` | {told} | {values(field)} | {meaning} |")
    return rows


def default(field, value):
    if field.is_required():
        return "required"
    if isinstance(value, Section):
        return "see below"
    style = '"' if isinstance(value, str) and "\n" in value else None
    plain = [str(one) if isinstance(one, MemoryName) else one for one in value] if isinstance(value, tuple) else value
    text = yaml.dump(plain, default_flow_style=True, default_style=style, width=1000)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def values(field):
    annotation = field.annotation
    options = [a for a in get_args(annotation) if a is not type(None)] if type(None) in get_args(annotation) else []
    kind = options[0] if options else annotation
    metadata = list(field.metadata)
    while get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        metadata += [constraint for m in more for constraint in getattr(m, "metadata", [m])]
    if get_origin(kind) is Literal:
        named = ", ".join(f"`{value}`" for value in get_args(kind))
    elif get_origin(kind) is tuple:
        named = "list"
    elif get_origin(kind) is dict or any(
        isinstance(a, type) and issubclass(a, Section) for a in (kind, *get_args(kind))
    ):
        named = "section"
    elif get_origin(kind) in (Union, UnionType):
        named = "text or section"
    else:
        named = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", date: "YYYY-MM-DD"}[kind]
    signs = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
    bounds = [f"{word} {getattr(m, key):g}" for m in metadata for key, word in signs.items() if hasattr(m, key)]
    return " ".join([named, *bounds]) + (", or null" if options else "")


def test_the_documented_keys_are_those_of_the_schema():
    # If this fails after a change of src/latentmem/config/: python tests/test_config.py
    assert DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].strip() == reference().strip()


def test_each_key_that_is_told_below_has_a_table_below():
    text = DOCS.read_text(encoding="utf-8")
    for name in Config.model_fields:
        for section in nested(Config, name):
            for key, field in section.model_fields.items():
                if default(field, field.default) == "see below":
                    assert f"\n## {name}.{key}" in text, f"{name}.{key}"


def test_a_control_is_told_from_the_memory_it_controls_and_folders_keep_their_colons():
    for text, parts in {
        "latent:runs/a:b/best:other-role": ("latent", "runs/a:b/best", "other-role"),
        "latent:lmpo:other-task": ("latent", "lmpo", "irrelevant"),  # as older results call it
        "metagpt:filler": ("metagpt", "", "filler"),
        "none": ("none", "", None),
        "latent:lmpo": ("latent", "lmpo", None),
        "latent:runs/a:b": ("latent", "runs/a:b", None),
        "latent:random": ("latent", "random", None),
        "latent:a:Random": ("latent", "a:Random", None),
        "text:random": ("text", "random", None),
        "grpo:runs/a:empty": ("grpo", "runs/a:empty", None),
    }.items():
        name = MemoryName.parse(text)
        assert ((name.kind, name.checkpoint, name.control), str(name)) == (parts, text)
        assert str(name.real) + (f":{text.rpartition(':')[2]}" if name.control else "") == text
    names = ["latent:untrained:other-task", "latent:runs/a:b:random", "latent:runs/a:randm", "text:empty"]
    section = EvaluateSection(memories=names)
    assert [*map(str, section.memories)] == section.model_dump(mode="json")["memories"] == names


def test_what_is_no_name_among_memories_is_told(load):
    with pytest.raises(ConfigError, match=r"evaluate.memories has 5; expected the names of memories"):
        load("", "evaluate.memories=[none, 5]")


if __name__ == "__main__":
    before = DOCS.read_text(encoding="utf-8").partition(BEGIN)[0]
    DOCS.write_text(f"{before}{BEGIN}\n\n{reference()}", encoding="utf-8")
