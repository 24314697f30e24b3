"""Grids played with a tiny model: nothing twice, on after a kill, a failure stays alone, the unseen stays unseen."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from killing import killed_at_sync
from latentmem import cli, recipes
from latentmem.bank import ExperienceBank
from latentmem.config import load_config
from latentmem.errors import ConfigError, DataError, LatentMemError
from latentmem.grid import play
from latentmem.grid.file import load_grid
from latentmem.grid.play import play_grid
from latentmem.memory.text import TextMemory
from latentmem.models.language_model import LanguageModel

pytestmark = pytest.mark.usefixtures("no_embedding_model", "lucky", "no_figures")

LENGTHS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
SUMS = {
    "kind": "reasoning_gym",
    "families": [{"name": "chain_sum", "params": LENGTHS}],
    "train_size": 6,
    "test_size": 4,
}
GCDS = SUMS | {"families": [{"name": "gcd", "params": {"max_value": 60}}]}
LCMS = SUMS | {"families": [{"name": "lcm", "params": {"max_value": 60}}]}
COMMON = {
    "composer": {
        "num_latents": 3,
        "rank": 2,
        "max_prompt_tokens": 700,
        "template": "{task} {memory} {role_messages}",
    },
    "bank": {"num_retrieved": 2, "only_successes": False},
    "sampling": {"temperature": 1.0, "max_response_tokens": 4},
    "collect": {"num_tasks": 4, "batch_size": 4},
    "sft": {"num_steps": 1, "trajectories_per_step": 2},
    "lmpo": {"num_steps": 1, "tasks_per_step": 2, "group_size": 2, "initial": "untrained"},
    "evaluate": {"batch_size": 2, "num_bootstraps": 50},
}


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take longer than all the rest; the tests of the report draw them."""
    monkeypatch.setattr(play, "write_tables", lambda folder, table: f"tables of {folder}")


