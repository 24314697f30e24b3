"""Plans are held to what is really there: parameters, what torch keeps for a backward pass, memory of a process."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from latentmem import cli
from latentmem.bank import ExperienceBank
from latentmem.config import parse_config
from latentmem.errors import ConfigError, ModelError
from latentmem.memory.composer import Composer
from latentmem.memory.parametric import ParametricMemory
from latentmem.models.branches import grow_rows
from latentmem.models.embedder import HashingEmbedder
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefix import pad
from latentmem.planning import disk
from latentmem.planning.memory import Backbone
from latentmem.planning.phases import Trained
from latentmem.planning.shapes import read_embedder, read_shape
from latentmem.recipes import Planner
from latentmem.trajectory import Message, Recalled, Step, Task, Trajectory

QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
"""The published numbers of Qwen3-4B."""
KINDS = [("float32", "auto"), ("float32", "never"), ("bfloat16", "auto")]
"""Data types and `model.fused`; in bfloat16 nothing is replaced."""


def a_config(folder: Path, run: Path, **sections):
    values = {
        "run": str(run),
        "data": {"kind": "hidden_facts"},
        "model": {"name": str(folder), "device": "cpu"},
        "bank": {"embedder": "hashing"},
    }
    return parse_config(values | sections)


@pytest.fixture
def folders(tiny_model_dir, other_model_dir):
    return {"llama": tiny_model_dir, "qwen3": other_model_dir}


# Parameters


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_parameters_are_those_of_the_loaded_model_though_only_its_config_is_there(folders, kind, tmp_path):
    shutil.copy(folders[kind] / "config.json", tmp_path)
    shape, model = read_shape(str(tmp_path)), LanguageModel.from_pretrained(str(folders[kind]), device="cpu")
    assert shape.parameters == sum(p.numel() for p in model.model.parameters())
    assert (shape.width, shape.vocabulary) == (model.width, len(model.model.get_input_embeddings().weight))
    assert shape.head_norms == (kind == "qwen3")
    prefix = model._reader.prefill([[5, 6, 7]], ["a"], 0)
    columns = sum(t.nbytes for layer in prefix.cache.layers for t in (layer.keys, layer.values))
    assert Backbone(shape, 4, True).column * 3 == columns


@pytest.mark.parametrize("slots", [None, 2])
def test_trained_parameters_are_those_of_composer_and_rival(folders, slots, tmp_path):
    section = {"num_latents": 3, "rank": 2, "target_modules": ["q_proj", "down_proj"], "slots": slots}
    config = a_config(folders["llama"], tmp_path, composer={**section, "model": str(folders["qwen3"])})
    numbers = Planner(config).plan().numbers
    agents = LanguageModel.from_pretrained(str(folders["llama"]), device="cpu")
    composer = Composer(LanguageModel.from_pretrained(str(folders["qwen3"]), device="cpu"), agents, **section)
    assert numbers["trained_parameters"] == sum(p.numel() for p in composer.trainable().values())
    rival = ParametricMemory(agents, rank=16, alpha=32.0, target_modules=("q_proj", "v_proj"), seed=0)
    assert numbers["trained_by_grpo"] == sum(p.numel() for p in rival.trainable().values())


def test_a_model_of_four_billion_is_planned_without_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    shape = read_shape(str(tmp_path))
    assert shape.parameters == 4_022_468_096  # as its card says: 4.0 B, 3.6 B without embeddings
    assert Backbone(shape, 2, False).column == 2 * 36 * 1024 * 2


def test_an_embedder_is_counted_without_its_weights():
    assert read_embedder("all-minilm-l6-v2") == (22_713_216, 384)
    assert read_embedder("hashing") == (0, HashingEmbedder().width)


def test_mistakes_are_told_in_one_line(folders, tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ModelError, match="configuration cannot be read"):
        read_shape(str(tmp_path))
    with pytest.raises(ModelError, match="no such GGUF file"):
        read_shape(str(tmp_path / "x.gguf"))
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        Planner(a_config(folders["llama"], tmp_path, composer={"target_modules": ["q_prj"]})).plan()
    with pytest.raises(ModelError, match="cannot be planned for"):
        Planner(a_config(folders["llama"], tmp_path, model={"name": str(folders["llama"]), "device": "meta"})).plan()


# What is kept for the backward pass, against torch's own account


def kept_by(call: Callable[[], object], without: Iterable[torch.Tensor]) -> int:
    """Bytes of all different tensors that a forward pass saves, except some."""
    seen: dict[int, int] = {}
    left_out = {tensor.untyped_storage().data_ptr() for tensor in without}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = call()
    assert found is not None
    return sum(seen.values())


def loaded(folder: Path, dtype: str, fused: str) -> tuple[LanguageModel, Backbone]:
    model = LanguageModel.from_pretrained(str(folder), device="cpu", dtype=dtype, fused=fused)
    is_fused = fused == "auto" and dtype == "float32"
    return model, Backbone(read_shape(str(folder)), 4 if dtype == "float32" else 2, is_fused)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "fused"), KINDS)
def test_what_scoring_keeps(folders, kind, dtype, fused):
    model, backbone = loaded(folders[kind], dtype, fused)
    latents = torch.randn(3, 8, model.width, requires_grad=True)
    ids, mask = pad([[4] * 40] * 3, model.device)
    with model.as_agent() as agent:
        prefix = agent.prefill([[5, 6, 7, 8, 9] * 20] * 3, ["a", "b", "c"], 47)
        room = [tensor for layer in prefix.cache.layers for tensor in (layer.keys, layer.values)]
        weights = model.model.parameters()
        found = kept_by(lambda: agent.response_logps(prefix, latents, ids, mask, 1.0), [*weights, *room])
    planned = 3 * 47 * backbone.kept_by_position() + backbone.mask(3, 47, 147) + 120 * model.width * backbone.item
    assert planned == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "fused"), KINDS)
@pytest.mark.parametrize("target_modules", [("q_proj", "v_proj"), ("k_proj", "o_proj", "up_proj", "down_proj")])
def test_what_composing_keeps(folders, kind, dtype, fused, target_modules):
    model, backbone = loaded(folders[kind], dtype, fused)
    composer = Composer(model, num_latents=8, rank=4, target_modules=target_modules)
    text = "What is 12 + 7? The answer is 19. " * 12
    length = len(model.encode(text)) + 8
    found = kept_by(lambda: composer.compose([text] * 2), model.model.parameters())
    planned = Trained(backbone, 0, 4, target_modules).graph(2, length)
    assert planned == pytest.approx(found, rel=0.02)


def test_what_a_rivals_update_keeps(folders):
    model, backbone = loaded(folders["qwen3"], "float32", "auto")
    rival = ParametricMemory(model, rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"), seed=0)
    messages = [([number] * 90, [7] * 30) for number in (5, 6)]
    with model.as_agent(rival.adapter) as agent:
        rows = grow_rows(messages, 240)
        assert len(rows) == 2
        found = kept_by(lambda: agent.branch_logps(rows, messages, 1.0), model.model.parameters())
    planned = Trained(backbone, 0, 4, ("q_proj", "v_proj")).graph(2, 120) + 60 * model.width * 4
    assert planned == pytest.approx(found, rel=0.05)  # the first layer reads what no parameter moves, and keeps less


# Plans


def test_a_plan_grows_with_what_it_says_it_grows_with(folders, tmp_path):
    planner = Planner(a_config(folders["llama"], tmp_path), prompt_tokens=400)
    plan = planner.plan()

    def with_keys(**sections):
        return Planner(a_config(folders["llama"], tmp_path, **sections), prompt_tokens=400).plan()

    wide = with_keys(sft={"micro_batch_positions": 4096}, composer={"max_prompt_tokens": 400})
    narrow = with_keys(sft={"micro_batch_positions": 512}, composer={"max_prompt_tokens": 400})
    assert wide.peaks["train sft"].kept > 3 * narrow.peaks["train sft"].kept
    fewer = with_keys(model={"name": str(folders["llama"]), "device": "cpu", "max_batch_size": 8})
    assert fewer.peaks["collect"].columns < plan.peaks["collect"].columns
    gpu = with_keys(model={"name": str(folders["llama"]), "device": "cuda"})
    assert gpu.dtype == "bfloat16"
    assert gpu.peaks["collect"].weights * 2 == plan.peaks["collect"].weights
    longer = Planner(a_config(folders["llama"], tmp_path), prompt_tokens=800).plan()
    assert all(longer.total(phase) > plan.total(phase) for phase in plan.peaks if phase != "train sft")
    assert plan.peaks["train lmpo"].trained == 5 * 4 * plan.numbers["trained_parameters"]
    assert with_keys(lmpo={"num_iterations": 2}).total("train lmpo") >= plan.total("train lmpo")


@pytest.mark.parametrize(
    ("memories", "sections", "planned"),
    [
        (["none", "text"], {}, []),
        (["latent:lmpo:irrelevant"], {}, ["sft", "lmpo"]),
        (["latent:lmpo"], {"lmpo": {"initial": "untrained"}}, ["lmpo"]),
        (["latent:sft"], {"sft": {"initial": "warmup"}, "composer": {"slots": 1}}, ["warmup", "sft"]),
        (["latent:warmup", "grpo"], {"composer": {"slots": 1}}, ["warmup", "grpo"]),
        (["grpo:elsewhere", "latent:elsewhere"], {}, []),
    ],
)
def test_the_trainings_that_are_planned_are_those_that_the_memories_need(
    folders, tmp_path, memories, sections, planned
):
    config = a_config(folders["llama"], tmp_path, evaluate={"memories": memories}, **sections)
    assert [*Planner(config).plan().peaks] == ["collect", *(f"train {phase}" for phase in planned), "evaluate"]


def test_the_warm_up_is_planned_with_lessons_of_its_own(folders, tmp_path):
    def planned(prompt_tokens=400, **warmup):
        sections = {"evaluate": {"memories": ["latent:warmup"]}, "composer": {"slots": 1}, "warmup": warmup}
        plan = Planner(a_config(folders["llama"], tmp_path, **sections), prompt_tokens).plan()
        assert any(line.startswith("in the warm-up prompts of 48 tokens") for line in plan.assumptions)
        return plan.peaks["train warmup"]

    assert planned(prompt_tokens=4000) == planned()  # it does not read the tasks
    assert planned(copy_steps=0).trained * 4 == planned().trained  # the frame's own moments are not counted
    assert planned(copy_steps=0).kept < planned().kept < planned(micro_batch_positions=4096).kept


@pytest.mark.parametrize(("team", "at_once", "messages"), [("solo", 1, 1), ("autogen", 1, 2), ("macnet", 2, 5)])
def test_a_team_is_asked_how_many_speak(folders, tmp_path, team, at_once, messages):
    numbers = Planner(a_config(folders["llama"], tmp_path, team=team)).plan().numbers
    assert (numbers["agents_at_once"], numbers["messages_a_turn"]) == (at_once, messages)


def an_episode(number: int, prompt: int, response: int) -> Trajectory:
    random = torch.Generator().manual_seed(number)
    message = Message(
        role="agent",
        system="You are the agent.",
        user=" ".join(map(str, torch.randint(0, 9999, (prompt // 3,), generator=random).tolist())),
        response=" ".join(map(str, torch.randint(0, 999, (response,), generator=random).tolist())),
        token_ids=tuple(torch.randint(0, 49_000, (response,), generator=random).tolist()),
        logps=tuple((-torch.rand(response, generator=random)).tolist()),
        finish="stop",
        temperature=1.0,
        num_prompt_tokens=prompt,
        recalled=Recalled(kind="none"),
    )
    task = Task(id=str(number), domain="d", text=f"task {number}")
    step = Step(messages=(message, message), action="a", observation="")
    return Trajectory(task=task, team="t", model="m", steps=(step,), reward=1.0, success=True, seed=0)


def test_prompts_are_measured_where_a_bank_is_and_the_bank_grows_as_told(folders, tmp_path):
    config = a_config(folders["llama"], tmp_path)
    assert Planner(config).plan().numbers["prompt_tokens"] == 512
    with ExperienceBank(tmp_path / "bank.sqlite", HashingEmbedder(), embedder="hashing") as bank:
        bank.add([an_episode(i, 240, 300) for i in range(40)])
    with ExperienceBank(tmp_path / "bank.sqlite") as bank:
        info = bank.info()
    assert Planner(config).plan().numbers["prompt_tokens"] == 240
    assert Planner(config, prompt_tokens=77).plan().numbers["prompt_tokens"] == 77
    planned = disk.bank_growth(1, 240, 300, HashingEmbedder().width)  # the second message repeats the first
    assert planned == pytest.approx(info.num_bytes / info.num_trajectories, rel=0.3)


def test_a_requests_embeddings_are_base64():
    import base64

    embeddings = torch.zeros(5, 7, dtype=torch.bfloat16)
    assert disk.embeds(5, 7, 2) == len(base64.b64encode(bytes(embeddings.nbytes)))


def test_checkpoints_take_what_they_take(folders, tmp_path):
    composer = Composer(LanguageModel.from_pretrained(str(folders["qwen3"]), device="cpu"), num_latents=3, rank=8)
    composer.save_pretrained(tmp_path)
    trained = sum(p.numel() for p in composer.trainable().values())
    assert disk.checkpoints(trained, evaluates=False) == pytest.approx(
        2 * 3 * (tmp_path / "composer.safetensors").stat().st_size, rel=0.2
    )


# The command


@pytest.fixture
def file(folders, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(a_config(folders["qwen3"], tmp_path / "run").model_dump(mode="json", by_alias=True)))
    return str(path)


def test_the_command_prints_a_table_or_json_and_makes_nothing(file, tmp_path, capsys):
    assert cli.main(["plan", file, "--prompt-tokens", "300"]) == 0
    table = capsys.readouterr().out
    for words in ("memory of a process, MiB", "train lmpo", "a collected episode", "given by --prompt-tokens"):
        assert words in table
    assert cli.main(["plan", file, "--json", "--composer-tokens", "99", "--fit", "900"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fit"].startswith("fits 900 GiB")
    assert told["numbers"]["composer_tokens"] == 99
    for parts in told["memory"].values():
        assert parts["total"] == sum(value for part, value in parts.items() if part != "total")
    assert not (tmp_path / "run").exists()
    assert cli.main(["plan", file, "model.device=quantum"]) == 2


def test_what_goes_over_a_network_is_told_where_an_engine_takes_embeddings(file, capsys):
    assert cli.main(["plan", file]) == 0
    table = capsys.readouterr().out
    assert "network" not in table
    assert "passing: what comes and goes inside a layer" in table
    assert cli.main(["plan", file, 'model.engine={kind: vllm, urls: ["http://127.0.0.1:9"]}']) == 0
    assert "network\n  a request with embeddings" in capsys.readouterr().out


def test_what_does_not_fit_is_told_with_keys_that_make_it_fit(file, capsys):
    words = ["plan", file, "--prompt-tokens", "1500"]
    assert cli.main([*words, "--json"]) == 0
    most = max(parts["total"] for parts in json.loads(capsys.readouterr().out)["memory"].values())
    limit = f"{most * 0.9 / 2**30}"
    assert cli.main([*words, "--fit", limit]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("does not fit")
    keys = line.partition("it fits with ")[2].split()
    assert keys
    assert cli.main([*words, *keys, "--fit", limit]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("fits")
    assert cli.main([*words, "--fit", "0.1"]) == 0
    assert "take a smaller model" in capsys.readouterr().out.splitlines()[-1]


# Against the memory of a process


def measured(phase: str, model: str, **settings: int) -> dict[str, float]:
    script = Path(__file__).with_name("planned_peaks.py")
    done = subprocess.run(
        [sys.executable, script, phase, model, json.dumps(settings)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["collect", "warmup", "sft", "lmpo", "evaluate"])
def test_a_process_takes_what_was_planned(phase):
    found = measured(phase, "smollm2-135m", tasks=4, group=4, words=60, response=8, positions=512, latents=4)
    assert found["measured"] == pytest.approx(found["planned"], rel=0.2), found


@pytest.mark.slow
def test_a_process_takes_what_was_planned_of_a_tiny_model_with_much_to_keep(tiny_model_dir):
    found = measured("sft", str(tiny_model_dir), tasks=24, group=2, words=90, response=64, positions=60000, latents=8)
    assert found["measured"] == pytest.approx(found["planned"], rel=0.2), found
