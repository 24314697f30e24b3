"""Files laid out as the authors publish them, made up here and, where they lie beside the checkout, the golden ones."""

import copy
import json
import logging
import sqlite3
import string

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from latentmem import cli, released
from latentmem.bank import ExperienceBank
from latentmem.config import ComposerSection, MemorySection
from latentmem.errors import CheckpointError, DataError, ModelError
from latentmem.memory.checkpoints import read_checkpoint
from latentmem.memory.composer import Composer
from latentmem.memory.latent import LatentMemory
from latentmem.models.assets import quiet_loading
from latentmem.models.language_model import LanguageModel
from latentmem.released import read_bank, read_weights
from latentmem.trajectory import Message, Recalled, Role, Step, Task, Trajectory

pytestmark = pytest.mark.usefixtures("no_embedding_model")

THEIRS = "centralized_memory."
LM = f"{THEIRS}weaver.model.base_model.model."
K, RANK, ALPHA = 3, 2, 5.0
TARGETS = ("k_proj", "q_proj")
TEMPLATE = "Past:\n{memory}\n\nMine: {role_messages}\nNow {task} for {role}, {num_latents} tokens"


@pytest.fixture
def run(capsys):
    """Run a command; its status, and the lines of standard output or, where it fails, its one line of error."""

    def run(*words):
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        if status == 0:
            return status, out.splitlines()
        (line,) = [line for line in err.splitlines() if line.startswith("latentmem: ")]
        return status, line.removeprefix("latentmem: ")

    return run


@pytest.fixture(scope="session")
def golden(shared_dir):
    folder = shared_dir / "golden" / "reference-a"
    if not folder.is_dir():
        pytest.skip(f"no golden numbers at {folder}")
    return folder


# Weights


def their_weights(model_dir, targets=TARGETS, width=32, agents_width=32, seed=5):
    """A state dict as the authors' trainer writes it: base weights, tied ones twice, and the trained tensors."""
    draw = torch.Generator().manual_seed(seed)
    state = load_file(model_dir / "model.safetensors")
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"].clone())
    weights = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in targets:
            weights[LM + name] = tensor
            continue
        weights[f"{LM}{layer}.base_layer.weight"] = tensor
        weights[f"{LM}{layer}.lora_A.default.weight"] = torch.randn(RANK, tensor.shape[1], generator=draw)
        weights[f"{LM}{layer}.lora_B.default.weight"] = torch.randn(tensor.shape[0], RANK, generator=draw)
    weights[f"{THEIRS}weaver.query_latents"] = torch.randn(K, width, generator=draw)
    weights[f"{THEIRS}weaver2agent_proj.weight"] = torch.randn(agents_width, width, generator=draw)
    weights[f"{THEIRS}weaver2agent_proj.bias"] = torch.randn(agents_width, generator=draw)
    return weights


def is_trained(name):
    return "lora_" in name or "query_latents" in name or "weaver2agent_proj" in name


def written(path, weights):
    path.parent.mkdir(exist_ok=True)
    save_file(weights, path, {"format": "pt"})
    return path


@pytest.fixture
def file(tmp_path, tiny_model_dir):
    return written(tmp_path / "theirs" / "model.safetensors", their_weights(tiny_model_dir))


def plain_latents(model_dir, weights, ids, scale):
    """The latents by a plain model whose layers have the LoRA matrices added to their weights."""
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    for name in weights:
        if name.endswith(".lora_A.default.weight"):
            layer = name.removesuffix(".lora_A.default.weight")
            delta = weights[f"{layer}.lora_B.default.weight"] @ weights[name]
            modules[layer.removeprefix(LM)].weight.data += scale * delta
    queries = weights[f"{THEIRS}weaver.query_latents"]
    embeddings = torch.cat([model.get_input_embeddings()(torch.tensor(ids)), queries])
    with torch.no_grad():
        hidden = model.model(inputs_embeds=embeddings[None]).last_hidden_state[0, -len(queries) :]
    return hidden @ weights[f"{THEIRS}weaver2agent_proj.weight"].T + weights[f"{THEIRS}weaver2agent_proj.bias"]