@pytest.fixture
def make(tmp_path, tiny_model_dir):
    """A grid over SUMS, unless the section says otherwise; `sections` replace those of COMMON."""

    def make(folder="g", /, *, sections=None, **grid):
        grid = {"benchmarks": {"sums": {"data": SUMS}}, "memories": ["none", "text"]} | grid
        model = {"name": str(tiny_model_dir), "device": "cpu", "dtype": "float32"}
        values = {"run": str(tmp_path / folder), "model": model, **COMMON, **(sections or {}), "grid": grid}
        (tmp_path / f"{folder}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return load_grid(values, f"{folder}.yaml")

    return make


@pytest.fixture
def calls(monkeypatch):
    """What is played and loaded, counted: episodes by phase and memory, models."""
    counts = Counter()
    rollout, from_pretrained = recipes.collecting.rollout, LanguageModel.from_pretrained

    def counted(where):
        def playing(team, memory, model, tasks, *args, **kwargs):
            counts[where, memory.kind] += len(tasks)
            return rollout(team, memory, model, tasks, *args, **kwargs)

        return playing

    def loading(*args, **kwargs):
        counts["models"] += 1
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr("latentmem.evaluation.batches.rollout", counted("evaluate"))
    monkeypatch.setattr(recipes.collecting, "rollout", counted("collect"))
    monkeypatch.setattr(LanguageModel, "from_pretrained", loading)
    return counts


def cell(grid, name):
    return grid.folder / "cells" / name


def table(grid):
    """grid.json without what differs between two computations of the same."""
    found = json.loads((grid.folder / "grid.json").read_text())
    del found["run"]
    for row in [*found["rows"], *found["overall"], *found["cells"]]:
        del row["seconds"]
        row.pop("peak_memory_mb", None)
    return found


def exported(bank):
    with ExperienceBank(bank) as opened:
        return list(opened)


# Nothing twice


def test_a_grid_that_is_done_plays_and_loads_nothing_and_tells_the_same(make, calls, capsys):
    axes = {"teams": ["autogen", "macnet"], "memories": ["none", "text", "latent:untrained"]}
    grid = make(**axes)
    play_grid(grid)
    first, text = table(grid), (grid.folder / "grid.json").read_text()
    assert calls["models"] == 1
    assert calls["evaluate", "none"] == calls["evaluate", "text"] == calls["evaluate", "latent"] == 2 * 4
    assert (first["num_cells"], first["num_done"], first["failures"]) == (6, 6, [])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    assert re.fullmatch(r"\[1/6\] sums-autogen-seed0 none: \d+\.0% \(\d of 4\)", lines[0])
    assert lines[2].endswith(" min left")
    assert "left" not in lines[5]
    calls.clear()
    play_grid(make(**axes))
    assert not calls
    assert (grid.folder / "grid.json").read_text() == text
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    assert all(line.endswith(", done before") for line in lines)


def test_a_run_of_a_grid_is_what_the_ordinary_commands_make_of_its_configuration(make, tmp_path):
    grid = make(memories=["none", "text", "latent:lmpo"])
    play_grid(grid)
    (run,) = grid.runs
    alone = tmp_path / "alone"
    own = load_config(str(cell(grid, "sums-autogen-seed0") / "config.yaml"), [f"run={alone}", "bank.path=null"])
    for recipe in (recipes.collect, recipes.train_lmpo, recipes.play_test):
        recipe(own)
    assert [t.to_json() for t in exported(alone / "bank.sqlite")] == [
        t.to_json() for t in exported(run.config.bank.path)
    ]
    for name in run.config.evaluate.memories:
        ours, theirs = (Path(folder) / "evaluate" / f"{name.file_stem}.jsonl" for folder in (run.config.run, alone))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_variants_and_seeds_share_banks_models_and_episodes_that_are_the_same(make, calls):
    variants = {"k2": {"composer.num_latents": 2}, "k3": {}, "few": {"collect.num_tasks": 3}}
    grid = make(memories=["none", "text", "latent:untrained"], variants=variants, seeds=[0, 1])
    play_grid(grid)
    assert calls["models"] == 1
    assert calls["collect", "none"] == 2 * (4 + 3)  # two seeds: four tasks for k2 and k3, three for few
    assert calls["evaluate", "none"] == 4  # greedy agents without memory do the same in all six runs
    assert calls["evaluate", "text"] == 2 * 2 * 4  # of each bank once
    assert calls["evaluate", "latent"] == 6 * 4
    latents = {
        message["recalled"]["num_latents"]
        for line in (cell(grid, "sums-autogen-k2-seed0") / "evaluate/latent-untrained.jsonl").read_text().splitlines()
        for message in json.loads(line)["steps"][0]["messages"]
    }
    assert latents == {2}


def test_agents_that_sample_are_played_anew_for_each_seed(make, calls):
    play_grid(make(memories=["none"], seeds=[0, 1], sections={"evaluate": COMMON["evaluate"] | {"temperature": 0.8}}))
    assert calls["evaluate", "none"] == 2 * 4


def test_a_memory_that_joins_is_played_and_the_others_are_kept(make, calls):
    play_grid(make())
    calls.clear()
    found = play_grid(make(memories=["none", "latent:untrained", "text"]))
    assert calls == {"models": 1, ("evaluate", "latent"): 4}
    assert [row["memory"] for row in found["rows"]] == ["none", "latent:untrained", "text"]
    calls.clear()
    assert [row["memory"] for row in play_grid(make(memories=["text"]))["rows"]] == ["text"]
    assert calls["evaluate", "text"] == 0


def test_parts_of_a_grid_may_be_played_apart_and_are_gathered_by_the_whole(make, calls):
    for team in ("autogen", "macnet"):
        play_grid(make(teams=[team]))
    calls.clear()
    found = play_grid(make(teams=["autogen", "macnet"]))
    assert not calls
    assert [(row["team"], row["memory"]) for row in found["rows"]] == [
        ("autogen", "none"),
        ("autogen", "text"),
        ("macnet", "none"),
        ("macnet", "text"),
    ]
    assert len(found["overall"]) == 2


@pytest.fixture
def trained(monkeypatch):
    """Which phases took steps, in order."""
    phases, train = [], recipes.train._train

    def counted(here, *args):
        phases.append(here.name)
        return train(here, *args)

    monkeypatch.setattr(recipes.train, "_train", counted)
    return phases


@pytest.mark.slow
def test_what_the_same_teams_would_train_alike_is_trained_once_whoever_is_evaluated(make, trained):
    sections = {"train_teams": ["autogen", "macnet"], "lmpo": COMMON["lmpo"] | {"initial": "sft"}}
    axes = {"teams": ["macnet", "camel"], "memories": ["latent:lmpo"], "sections": sections}
    found = play_grid(make(**axes))
    assert trained == ["sft", "lmpo"]
    assert found["train_teams"] == ["autogen", "macnet"]
    assert [row["team"] for row in found["rows"]] == ["macnet", "camel"]
    grid = make("own", **axes, variants={"alike": {"evaluate.temperature": 0.5}, "slow": {"sft.learning_rate": 1e-5}})
    trained.clear()
    play_grid(grid)
    assert trained == ["sft", "lmpo"] * 2  # what LMPO begins with differs between the variants, not between the teams
    weights = {
        variant: {
            path.read_bytes()
            for path in grid.folder.glob(f"cells/*-{variant}-*/lmpo/checkpoints/step-000001/composer.safetensors")
        }
        for variant in ("alike", "slow")
    }
    assert [len(found) for found in weights.values()] == [1, 1]
    assert weights["alike"] != weights["slow"]


@pytest.mark.parametrize("own", ["given", "filled with memory"])
def test_banks_that_the_grid_did_not_fill_are_not_taken_for_the_same(make, trained, tmp_path, own):
    sections = {"train_teams": ["autogen"]}
    if own == "given":
        filled = make("filled", memories=["text"])
        play_grid(filled)
        sections["bank"] = COMMON["bank"] | {"path": filled.runs[0].config.bank.path}
    else:
        sections["collect"] = COMMON["collect"] | {"memory": "text"}
    play_grid(make(teams=["macnet", "camel"], memories=["latent:sft"], sections=sections))
    assert trained == ["sft", "sft"]


@pytest.mark.slow
def test_what_a_user_has_deleted_to_make_room_is_computed_again_by_whoever_needs_it(make, trained, calls):
    axes = {"memories": ["none", "latent:sft"], "sections": {"train_teams": ["camel"]}}
    grid = make(teams=["autogen"], **axes)
    play_grid(grid)
    shutil.rmtree(cell(grid, "sums-autogen-seed0") / "sft")
    trained.clear()
    play_grid(make(teams=["autogen", "macnet"], **axes))
    assert trained == ["sft"]


@pytest.mark.slow
def test_a_training_that_was_begun_is_gone_on_with_and_not_overwritten(make, monkeypatch):
    axes = {"teams": ["autogen", "macnet"], "memories": ["latent:sft"], "sections": {"train_teams": ["camel"]}}
    grid = make(**axes)
    play_grid(grid)
    folder = cell(grid, "sums-macnet-seed0")
    (folder / play.PLAYED).unlink()
    (folder / "sft" / "mine").write_text("kept")
    play_grid(make(**axes))
    assert (folder / "sft" / "mine").exists()
    shutil.rmtree(folder / "sft")
    (folder / ".sft.fresh").mkdir()
    (folder / ".sft.fresh" / "torn").write_text("")
    (folder / play.PLAYED).unlink()
    play_grid(make(**axes))
    assert sorted(path.name for path in (folder / "sft").iterdir()) == sorted(
        path.name for path in (cell(grid, "sums-autogen-seed0") / "sft").iterdir()
    )


def test_what_a_memory_needs_is_trained_also_for_its_controls_and_nothing_else(make):
    grid = make(memories=["none", "latent:lmpo:random"])
    assert play_grid(grid)["failures"] == []
    folder = cell(grid, "sums-autogen-seed0")
    assert (folder / "lmpo").exists()
    assert not (folder / "sft").exists()
    alone = make("alone", memories=["none"])
    assert play_grid(alone)["num_done"] == 1
    assert not (alone.folder / "banks").exists()


@pytest.fixture
def warm(make, wordy_model_dir):
    """A grid whose composers have a slot, of agents that have words; `sections` are laid over those of COMMON."""

    def warm(folder="g", *, sections=None, **grid):
        own = {
            "model": {"name": str(wordy_model_dir), "device": "cpu", "dtype": "float32"},
            "composer": COMMON["composer"] | {"slots": 1, "template": "{memory}"},
            "warmup": {
                "frame_steps": 1, "copy_steps": 1, "lessons_per_step": 2, "words_per_prompt": 2, "eval_every": None,
            },
            "sft": COMMON["sft"] | {"initial": "warmup"},
            "collect": {"num_tasks": None, "batch_size": 8},  # enough for a success or two
        }  # fmt: skip
        return make(folder, sections=own | (sections or {}), **grid)

    return warm


@pytest.mark.slow
def test_a_warm_up_is_played_first_for_whoever_starts_from_it(warm, trained):
    started = {"lmpo": COMMON["lmpo"] | {"initial": "warmup"}}
    assert play_grid(warm("a", memories=["latent:lmpo:random"], sections=started))["failures"] == []
    assert trained == ["warmup", "lmpo"]
    trained.clear()
    through = {"lmpo": COMMON["lmpo"] | {"initial": "sft"}}
    assert play_grid(warm("b", memories=["none", "latent:lmpo"], sections=through))["failures"] == []
    assert trained == ["warmup", "sft", "lmpo"]
    trained.clear()
    assert play_grid(warm("c", memories=["latent:warmup"]))["failures"] == []
    assert trained == ["warmup"]
    trained.clear()
    assert play_grid(warm("d", memories=["latent:lmpo"]))["failures"] == []
    assert trained == ["lmpo"]


@pytest.mark.slow
def test_runs_that_warm_up_alike_share_one_whatever_their_data_and_what_follows(warm, trained):
    axes = {"benchmarks": {"sums": {"data": SUMS}, "gcds": {"data": GCDS}}, "memories": ["latent:sft"]}
    variants = {"one": {}, "two": {"sft.learning_rate": 1e-5}, "k2": {"composer.num_latents": 2}}
    grid = warm(**axes, variants=variants)
    assert play_grid(grid)["failures"] == []
    assert trained.count("warmup") == 2  # of three latents and of two
    assert trained.count("sft") == 2 * 3
    found = {
        variant: {path.read_bytes() for path in grid.folder.glob(f"cells/*-{variant}-*/warmup/**/composer.safetensors")}
        for variant in variants
    }
    assert found["one"] == found["two"] != found["k2"]


@pytest.mark.slow
def test_what_was_warmed_up_otherwise_is_not_trained_on_alike(warm, trained):
    variants = {"one": {}, "two": {"warmup.copy_steps": 2}}
    play_grid(warm(memories=["latent:sft"], variants=variants, sections={"train_teams": ["autogen"]}))
    assert trained == ["warmup", "sft"] * 2


def test_with_demonstrations_of_the_domain_sft_needs_no_success(warm, trained):
    data = {"kind": "hidden_facts", "train_entities": 4, "dev_entities": 2, "test_entities": 2}
    sections = {"sft": COMMON["sft"] | {"initial": "warmup", "demonstrations": "domain", "eval_tasks": 1}}
    grid = warm(benchmarks={"facts": {"data": data}}, teams=["solo"], memories=["latent:sft"], sections=sections)
    assert play_grid(grid)["failures"] == []
    assert trained == ["warmup", "sft"]
    assert not any(trajectory.success for trajectory in exported(grid.runs[0].config.bank.path))


def test_a_control_is_compared_with_its_memory_alone(make):
    found = play_grid(make(memories=["none", "text", "latent:untrained", "latent:untrained:other-task"]))
    control = found["rows"][3]
    assert control["vs_real"]["difference"] == pytest.approx(control["accuracy"] - found["rows"][2]["accuracy"])
    assert (control["vs_none"], control["vs_text"]) == (None, None)
    assert found["num_comparisons"] == 3 + 1


def test_a_control_without_its_memory_is_compared_as_any_other(make):
    found = play_grid(make(memories=["none", "latent:untrained:random"]))
    assert found["rows"][1]["vs_none"] is not None
    assert found["num_comparisons"] == 1


# Interruptions


@pytest.mark.slow
def test_a_grid_that_is_killed_goes_on_to_the_same_table(make, monkeypatch):
    axes = {"teams": ["autogen", "macnet"], "variants": {"a": {}, "b": {"bank.num_retrieved": 1}}}
    whole = make("whole", **axes)
    play_grid(whole)
    reached = set()
    for number in (20, 45, 77):
        cut = make(f"cut{number}", **axes)
        assert killed_at_sync(number, monkeypatch, lambda grid=cut: play_grid(grid))
        reached.add(len(list(cut.folder.glob(f"cells/*/{play.PLAYED}"))))
        play_grid(cut)
        assert table(cut) == table(whole)
    assert len(reached) == 3


# Failures


def test_a_cell_that_fails_is_told_and_the_rest_go_on_until_it_is_mended(make, monkeypatch, calls, capsys, tmp_path):
    recall = TextMemory.recall_many

    def stumble(self, queries):
        if any(role.name == "summariser" for _, role in queries):
            raise DataError("the text is too\nlong")
        return recall(self, queries)

    axes = {"teams": ["macnet", "autogen"], "memories": ["none", "text", "latent:untrained"]}
    with monkeypatch.context() as patch:
        patch.setattr(TextMemory, "recall_many", stumble)
        make(**axes)
        assert cli.main(["evaluate", str(tmp_path / "g.yaml")]) == 2
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if line.startswith("latentmem: ")]
    assert line == (
        f"latentmem: {tmp_path}/g: 1 of 6 cells failed, the first, sums-macnet-seed0 text, with: the text is too long; "
        "mend that and run the same command again, the others are kept"
    )
    assert "[2/6] sums-macnet-seed0 text: failed: the text is too long" in told.out
    found = json.loads((tmp_path / "g" / "grid.json").read_text())
    assert [(c["team"], c["memory"]) for c in found["cells"]] == [
        ("macnet", "none"),
        ("macnet", "latent:untrained"),
        *(("autogen", memory) for memory in axes["memories"]),
    ]
    (failure,) = found["failures"]
    assert (failure["team"], failure["memory"], failure["line"]) == ("macnet", "text", "the text is too long")
    calls.clear()
    assert cli.main(["evaluate", str(tmp_path / "g.yaml")]) == 0
    assert {key: count for key, count in calls.items() if key != "models"} == {("evaluate", "text"): 4}
    assert json.loads((tmp_path / "g" / "grid.json").read_text())["failures"] == []


