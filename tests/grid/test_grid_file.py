"""A file becomes configurations: what is varied is laid over what is common, and every mistake is told at once."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from latentmem.config import FILLS_BANK, load_config, packaged_grids, read_values
from latentmem.errors import ConfigError
from latentmem.grid.file import GridSection, load_grid, overlay

SUMS = {"kind": "reasoning_gym", "families": [{"name": "chain_sum"}], "train_size": 4, "test_size": 2}
GCDS = {"kind": "reasoning_gym", "families": [{"name": "gcd"}], "train_size": 4, "test_size": 2}
GRID = {"benchmarks": {"sums": {"data": SUMS}, "gcds": {"data": GCDS, "max_turns": 3}}, "memories": ["none", "text"]}


@pytest.fixture
def load(tmp_path):
    def load(grid=GRID, **sections):
        values = {"run": "runs/g", **sections, "grid": grid}
        (tmp_path / "g.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return load_grid(read_values(str(tmp_path / "g.yaml")), "g.yaml")

    return load


def names(grid):
    return [run.place.name for run in grid.runs]


def test_overlay_merges_mappings_replaces_lists_and_takes_tasks_from_one_source():
    values = {"lmpo": {"beta": 0.0}, "data": {"kind": "qa", "train": {"hub": "x", "split": "y"}, "test": {"path": "t"}}}
    changed = overlay(values, {"lmpo": {"group_size": 4}, "lmpo.beta": 0.1, "data.train": {"path": "a"}, "run": "r"})
    assert changed == {
        "lmpo": {"group_size": 4, "beta": 0.1},
        "data": {"kind": "qa", "train": {"path": "a"}, "test": {"path": "t"}},
        "run": "r",
    }
    assert overlay(values, {"data": {"kind": "pddl"}})["data"] == {"kind": "pddl"}
    assert overlay(values, {"data.train.limit": 3})["data"]["train"] == {"hub": "x", "split": "y", "limit": 3}
    assert values["lmpo"] == {"beta": 0.0}


def test_every_combination_is_an_ordinary_run_in_a_folder_with_a_readable_name(load):
    grid = load(
        GRID | {"teams": ["autogen", "macnet"], "seeds": [0, 7], "variants": {"k2": {"composer.num_latents": 2}}},
        lmpo={"num_steps": 3},
    )
    assert len(grid.runs) == 2 * 2 * 2
    assert names(grid)[:3] == ["sums-autogen-k2-seed0", "sums-autogen-k2-seed7", "sums-macnet-k2-seed0"]
    config = grid.runs[-1].config
    assert config.run == "runs/g/cells/gcds-macnet-k2-seed7"
    assert (config.team, config.seed, config.max_turns, config.composer.num_latents) == ("macnet", 7, 3, 2)
    assert (config.lmpo.num_steps, [*map(str, config.evaluate.memories)]) == (3, ["none", "text"])
    assert config.data.families[0].name == "gcd"


def test_a_base_gives_what_the_file_leaves_out_and_a_benchmark_only_what_belongs_to_its_tasks(load):
    grid = load(
        {"base": "reasoning-mix", "benchmarks": ["quickstart", "popqa"], "memories": ["none"]}, lmpo={"beta": 0.5}
    )
    base, quick, popqa = (load_config(name) for name in ("reasoning-mix", "quickstart", "popqa"))
    first, second = (run.config for run in grid.runs)
    assert first.data == quick.data
    assert second.data == popqa.data
    assert second.sampling.max_response_tokens == 32
    assert first.sampling.temperature == base.sampling.temperature
    assert (first.lmpo.group_size, first.lmpo.beta) == (base.lmpo.group_size, 0.5)
    assert second.collect == base.collect != popqa.collect


def test_a_benchmark_may_begin_with_a_configuration_and_go_its_own_way(load):
    given = {"base": "popqa", "data.train": {"path": "a.jsonl"}, "data.test.limit": 9, "evaluate": {"num_tasks": 5}}
    (run,) = load({"benchmarks": {"pop": given}, "memories": ["none"]}, evaluate={"batch_size": 2}).runs
    assert (run.config.data.train.path, run.config.data.train.hub) == ("a.jsonl", None)
    assert (run.config.data.test.hub, run.config.data.test.limit) == ("akariasai/PopQA", 9)
    assert (run.config.evaluate.num_tasks, run.config.evaluate.batch_size) == (5, 2)


def test_runs_that_collect_alike_read_one_bank_however_variants_are_named_and_ordered(load):
    variants = {"k2": {"composer.num_latents": 2}, "k4": {"composer.num_latents": 4}, "few": {"collect.num_tasks": 2}}
    grid = load(GRID | {"seeds": [0, 1], "variants": variants})
    banks = {run.place.name: run.bank for run in grid.runs}
    assert banks["sums-autogen-k2-seed0"] == banks["sums-autogen-k4-seed0"]
    others = ["sums-autogen-k2-seed1", "sums-autogen-few-seed0", "gcds-autogen-k2-seed0"]
    assert len({banks[name].name for name in ["sums-autogen-k2-seed0", *others]}) == 4
    for run in grid.runs:
        assert run.config.bank.path == f"{run.bank.config.run}/bank.sqlite"
        assert run.bank.config.run == f"runs/g/banks/{run.bank.name}"
        assert (run.bank.config.seed, run.bank.config.data) == (run.config.seed, run.config.data)
        assert run.bank.config.collect == run.config.collect
    again = load(GRID | {"seeds": [1, 0], "variants": {"k3": {"composer.num_latents": 3}, **variants}})
    assert {run.place.name: run.bank for run in again.runs}.items() >= banks.items()


def test_teams_that_are_evaluated_only_read_the_bank_that_the_others_filled(load):
    grid = load(GRID | {"teams": ["camel", "dylan"]}, train_teams=["autogen", "macnet"])
    first, other = (run for run in grid.runs if run.place.benchmark == "sums")
    assert first.bank == other.bank
    assert first.bank.name.startswith("sums-autogen+macnet-seed0-")
    assert first.bank.config.train_teams == ("autogen", "macnet")


def test_no_bank_is_shared_where_none_is_needed_one_is_given_or_memory_is_used_to_collect(load):
    assert load(GRID | {"memories": ["none"]}).runs[0].bank is None
    (given, _) = load(GRID, bank={"path": "b.sqlite"}).runs
    assert (given.bank, given.config.bank.path) == (None, "b.sqlite")
    (own, _) = load(GRID, collect={"memory": "text"}).runs
    assert (own.bank, own.config.bank.path) == (None, None)


def test_tasks_that_are_experience_only_fill_another_bank(load):
    paper, apart = load(GRID | {"seeds": [0], "variants": {"paper": {}, "apart": {"bank.experience_tasks": 3}}}).runs[
        :2
    ]
    assert paper.bank.name != apart.bank.name
    assert (paper.bank.config.bank.experience_tasks, apart.bank.config.bank.experience_tasks) == (0, 3)
    # A default changes no name, so that banks are found which were collected before the key was known.
    (plain,) = load(
        GRID | {"seeds": [0], "teams": ["autogen"], "benchmarks": {"sums": GRID["benchmarks"]["sums"]}}
    ).runs
    kept = plain.config.model_dump(mode="json", by_alias=True, include=set(FILLS_BANK))
    kept = {key: kept[key] for key in FILLS_BANK} | {"team": "autogen", "bank": {"embedder": "all-minilm-l6-v2"}}
    assert plain.bank.name.endswith(hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8])


def test_a_left_out_benchmark_is_evaluated_on_and_all_others_are_learned_from(load):
    tags = {"data": {**SUMS, "seed": 5}, "sampling.max_response_tokens": 99}
    grid = load({**GRID, "benchmarks": {**GRID["benchmarks"], "more": tags}, "leave_out": "benchmark"})
    first = grid.runs[0].config
    assert [part.data.families[0].name for part in first.data.test] == ["chain_sum"]
    assert [(part.data.families[0].name, part.data.seed) for part in first.data.train] == [("gcd", 0), ("chain_sum", 5)]
    assert [part.max_turns for part in first.data.train] == [3, 1]
    assert (first.max_turns, first.sampling.max_response_tokens) == (3, 99)
    assert first.train_teams == ()


def test_a_left_out_team_is_evaluated_and_all_others_learn(load):
    grid = load(GRID | {"teams": ["autogen", "macnet", "camel"], "leave_out": "team"})
    assert [(run.config.team, run.config.train_teams) for run in grid.runs[:3]] == [
        ("autogen", ("macnet", "camel")),
        ("macnet", ("autogen", "camel")),
        ("camel", ("autogen", "macnet")),
    ]


MISTAKES = [
    ({"grid": {**GRID, "benchmark": []}}, "unknown key 'grid.benchmark'; did you mean 'benchmarks'?"),
    ({"grid": {"memories": ["none"]}}, "grid.benchmarks: missing"),
    ({"grid": {**GRID, "memories": ["txt"]}}, "grid.memories names 'txt', which is not a memory; did you mean 'text'?"),
    ({"grid": {**GRID, "memories": ["none", "none"]}}, "grid.memories names one memory twice"),
    ({"grid": {**GRID, "teams": []}}, "grid.teams is [] (list); expected at least one entry"),
    ({"grid": {**GRID, "teams": ["a/x.yaml", "b/x.yaml"]}}, "grid has 'x' twice among its teams"),
    ({"grid": {**GRID, "seeds": [1, 1]}}, "grid has 1 twice among its seeds"),
    ({"grid": {**GRID, "leave_out": "seed"}}, "grid.leave_out is 'seed'; expected 'none', 'benchmark' or 'team'"),
    ({"grid": {**GRID, "leave_out": "team"}}, "grid has one team; leave_out: team needs another to learn with"),
    ({"grid": {"benchmarks": ["popqa"], "leave_out": "benchmark"}}, "grid has one benchmark; leave_out: benchmark"),
    ({"grid": {"benchmarks": ["popqa", "popqa"]}}, "grid.benchmarks names one benchmark twice"),
    ({"grid": {"benchmarks": ["popq"]}}, "benchmark popq: popq: no such file, and no packaged configuration of that "
     "name; did you mean 'popqa'?"),
    ({"grid": {"benchmarks": ["grid-quick"]}}, "benchmark grid-quick: grid-quick: is a grid of many runs"),
    ({"grid": {**GRID, "base": "grid-quick"}}, "grid.base is 'grid-quick', which is a grid itself"),
    ({"grid": {"benchmarks": {"x": {"max_turns": 2}}}}, "benchmark x: data: missing"),
    ({"grid": {**GRID, "variants": {"k": {"composer.num_latent": 2}}}}, "run sums-autogen-k-seed0: unknown key "
     "'composer.num_latent'; did you mean 'num_latents'?"),
    ({"grid": {**GRID, "variants": {"a b": {}, "a_b": {}}}}, "two runs would be called sums-autogen-a_b-seed0"),
    ({"grid": {**GRID, "variants": {"d": {"evaluate.split": "dev"}}}}, "run sums-autogen-d-seed0: evaluate.split is "
     "'dev'; a grid plays the test split only"),
    ({"lmop": {}}, "benchmark sums: unknown key 'lmop'; did you mean 'lmpo'?"),
    ({"run": ""}, "run is missing; it names the grid's folder"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_one_line_before_anything_is_made(load, changes, message):
    with pytest.raises(ConfigError) as error:
        load(**({"grid": GRID} | changes))
    assert str(error.value).startswith(f"g.yaml: {message}")
    assert "\n" not in str(error.value)


def test_other_commands_refuse_a_grid_by_name():
    with pytest.raises(ConfigError, match="grid-quick: is a grid of many runs; start it with `latentmem evaluate`"):
        load_config("grid-quick")


@pytest.mark.parametrize("name", sorted(packaged_grids()))
def test_packaged_grids_are_valid(name):
    grid = load_grid(read_values(name), name)
    assert grid.folder == Path(f"runs/{name}")
    assert len(grid.runs) > 1


def test_the_papers_grid_trains_two_teams_and_as_long_as_each_benchmarks_own_configuration_says():
    grid = load_grid(read_values("grid-paper"), "grid-paper")
    assert {run.config.team for run in grid.runs} - {"autogen", "macnet"} == {"camel", "dylan"}
    assert {run.config.train_teams for run in grid.runs} == {("autogen", "macnet")}
    bases = {name: load_config(changes["base"]) for name, changes in grid.section.benchmarks.items()}
    del bases["pddl"]  # made for a small machine
    keys = ("num_steps", "tasks_per_step", "group_size", "eval_every", "eval_tasks")
    for run in (run for run in grid.runs if run.place.benchmark in bases):
        own = bases[run.place.benchmark]
        assert run.config.data == own.data
        assert run.config.bank.num_retrieved == own.bank.num_retrieved
        for trained in (run.config.lmpo, run.config.grpo):
            assert [getattr(trained, key) for key in keys] == [getattr(own.lmpo, key) for key in keys]


def test_every_key_is_documented():
    docs = (Path(__file__).resolve().parents[2] / "docs" / "grid.md").read_text()
    for key, field in GridSection.model_fields.items():
        assert field.description, key
        assert f"| `{key}` |" in docs, key
