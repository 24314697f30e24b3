"""The table's numbers, worked out by hand from a few tasks."""

import json

import pytest
from grid_rows import against, memory_row

from latentmem.errors import RunError
from latentmem.grid.file import GridSection, Place
from latentmem.grid.report import all_cells
from latentmem.grid.results import Failure, Played, summarise

SECTION = GridSection(benchmarks={"sums": "quickstart"}, memories=("none", "text", "latent:lmpo"))


def memory(name, successes, seconds=1.0, **versus):
    return memory_row(
        name,
        successes,
        accuracy_low=0.125,
        accuracy_high=0.875,
        num_errors=1,
        prompt_tokens=100.0 * seconds,
        latent_tokens=8.0,
        seconds={"generation": seconds, "total": seconds},
        **versus,
    )


def played(*memories, benchmark="sums", team="autogen", variant="", seed=0, tasks=None):
    tasks = tasks or [f"{benchmark}:{i}" for i in range(len(memories[0]["successes"]))]
    results = {"model": "tiny", "temperature": 0.0, "task_ids": tasks, "memories": list(memories)}
    return Played(Place(benchmark, team, variant, seed), results)


def table_of(*runs, failures=()):
    return summarise("runs/g", SECTION, runs, failures, 99, num_bootstraps=2000)


def rows(table):
    return {(row["variant"], row["benchmark"], row["team"], row["memory"]): row for row in table["rows"]}


def test_one_seed_is_told_as_its_run_told_it_and_p_values_are_corrected_over_the_whole_table():
    runs = [
        played(
            memory("none", [0, 1], vs_text=against(0.5, 0.9)),
            memory("text", [0, 0], vs_none=against(-0.5, 0.9)),
            memory("latent:lmpo", [1, 1], vs_none=against(0.5, p_none), vs_text=against(1.0, p_text)),
            variant=variant,
        )
        for variant, p_none, p_text in (("a", 0.004, 0.03), ("b", 0.009, 0.8))
    ]
    table = table_of(*runs)
    assert table["num_comparisons"] == 6  # none against text is text against none told twice
    found = rows(table)
    first = found["a", "sums", "autogen", "latent:lmpo"]
    assert (first["accuracy"], first["accuracy_low"], first["accuracy_high"]) == (1.0, 0.125, 0.875)
    assert first["vs_none"] == {**against(0.5, 0.004), "p_holm": pytest.approx(0.024)}  # 6 x 0.004
    second = found["b", "sums", "autogen", "latent:lmpo"]
    assert second["vs_none"]["p_holm"] == pytest.approx(0.045)  # 5 x 0.009
    assert first["vs_text"]["p_holm"] == pytest.approx(0.12)  # 4 x 0.03
    assert second["vs_text"]["p_holm"] == 1.0
    assert found["a", "sums", "autogen", "none"]["vs_text"] is None
    assert table["overall"] == []


def test_seeds_are_pooled_by_task_and_their_costs_averaged():
    runs = [
        played(memory("none", [0, 0, 1, 0]), memory("text", [1, 0, 1, 1], seconds), seed=seed)
        for seed, seconds in ((0, 1.0), (5, 3.0))
    ]
    runs[1].results["memories"][1]["successes"] = [1, 0, 0, 0]
    found = rows(table_of(*runs))["", "sums", "autogen", "text"]
    assert found["accuracy"] == 4 / 8
    assert found["by_seed"] == [0.75, 0.25]
    assert found["seeds"] == [0, 5]
    assert found["vs_none"]["difference"] == pytest.approx(2 / 8)
    # By task and summed over the seeds: +2, 0, -1, +1. Of the 8 patterns of signs of the three that differ, |sum| is
    # 2, 2, 4, 4 and 0 (+2 -1 -1), 0, 2, 2: 6 of 8 are as far from zero as 2.
    assert found["vs_none"]["p_value"] == pytest.approx(6 / 8, abs=0.03)
    assert found["accuracy_low"] < 0.5 < found["accuracy_high"]
    assert (found["seconds"]["total"], found["prompt_tokens"], found["num_errors"]) == (2.0, 200.0, 2)