def test_an_imported_composer_computes_what_a_plain_model_with_merged_adapters_does(
    run, file, tiny_model_dir, tmp_path
):
    out = tmp_path / "out"
    (tmp_path / "template.txt").write_text(TEMPLATE + "\n")
    words = ("--base", tiny_model_dir, "--out", out, "--alpha", ALPHA, "--template", tmp_path / "template.txt")
    status, lines = run("checkpoint", "import", file, *words, "--max-prompt-tokens", 77)
    assert status == 0
    # Two targets of 2 layers with A and B, and three tensors more.
    assert lines[0] == f"11 tensors written to {out}: K 3, rank 2, alpha 5, k_proj, q_proj, width 32 to 32"
    composer = Composer.from_pretrained(out)
    assert composer.settings() == {
        "base_model": str(tiny_model_dir), "agents": str(tiny_model_dir), "num_latents": 3, "d_composer": 32,
        "d_agent": 32, "rank": 2, "alpha": 5.0, "target_modules": ["k_proj", "q_proj"], "template": TEMPLATE,
        "words": MemorySection().model_dump(exclude={"text"}), "max_prompt_tokens": 77,
        "slots": None, "sharpness": 2.0, "cue": None,
    }  # fmt: skip
    ids = composer.backbone.encode("a memory of similar tasks")
    expected = plain_latents(tiny_model_dir, load_file(file), ids, ALPHA / RANK)
    torch.testing.assert_close(
        composer.compose(["a memory of similar tasks"])[0].detach(), expected, atol=1e-5, rtol=1e-5
    )


def test_alpha_and_length_default_to_those_of_the_configuration(file, tiny_model_dir):
    settings = read_weights(file, str(tiny_model_dir)).settings
    assert (settings["alpha"], settings["max_prompt_tokens"]) == (32.0, 1024)


def test_the_golden_weights_give_the_golden_latents(run, golden, tmp_path):
    out = tmp_path / "out"
    assert run("checkpoint", "import", golden / "checkpoint" / "model.safetensors", "--base", golden / "model",
               "--out", out)[0] == 0  # fmt: skip
    composer = Composer.from_pretrained(out)
    cases = np.load(golden / "composer.npz")
    texts = [name for name in cases.files if name.startswith("prompt_ids_")]
    assert len(texts) == 7
    composer.backbone.encode = lambda name: cases[name].tolist()
    with torch.no_grad():
        latents = composer.compose(texts)
    for name, found in zip(texts, latents, strict=True):
        expected = torch.from_numpy(cases[name.replace("prompt_ids", "latents")])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def sharded(folder, weights):
    """Two shards and their index, in a folder of their own."""
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, inside in parts.items():
        written(folder / part, {name: weights[name] for name in inside})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: part for part, inside in parts.items() for name in inside}}))
    return index


def test_file_folder_shards_and_bare_adapters_give_the_same_tensors(tmp_path, file, tiny_model_dir):
    weights = load_file(file)
    index = sharded(tmp_path / "shards", weights)
    bare = written(
        tmp_path / "bare.safetensors", {name: tensor for name, tensor in weights.items() if is_trained(name)}
    )
    expected = read_weights(file, str(tiny_model_dir))
    assert "have the shapes of" in expected.base_check
    assert expected.base_check.endswith("and the values of model.embed_tokens.weight and model.norm.weight")
    assert torch.equal(expected.tensors["query_latents"], weights[f"{THEIRS}weaver.query_latents"])
    for source in (file.parent, index, index.parent, bare):
        found = read_weights(source, str(tiny_model_dir))
        assert found.settings == expected.settings
        assert found.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert found.base_check == f"no base weights beside them; the LoRA matrices fit {str(tiny_model_dir)!r}"


def test_bfloat16_tensors_become_float32_and_agree_with_a_float32_base(tmp_path, file, tiny_model_dir):
    coarse = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    found = read_weights(written(tmp_path / "coarse.safetensors", coarse), str(tiny_model_dir))
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    assert torch.equal(found.tensors["projection.bias"], coarse[f"{THEIRS}weaver2agent_proj.bias"].float())
    assert "the values of" in found.base_check


def test_frozen_weights_are_never_read_whole(monkeypatch, file, tiny_model_dir):
    read, sliced = [], []

    class Slice:
        def __init__(self, name, inner):
            self.name, self.inner = name, inner

        def get_shape(self):
            return self.inner.get_shape()

        def __getitem__(self, rows):
            sliced.append((self.name, rows))
            return self.inner[rows]

    class Spy:
        def __init__(self, path, framework):
            self.inner = safe_open(path, framework=framework)

        def __enter__(self):
            self.inner = self.inner.__enter__()
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def keys(self):
            return self.inner.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.inner.get_tensor(name)

        def get_slice(self, name):
            return Slice(name, self.inner.get_slice(name))

    safe_open = released.weights.safe_open
    monkeypatch.setattr(released.weights, "safe_open", Spy)
    read_weights(file, str(tiny_model_dir))
    assert all(map(is_trained, read))
    norm, embeddings = "model.norm.weight", "model.embed_tokens.weight"
    assert {name for name, _ in sliced} == {norm, embeddings, LM + norm, LM + embeddings}
    assert all(rows == slice(None, 64) for _, rows in sliced)