@pytest.mark.slow
def test_a_phase_that_fails_takes_with_it_only_the_memories_that_need_it(make, monkeypatch):
    def fail(config, parts):
        raise DataError("nothing to learn from")

    monkeypatch.setattr(recipes, "train_sft", fail)
    memories = ["none", "text", "latent:sft", "latent:lmpo", "latent:sft:random"]
    with pytest.raises(LatentMemError, match="2 of 5 cells failed"):
        play_grid(make(memories=memories))
    warm = make("warm", memories=memories, sections={"lmpo": COMMON["lmpo"] | {"initial": "sft"}})
    with pytest.raises(LatentMemError, match="3 of 5 cells failed"):
        play_grid(warm)
    assert [failure["memory"] for failure in table(warm)["failures"]] == memories[2:]
    assert not (cell(warm, "sums-autogen-seed0") / "lmpo").exists()


def test_a_bank_that_cannot_be_collected_fails_for_all_that_read_it_and_is_tried_once(make, monkeypatch):
    tried = []

    def fail(config, parts):
        tried.append(config.run)
        raise DataError("the tasks are gone")

    monkeypatch.setattr(recipes, "collect", fail)
    grid = make(variants={"a": {}, "b": {"bank.num_retrieved": 1}})
    with pytest.raises(LatentMemError, match="2 of 4 cells failed"):
        play_grid(grid)
    assert len(tried) == 1
    assert [row["memory"] for row in table(grid)["rows"]] == ["none", "none"]