def test_the_rows_over_all_count_each_benchmark_and_team_alike_and_ties_tasks_of_teams_together():
    wins, none = [1] * 6, [0] * 6
    runs = [
        played(memory("none", none), memory("text", wins), team="autogen"),
        played(memory("none", none), memory("text", wins, 3.0), team="macnet"),
        played(memory("none", [0, 1]), memory("text", [0, 1]), benchmark="gcds"),
    ]
    for run in runs:
        run.results["memories"][1]["vs_none"] = against(0.0, 0.5)
    none_row, text = table_of(*runs)["overall"]
    assert (none_row["memory"], none_row["accuracy"]) == ("none", pytest.approx((0 + 0 + 0.5) / 3))
    assert text["accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert text["num_tasks"] == 8
    assert text["seconds"]["total"] == pytest.approx(5 / 3)
    assert text["vs_none"]["difference"] == pytest.approx(2 / 3)
    # Two teams on the same six tasks: six coins, not twelve; all alike has a chance of 2 in 64.
    assert text["vs_none"]["p_value"] == pytest.approx(2 / 64, abs=0.01)
    assert text["vs_none"]["p_holm"] == pytest.approx(4 * text["vs_none"]["p_value"])
    assert text["vs_text"] is None


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_a_control_is_compared_with_its_memory_in_each_row_and_over_all(seeds):
    real, control = "latent:sft", "latent:sft:other-role"
    runs = [
        played(
            memory("none", [0] * 6), memory(real, [1] * 6), memory(control, [1, 0, 0, 0, 0, 0]), team=team, seed=seed
        )
        for team in ("autogen", "macnet")
        for seed in seeds
    ]
    table = table_of(*runs)
    for row in [row for row in [*table["rows"], *table["overall"]] if row["memory"] == control]:
        assert row["vs_real"]["difference"] == pytest.approx(-5 / 6)
        assert row["vs_real"]["p_value"] == pytest.approx(2 / 2**5, abs=0.01)  # five tasks differ, all one way
        assert (row["vs_none"], row["vs_text"]) == (None, None)
    assert table["num_comparisons"] == 3 * (1 + 1)  # latent against none, and the control against it


def test_what_a_memory_carries_has_its_interval_in_one_run_and_is_a_mean_over_several():
    def told(nats):
        return {"nats": nats, "low": nats - 1, "high": nats + 1, "p_value": 0.01, "num_tasks": 6}

    def run(team, seed, **values):
        return played(memory("none", [0] * 6), memory("latent:sft", [1] * 6, **values), team=team, seed=seed)

    one = table_of(run("autogen", 0, carried=told(2.0)))
    assert [row["carried"] for row in one["rows"]] == [None, told(2.0)]
    assert [cell["carried"] for cell in one["cells"]] == [None, told(2.0)]
    assert "+2.00 [+1.00, +3.00]" in all_cells(one)[2]
    several = table_of(
        run("autogen", 0, carried=told(2.0)), run("autogen", 1, carried=told(3.0)), run("macnet", 0, carried=told(0.5)),
        run("macnet", 1, carried=told(0.5)),
    )  # fmt: skip
    assert [row["carried"] for row in several["rows"]] == [None, {"nats": 2.5}, None, {"nats": 0.5}]
    assert [row["carried"] for row in several["overall"]] == [None, {"nats": 1.5}]
    older = table_of(run("autogen", 0, carried=told(2.0)), run("autogen", 1))  # one of a version that did not measure
    assert [row["carried"] for row in older["rows"]] == [None, None]
    assert "carried, nats [95%]" not in all_cells(older)[0]


def test_a_control_of_text_is_compared_with_text_alone():
    table = table_of(
        played(memory("none", [0] * 6), memory("text", [1] * 6), memory("text:shuffle", [1, 0, 0, 0, 0, 0]))
    )
    (row,) = [row for row in table["rows"] if row["memory"] == "text:shuffle"]
    assert row["vs_real"]["difference"] == pytest.approx(-5 / 6)
    assert (row["vs_none"], row["vs_text"]) == (None, None)


def test_a_memory_that_one_run_lacks_is_left_out_where_it_cannot_be_averaged():
    runs = [
        played(memory("none", [0, 1]), memory("text", [1, 1], vs_none=against(0.5, 1.0))),
        played(memory("none", [0, 1]), team="macnet"),
    ]
    table = table_of(*runs, failures=[Failure(Place("sums", "macnet", "", 0), "text", "no bank")])
    assert [row["memory"] for row in table["overall"]] == ["none"]
    assert ("", "sums", "macnet", "text") not in rows(table)
    assert table["failures"] == [
        {"benchmark": "sums", "team": "macnet", "variant": "", "seed": 0, "memory": "text", "line": "no bank"}
    ]
    assert (table["num_done"], table["num_cells"]) == (3, 99)


def test_every_cell_is_kept_and_all_of_it_is_json():
    table = table_of(played(memory("none", [0, 1]), seed=3))
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    (cell,) = table["cells"]
    assert (cell["run"], cell["seed"], cell["memory"], cell["successes"]) == ("sums-autogen-seed3", 3, "none", [0, 1])
    assert table["schema_version"] == 1


def test_nothing_played_is_an_empty_table():
    table = table_of()
    assert (table["rows"], table["overall"], table["num_comparisons"]) == ([], [], 0)


def test_runs_on_different_tasks_are_not_pooled():
    runs = [played(memory("none", [0, 1]), seed=seed, tasks=["a", f"b{seed}"]) for seed in (0, 1)]
    with pytest.raises(RunError, match="sums-autogen-seed0 and sums-autogen-seed1 were played on different tasks"):
        table_of(*runs)