def test_missing_and_unexpected_keys_are_all_named_if_few_else_the_first_and_the_number(tmp_path, file, tiny_model_dir):
    weights = load_file(file)
    gone = [f"{LM}model.layers.1.self_attn.q_proj.lora_{part}.default.weight" for part in "AB"]
    few = {name: tensor for name, tensor in weights.items() if name not in gone} | {"stray": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        read_weights(written(tmp_path / "few.safetensors", few), str(tiny_model_dir))
    assert str(error.value) == (
        f"{tmp_path}/few.safetensors: 2 keys missing: {gone[0]}, {gone[1]}; 1 keys unexpected: stray; "
        f"is {str(tiny_model_dir)!r} the base it was trained on, and the file whole?"
    )
    many = weights | {f"stray{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match=r": 9 keys unexpected: stray0, .*, stray5 and 3 more; is '"):
        read_weights(written(tmp_path / "many.safetensors", many), str(tiny_model_dir))


QUERIES, BIAS = f"{THEIRS}weaver.query_latents", f"{THEIRS}weaver2agent_proj.bias"
FIRST_A = f"{LM}model.layers.0.self_attn.q_proj.lora_A.default.weight"
EMBEDDINGS, NORM = f"{LM}model.embed_tokens.weight", f"{LM}model.norm.weight"


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (QUERIES, lambda t: t[:, :30].clone(), f"{QUERIES} has shape [3, 30], expected [3, 32]"),
        (QUERIES, lambda t: t[:0].clone(), f"{QUERIES} has shape [0, 32], expected [1, 32]"),
        (QUERIES, lambda t: t[0, 0].clone(), f"{QUERIES} has shape [], expected [1, 32]"),
        (BIAS, lambda t: t[:4].clone(), f"{BIAS} has shape [4], expected [32]"),
        (BIAS, lambda t: t * torch.nan, "projection.bias holds values that are not finite"),
        (FIRST_A, lambda t: torch.cat([t, t]), f"{FIRST_A} has shape [4, 32], expected [2, 32]"),
        (EMBEDDINGS, lambda t: t[:9].clone(), f"{EMBEDDINGS} has shape [9, 32]"),
        (EMBEDDINGS, lambda t: t + 0.1, "its base weights are not those of"),
        (NORM, lambda t: t * 1.1, "its base weights are not those of"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, file, tiny_model_dir, name, change, told):
    weights = load_file(file)
    weights[name] = change(weights[name])
    with pytest.raises(CheckpointError) as error:
        read_weights(written(tmp_path / "x.safetensors", weights), str(tiny_model_dir))
    assert told in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/x.safetensors: ")


def test_another_base_is_told_by_its_keys_or_shapes(file, other_model_dir, tmp_path):
    # Three layers of width 48 where the file has two of 32.
    with pytest.raises(CheckpointError, match=r"keys missing: .*layers\.2\.self_attn.*is '.*' the base"):
        read_weights(file, str(other_model_dir))
    with pytest.raises(ModelError, match="configuration cannot be read"):
        read_weights(file, "no-such/model")


def test_values_are_not_compared_with_a_base_that_would_have_to_be_fetched(monkeypatch, file, tiny_model_dir):
    monkeypatch.setattr(released.weights, "_local_folder", lambda base: None)
    assert "values were not compared" in read_weights(file, str(tiny_model_dir)).base_check


def test_agents_of_another_width(run, tmp_path, tiny_model_dir, other_model_dir):
    file = written(tmp_path / "wide.safetensors", their_weights(tiny_model_dir, agents_width=48))
    out = tmp_path / "out"
    command = ("checkpoint", "import", file, "--base", tiny_model_dir, "--out", out)
    assert "weaver2agent_proj.weight has shape [48, 32], expected [32, 32]" in run(*command)[1]
    assert not out.exists()
    assert run(*command, "--agents", other_model_dir)[0] == 0
    composer = Composer.from_pretrained(out)
    assert (composer.backbone.width, composer.d_agent) == (32, 48)


def test_sources_that_cannot_be_read_are_one_line(run, tmp_path, file, tiny_model_dir):
    def fails(source):
        status, line = run("checkpoint", "import", source, "--base", tiny_model_dir, "--out", tmp_path / "out")
        assert status == 2
        return line

    assert fails(tmp_path / "none.safetensors").startswith(f"{tmp_path}/none.safetensors: no such file")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    assert fails(tmp_path / "cut.safetensors").startswith(
        f"{tmp_path}/cut.safetensors: is not a whole safetensors file"
    )
    (tmp_path / "empty").mkdir()
    assert fails(tmp_path / "empty").startswith(f"{tmp_path}/empty: holds no model.safetensors")
    index = sharded(tmp_path / "shards", load_file(file))
    (tmp_path / "shards" / "model-2.safetensors").unlink()
    assert fails(index).startswith(f"{tmp_path}/shards/model-2.safetensors: no such file")
    for content in ("[1]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1, "b": "c"}}', "[" * 100_000):
        index.write_text(content)
        assert "is not an index of shards" in fails(index)
    index.write_text('{"weight_map": {"a": "../theirs/model.safetensors"}}')
    assert "shard '../theirs/model.safetensors' is not the name of a file beside it" in fails(index)
    plain = written(tmp_path / "plain.safetensors", {"a": torch.zeros(1)})
    assert "none of its 1 keys is a LoRA matrix" in fails(plain)
    assert not (tmp_path / "out").exists()


def test_a_template_is_checked_and_its_absence_is_warned_about(run, tmp_path, file, tiny_model_dir, caplog):
    command = ("checkpoint", "import", file, "--base", tiny_model_dir, "--out", tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        assert run(*command)[0] == 0
    assert "no template is given" in caplog.text
    caplog.clear()
    template = tmp_path / "t.txt"
    template.write_text("{task} {memmory}")
    assert run(*command, "--template", template)[1] == f"{template}: unknown field {{memmory}}; did you mean 'memory'?"
    template.write_bytes(b"\xff")
    assert run(*command, "--template", template)[1].startswith(f"{template}: the template cannot be read")
    assert caplog.text == ""


@pytest.mark.parametrize("template", ["one line {task}", "\n# {task}\n\n  {memory} \nend\n", "a\n b: 'c' # d\ttab\n\n"])
def test_the_printed_sections_give_the_settings_back(file, tiny_model_dir, template):
    settings = read_weights(file, str(tiny_model_dir), template=template).settings
    agents = {**settings, "agents": "elsewhere"}
    printed = yaml.safe_load(released.sections(agents))
    assert printed["model"] == {"name": "elsewhere"}
    assert printed["composer"].pop("model") == str(tiny_model_dir)
    assert printed["composer"] == {key: settings[key] for key in printed["composer"]}
    assert ComposerSection(**printed["composer"]).template == template
    assert "model" not in yaml.safe_load(released.sections(settings))["composer"]


def test_options_out_of_range_are_refused(capsys, file, tiny_model_dir, tmp_path):
    for words in (("--alpha", "0"), ("--alpha", "nan"), ("--alpha", "x"), ("--max-prompt-tokens", "0")):
        with pytest.raises(SystemExit):
            cli.main(["checkpoint", "import", str(file), "--base", "b", "--out", "o", *words])
        assert f"argument {words[0]}: '{words[1]}' is no" in capsys.readouterr().err


def test_info_lists_tensors_by_shape_and_the_size(run, tmp_path, file, tiny_model_dir):
    out = tmp_path / "out"
    run("checkpoint", "import", file, "--base", tiny_model_dir, "--out", out)
    _, lines = run("checkpoint", "info", out)
    assert "   2 x [2, 32]        lora.model.layers.*.self_attn.q_proj.lora_A.weight" in lines
    assert "   1 x [3, 32]        query_latents" in lines
    # q (32 -> 32) and k (32 -> 16) of 2 layers at rank 2, queries, projection.
    assert lines[-1].startswith(f"11 tensors, {2 * (2 * 64 + 2 * 48) + 96 + 1056:,} parameters, 0.0 MB")


# Bank


def their_message(role, system="You are {who}.", user="{memory_content}|{task_description}", response="so", **fields):
    fields = {"task_description": "q", "memory_content": "<|Memory_Empty|>", "extra_fields": {"a": ["b"]}} | fields
    return {
        "message": {
            "system_prompt_template": system,
            "system_prompt_fields": {"who": f"the {role}"},
            "user_prompt_template": user,
            "user_prompt_fields": fields,
            "response": response,
            "state": {"role": role, "model": "SomeModel", "topology_node_id": 0},
        },
        "id": role,
    }


def their_graph(nodes, edges=(), links="links"):
    joined = [{"source": source, "target": target} for source, target in edges]
    return {"directed": True, "multigraph": False, "graph": {}, "nodes": nodes, links: joined}


def their_step(graph, action="a", observation=""):
    return {"state": "s", "action": action, "observation": observation, "mas_message_graph": graph}


def their_entry(text="Which door is red?", label=True, steps=None):
    steps = steps if steps is not None else [their_step(their_graph([their_message("solver")]))]
    return {"task_init_description": text, "label": label, "trajectory": steps}


def nested(entry):
    """The trajectory of an entry as Chroma's metadata hold it: JSON in which each graph is JSON again."""
    steps = copy.deepcopy(entry["trajectory"])
    for step in steps if isinstance(steps, list) else []:
        if isinstance(step, dict) and "mas_message_graph" in step:
            step["mas_message_graph_data"] = json.dumps(step.pop("mas_message_graph"))
    return json.dumps(steps)


def chroma_folder(folder, entries):
    """The part of Chroma's database that matters, its columns as in version 0.6."""
    folder.mkdir()
    with sqlite3.connect(folder / "chroma.sqlite3") as db:
        db.execute("CREATE TABLE embeddings (id INTEGER PRIMARY KEY, segment_id TEXT, embedding_id TEXT, seq_id BLOB)")
        db.execute(
            "CREATE TABLE embedding_metadata (id INTEGER, key TEXT NOT NULL, string_value TEXT, int_value INTEGER, "
            "float_value REAL, bool_value INTEGER, PRIMARY KEY (id, key))"
        )
        for i, entry in enumerate(entries, 1):
            db.execute("INSERT INTO embeddings VALUES (?, 's', ?, x'00')", (i, f"document {i}"))
            text, label = entry["task_init_description"], entry["label"]
            kind = "bool_value" if isinstance(label, bool) else "string_value"
            values = [("task_init_description", "string_value", text), ("label", kind, label),
                      ("trajectory", "string_value", nested(entry)), ("chroma:document", "string_value", text),
                      ("other", "int_value", 7)]  # fmt: skip
            for key, column, value in values:
                db.execute(f"INSERT INTO embedding_metadata (id, key, {column}) VALUES (?, ?, ?)", (i, key, value))
    db.close()
    return folder


def data_json(path, entries):
    path.write_text(json.dumps(entries, indent=4, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def both(tmp_path):
    """Write a bank in both forms; the folder and the file."""

    def both(entries, name="bank"):
        return chroma_folder(tmp_path / name, entries), data_json(tmp_path / f"{name}.json", entries)

    return both


def test_a_made_up_bank_is_read_into_our_form_from_either_of_its_forms(both):
    page = "Page {{1}} of {who}: {page_1} after {memory_content}, {count}"
    graph = their_graph(
        [
            their_message("actor"),
            their_message("critic", user="{memory_content}", response="no {who}"),
            their_message(
                "summary", user=page, page_1="{task_description}é", memory_content="two doors", count=2, who=None
            ),
        ],
        [("actor", "critic"), ("critic", "summary"), ("actor", "summary")],
    )
    steps = [their_step(graph, "first", "wet paint"), their_step({}, "second")]
    entries = [their_entry("Which door is red? 🚪", True, steps), their_entry("Which is blue?", False)]

    def message(role, user, response="so", reads=(), kind="none"):
        return Message(
            role=role, system=f"You are the {role}.", user=user, response=response, token_ids=(), logps=(),
            finish="stop", temperature=1.0, num_prompt_tokens=0, reads=reads, recalled=Recalled(kind=kind),
        )  # fmt: skip

    first = (
        message("actor", "<|Memory_Empty|>|q"),
        message("critic", "<|Memory_Empty|>", "no {who}", (0,)),
        message("summary", "Page {1} of None: {task_description}é after two doors, 2", "so", (0, 1), "text"),
    )
    expected = (
        Trajectory(
            task=Task(id=None, domain="released", text="Which door is red? 🚪"),
            team="released", model="unknown", reward=1.0, success=True, seed=0,
            steps=(Step(messages=first, action="first", observation="wet paint"),
                   Step(messages=(), action="second", observation="")),
        ),
        Trajectory(
            task=Task(id=None, domain="released", text="Which is blue?"),
            team="released", model="unknown", reward=0.0, success=False, seed=0,
            steps=(Step(messages=(message("solver", "<|Memory_Empty|>|q"),), action="a", observation=""),),
        ),
    )  # fmt: skip
    for source in both(entries):
        found = read_bank(source)
        assert found.trajectories == expected
        assert found.unreadable == ()


def test_edges_may_have_the_name_that_newer_networkx_gives_them(both):
    nodes = [their_message("a"), their_message("b")]
    entries = [their_entry(steps=[their_step(their_graph(nodes, [("a", "b")], links))]) for links in ("links", "edges")]
    for source in both(entries):
        assert [t.steps[0].messages[1].reads for t in read_bank(source).trajectories] == [(0,), (0,)]


def changed(path, value):
    """A good entry with one thing in it replaced."""
    entry = their_entry(steps=[their_step(their_graph([their_message("a"), their_message("b")], [("a", "b")]))])
    place = entry
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return entry


GRAPH = ("trajectory", 0, "mas_message_graph")
MESSAGE = (*GRAPH, "nodes", 0, "message")
USER = (*MESSAGE, "user_prompt_template")
NO_EDGE = "a message graph has an edge that does not join two of its messages"
NO_VALUE = "for which there is no plain value"
BAD_ENTRIES = [
    (changed(["task_init_description"], " "), "task_init_description is blank"),
    (changed(["label"], None), "label is missing, expected true or false"),
    (changed(["label"], "yes"), "label is a text, expected true or false"),
    (changed(["trajectory"], []), "trajectory is an empty list, expected a list of steps"),
    (changed(["trajectory"], {}), "trajectory is an object, expected a list of steps"),
    (changed(["trajectory", 0], 3), "a step is a number, expected an object"),
    (changed(["trajectory", 0, "action"], ["x"]), "action is a list, expected a text"),
    (changed(GRAPH, [1]), "a message graph is a list, expected an object with lists of nodes and links"),
    (changed((*GRAPH, "links"), 1), "a message graph is an object, expected an object with lists of nodes and links"),
    (changed((*GRAPH, "nodes", 0, "id"), "b"), "the nodes of a message graph are not named by different roles"),
    (changed((*GRAPH, "nodes", 0, "id"), {}), "the nodes of a message graph are not named by different roles"),
    (changed((*GRAPH, "links", 0, "source"), []), NO_EDGE),
    (changed((*GRAPH, "links", 0, "target"), "c"), NO_EDGE),
    (changed((*GRAPH, "links"), [{"source": "b", "target": "a"}]), "a message reads a later one"),
    (changed((*GRAPH, "nodes", 1, "message"), None), "a message is missing, expected an object"),
    (changed((*MESSAGE, "response"), 5), "response is a number, expected a text"),
    (changed((*MESSAGE, "user_prompt_fields"), [1]), "user_prompt_fields is a list, expected an object"),
    (changed(USER, "{nothing}"), f"a template names {{nothing}}, {NO_VALUE}"),
    (changed(USER, "{extra_fields}"), f"a template names {{extra_fields}}, {NO_VALUE}"),
    (changed(USER, "{task_description.__class__}"),
     f"a template names {{task_description.__class__}}, {NO_VALUE}"),
    (changed(USER, "{task_description:>99999999999}"),
     f"a template names {{task_description}}, {NO_VALUE}"),
    (changed(USER, "{task_description"), "a template has a brace without its partner"),
    (changed((*MESSAGE, "system_prompt_template"), "{who}" * 300),
     "a filled template is longer than 1000 characters"),
    (changed((*MESSAGE, "response"), "\ud800"), "holds a lone surrogate, which is no character"),
]  # fmt: skip


def test_an_entry_that_makes_no_sense_is_told_and_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(released.bank, "_MAX_PROMPT_CHARACTERS", 1000)
    good = their_entry()
    entries = [good, *(entry for entry, _ in BAD_ENTRIES), good]
    (tmp_path / "bank.json").write_text(json.dumps(entries))
    for source in (chroma_folder(tmp_path / "bank", entries), tmp_path / "bank.json"):
        found = read_bank(source)
        assert len(found.trajectories) == 2
        assert [(entry.where, entry.why) for entry in found.unreadable] == [
            (f"entry {number}", why) for number, (_, why) in enumerate(BAD_ENTRIES, 2)
        ]


def test_what_can_be_wrong_in_a_database_only(tmp_path):
    folder = chroma_folder(tmp_path / "bank", [their_entry(f"task {i}") for i in range(7)])
    with sqlite3.connect(folder / "chroma.sqlite3") as db:
        change = "UPDATE embedding_metadata SET string_value = ? WHERE id = ? AND key = ?"
        db.execute(change, ("[{", 1, "trajectory"))
        db.execute(change, ("[" * 100_000, 2, "trajectory"))
        db.execute("UPDATE embedding_metadata SET string_value = CAST(x'ff41' AS TEXT) WHERE id = 3 AND key LIKE 't%'")
        db.execute("DELETE FROM embedding_metadata WHERE id = 4")
        db.execute(change, ('[{"mas_message_graph_data": "{"}]', 5, "trajectory"))
        db.execute("UPDATE embedding_metadata SET bool_value = 5 WHERE id = 6 AND key = 'label'")
    db.close()
    found = read_bank(folder)
    assert [trajectory.task.text for trajectory in found.trajectories] == ["task 6"]
    assert [entry.why for entry in found.unreadable] == [
        "trajectory is not valid JSON",
        "trajectory is nested too deeply",
        "task_init_description is not UTF-8",
        "task_init_description is blank",
        "a message graph is not valid JSON",
        "label is a number, expected true or false",
    ]


def test_reading_a_folder_writes_nothing_beside_it(tmp_path):
    folder = chroma_folder(tmp_path / "bank", [their_entry()])
    with sqlite3.connect(folder / "chroma.sqlite3") as db:
        db.execute("PRAGMA journal_mode = WAL")  # in which even a reader makes files, if it is let
    db.close()
    before = [(path.name, path.stat().st_mtime_ns) for path in (folder, *folder.iterdir())]
    read_bank(folder)
    assert [(path.name, path.stat().st_mtime_ns) for path in (folder, *folder.iterdir())] == before


def test_banks_that_cannot_be_read_as_a_whole_are_one_line_and_make_no_bank(run, tmp_path, both):
    target = tmp_path / "new.sqlite"

    def fails(source):
        status, line = run("bank", "import", target, source)
        assert status == 2
        assert not target.exists()
        return line

    folder, file = both([their_entry(f"task {i} {'x' * 3000}") for i in range(40)])
    database = folder / "chroma.sqlite3"
    whole = database.read_bytes()
    (tmp_path / "empty").mkdir()
    assert fails(tmp_path / "empty").startswith(f"{tmp_path}/empty/chroma.sqlite3: cannot be read (No such file or")
    for size in (20, 5000, len(whole) // 2):
        database.write_bytes(whole[:size])
        assert fails(folder).startswith(f"{database}: is not a whole Chroma database (")
    database.write_text("no database at all")
    assert fails(folder).startswith(f"{database}: is not a whole Chroma database (")
    with sqlite3.connect(tmp_path / "other.sqlite") as db:
        db.execute("CREATE TABLE a (b)")
    db.close()
    assert "is not a whole Chroma database (no such table" in fails(tmp_path / "other.sqlite")
    database.write_bytes(whole)
    (folder / "chroma.sqlite3-wal").write_bytes(b"pages")
    assert fails(folder).startswith(f"{database}-wal: holds changes that are not in the database yet")
    file.write_text(file.read_text()[:5000])
    assert fails(file) == f"{file}: the file is not valid JSON; expected the authors' data.json"
    file.write_text("[" * 100_000)
    assert fails(file) == f"{file}: the file is nested too deeply; expected the authors' data.json"
    file.write_bytes(b'["\xff"]')
    assert fails(file) == f"{file}: is not UTF-8 (byte 2); expected the authors' data.json"
    for entries, found in (([], "0 entries"), ([1, {}], "2 entries can be read as a trajectory; entry 1: is a number")):
        data_json(file, entries)
        assert f"none of its {found}" in fails(file)
    assert fails(tmp_path / "nowhere").startswith(f"{tmp_path}/nowhere: no such file or folder; give")
    with pytest.raises(DataError, match=r"is an object; expected the authors' data.json, a list"):
        read_bank(data_json(tmp_path / "object.json", {}))


def test_importing_prints_what_was_added_and_what_was_left_out(run, tmp_path, both):
    entries = [their_entry("red door"), their_entry("blue\0door", False), changed(["label"], None),
               changed(["task_init_description"], ""), changed(["label"], None)]  # fmt: skip
    folder, file = both(entries)
    bank = tmp_path / "bank.sqlite"
    left_out = [
        "3 entries could not be read:",
        "     2 label is missing, expected true or false (first: entry 3)",
        "     1 task_init_description is blank (first: entry 4)",
    ]
    assert run("bank", "import", bank, folder) == (0, ["2 trajectories added, 0 were there already", *left_out])
    assert run("bank", "import", bank, file) == (0, ["0 trajectories added, 2 were there already", *left_out])
    assert run("bank", "import", bank, folder / "chroma.sqlite3")[1][0] == "0 trajectories added, 2 were there already"
    assert run("bank", "verify", bank) == (0, ["2 trajectories checked, 0 problems"])
    run("bank", "export", bank, tmp_path / "out.json")  # our JSON Lines, whatever their name
    assert run("bank", "import", tmp_path / "copy.sqlite", tmp_path / "out.json")[1] == [
        "2 trajectories added, 0 were there already"
    ]


def test_the_golden_bank_is_the_same_in_both_forms_and_its_prompts_are_filled_as_by_str_format(golden):
    folder = golden / "bank" / "rag_0"
    found = read_bank(folder)
    assert found == read_bank(folder / "data.json")
    assert found.unreadable == ()
    entries = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    assert len(found.trajectories) == len(entries) == 12
    for trajectory, entry in zip(found.trajectories, entries, strict=True):
        assert (trajectory.task.text, trajectory.success) == (entry["task_init_description"], entry["label"])
        assert [step.action for step in trajectory.steps] == [step["action"] for step in entry["trajectory"]]
        nodes = [node for step in entry["trajectory"] for node in step["mas_message_graph"]["nodes"]]
        for message, node in zip(trajectory.messages, nodes, strict=True):
            theirs = node["message"]
            assert message.role == theirs["state"]["role"]
            assert message.response == theirs["response"]
            for ours, part in ((message.system, "system"), (message.user, "user")):
                template, fields = theirs[f"{part}_prompt_template"], theirs[f"{part}_prompt_fields"]
                assert ours == string.Formatter().vformat(template, (), fields)
        assert {step.messages[1].reads for step in trajectory.steps} == {(0,)}


def test_a_composer_is_told_what_a_role_of_the_same_name_said(tiny_model_dir, both, fake_embed, tmp_path):
    folder, _ = both([their_entry("red door")])
    model = LanguageModel.from_pretrained(str(tiny_model_dir), "cpu", "float32")
    composer = Composer(model, num_latents=K, rank=RANK, template="{memory}|{role_messages}")
    with ExperienceBank(tmp_path / "b.sqlite", fake_embed) as bank:
        bank.add(read_bank(folder).trajectories)
        memory = LatentMemory(bank, composer)
        task = Task(id="1", domain="x", text="blue door")
        (text,) = [record.text for record in memory.records([(task, Role(name="solver", profile=""))])]
        assert text == "[1] Task: red door\nAnswer: a\nOutcome: solved|[1] so"
        # The exact text is the same task, although one has an id and the other none.
        asked = Task(id="2", domain="x", text="red door")
        assert memory.records([(asked, Role(name="solver", profile=""))])[0].sources == ()


# Both together

RUN = """
run: {folder}/run
data:
  kind: qa
  schema: popqa
  train: {{path: {folder}/train.jsonl}}
  test: {{path: {folder}/test.jsonl}}
bank: {{path: {folder}/bank.sqlite, num_retrieved: 1}}
sampling: {{max_response_tokens: 4}}
evaluate: {{num_bootstraps: 50, memories: [none, "latent:{folder}/composer"]}}
"""


@pytest.mark.parametrize("where", ["made up", "golden"])
def test_evaluate_runs_from_imported_weights_and_bank(run, tmp_path, tiny_model_dir, request, where):
    if where == "golden":
        golden = request.getfixturevalue("golden")
        model, weights, bank = golden / "model", golden / "checkpoint" / "model.safetensors", golden / "bank" / "rag_0"
    else:
        model, bank = tiny_model_dir, chroma_folder(tmp_path / "theirs", [their_entry("red door")])
        weights = written(tmp_path / "w.safetensors", their_weights(tiny_model_dir))
    (tmp_path / "template.txt").write_text(TEMPLATE)
    status, lines = run("checkpoint", "import", weights, "--base", model, "--out", tmp_path / "composer",
                        "--template", tmp_path / "template.txt")  # fmt: skip
    assert status == 0
    assert run("bank", "import", tmp_path / "bank.sqlite", bank)[0] == 0
    for split, numbers in (("train", range(2)), ("test", range(2, 4))):
        rows = [{"id": i, "question": f"Colour of door {i}?", "possible_answers": '["red"]', "o_aliases": "[]"}
                for i in numbers]  # fmt: skip
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = next(i for i, line in enumerate(lines) if line.endswith("the configuration says:"))
    printed = "\n".join(lines[start + 1 :])
    (tmp_path / "c.yaml").write_text(RUN.format(folder=tmp_path) + printed)
    assert run("evaluate", tmp_path / "c.yaml", "model.device=cpu")[0] == 0
    none, latent = json.loads((tmp_path / "run" / "results.json").read_text())["memories"]
    assert (none["name"], latent["name"]) == ("none", f"latent:{tmp_path}/composer")
    played = (tmp_path / "run" / "evaluate" / latent["trajectories"]).read_text().splitlines()
    stored = {trajectory.id for trajectory in read_bank(bank).trajectories}
    num_latents = read_checkpoint(tmp_path / "composer")[0]["num_latents"]
    for message in [message for line in played for message in Trajectory.from_json(line).messages]:
        assert set(message.recalled.sources) <= stored
        assert len(message.recalled.sources) == 1
        assert message.recalled.num_latents == num_latents
        assert message.recalled.text.startswith("Past:\n[1] Task: ")