def test_a_setting_that_was_changed_is_refused_cell_by_cell_and_the_old_ones_stay(make):
    grid = make()
    play_grid(grid)
    before = (cell(grid, "sums-autogen-seed0") / "results.json").read_bytes()
    with pytest.raises(LatentMemError, match=r"evaluate\.temperature was 0\.0 when this phase was started and is 0\.5"):
        play_grid(make(sections={"evaluate": COMMON["evaluate"] | {"temperature": 0.5}}))
    assert (cell(grid, "sums-autogen-seed0") / "results.json").read_bytes() == before


def test_mistakes_in_any_run_are_told_before_anything_is_made(make, calls, capsys, tmp_path):
    for axes, message in [
        ({"teams": ["autogen", "camle"]}, "team 'camle': no such team"),
        ({"benchmarks": {"a": {"data": SUMS}, "b": {"data": SUMS | {"families": [{"name": "gdc"}]}}}}, "'gdc' is no"),
        ({"sections": {"bank": {"path": str(tmp_path / "none.sqlite")}}}, "bank.path names a bank that is not there"),
        ({"memories": ["txt"]}, "names 'txt', which is not a memory; did you mean 'text'?"),
    ]:
        with pytest.raises(LatentMemError) as error:
            play_grid(make(**axes))
        assert message in str(error.value)
    make()
    assert cli.main(["evaluate", str(tmp_path / "g.yaml"), "grid.teams=[camle]"]) == 2
    assert "latentmem: team 'camle': no such team" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()
    assert not calls


def test_several_processes_are_refused(make, monkeypatch):
    class Two:
        size = 2

    monkeypatch.setattr(play, "Processes", Two)
    with pytest.raises(ConfigError, match="a grid is played by one process"):
        play_grid(make())


# Generalisation


@pytest.fixture
def learned_from(monkeypatch):
    """For each step of LMPO: what was played by whom."""
    steps, rollout = [], recipes.collecting.rollout

    def watching(*args, **kwargs):
        played = rollout(*args, **kwargs)
        steps.append({(trajectory.task.data["family"], trajectory.team) for trajectory in played.trajectories})
        return played

    monkeypatch.setattr("latentmem.training.lmpo.rollout", watching)
    return steps


def test_no_run_learns_from_the_benchmark_that_it_is_evaluated_on(make, learned_from):
    grid = make(
        benchmarks={"sums": {"data": SUMS}, "gcds": {"data": GCDS}, "lcms": {"data": LCMS}},
        memories=["text", "latent:sft", "latent:lmpo"],
        leave_out="benchmark",
        sections={"collect": {"num_tasks": 12}, "lmpo": COMMON["lmpo"] | {"tasks_per_step": 12}},
    )
    play_grid(grid)
    families = ("chain_sum", "gcd", "lcm")
    for run, unseen, step in zip(grid.runs, families, learned_from, strict=True):
        seen = {family for family in families if family != unseen}
        assert {family for family, _ in step} == seen
        stored = exported(run.config.bank.path)
        assert {trajectory.task.data["family"] for trajectory in stored} == seen
        folder = Path(run.config.run)
        keys = json.loads((folder / "results.json").read_text())["task_ids"]
        assert all(key.startswith(f"reasoning_gym:{unseen}-") for key in keys)
        recalled = {
            source
            for line in (folder / "evaluate" / "text.jsonl").read_text().splitlines()
            for message in json.loads(line)["steps"][0]["messages"]
            for source in message["recalled"]["sources"]
        }
        assert recalled
        assert recalled <= {trajectory.id for trajectory in stored}


@pytest.mark.slow
def test_no_run_learns_with_the_team_that_it_evaluates(make, learned_from):
    teams = ("autogen", "macnet", "camel")
    grid = make(
        benchmarks={"sums": {"data": SUMS | {"train_size": 8}}},
        teams=list(teams),
        memories=["latent:sft", "latent:lmpo"],
        leave_out="team",
        sections={"collect": {"num_tasks": 8}, "lmpo": COMMON["lmpo"] | {"tasks_per_step": 8}},
    )
    play_grid(grid)
    for run, unseen, step in zip(grid.runs, teams, learned_from, strict=True):
        others = set(teams) - {unseen}
        assert {team for _, team in step} == others
        assert {trajectory.team for trajectory in exported(run.config.bank.path)} == others
        played = (Path(run.config.run) / "evaluate" / "latent-lmpo.jsonl").read_text().splitlines()
        assert {json.loads(line)["team"] for line in played} == {unseen}
