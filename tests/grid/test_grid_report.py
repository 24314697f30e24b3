"""What people read of a grid: the marks, the words, LaTeX that holds together, and a page without markup from names."""

import json
import re

import pytest
from grid_rows import against, memory_row

from latentmem import cli
from latentmem.errors import RunError
from latentmem.grid.file import GridSection, Place
from latentmem.grid.report import (
    escape_latex,
    format_latex,
    format_markdown,
    overview,
    sentences_of,
    write_page,
    write_tables,
)
from latentmem.grid.results import Failure, Played, summarise

HOSTILE = "50%_&<b>x</b>|y"


def memory(name, successes, **versus):
    share = sum(successes) / len(successes)
    return memory_row(
        name,
        successes,
        accuracy_low=share / 2,
        accuracy_high=(1 + share) / 2,
        num_errors=0,
        prompt_tokens=210.4,
        latent_tokens=16.0 * name.startswith("latent"),
        seconds={"total": 1.25},
        **versus,
    )


def table_of(benchmark="sums", variants=("",), seeds=(0,), failures=(), train_teams=()):
    names = ("none", "text", "latent:lmpo")
    section = GridSection(
        benchmarks={benchmark: "x"}, memories=names, seeds=seeds, variants={name: {} for name in variants if name}
    )
    runs = [
        Played(
            Place(benchmark, "autogen", variant, seed),
            {
                "model": "tiny",
                "temperature": 0.0,
                "task_ids": ["a", "b", "c", "d"],
                "memories": [
                    memory("none", [0, 0, 1, 0]),
                    memory("text", [0, 0, 0, 0], vs_none=against(-0.25, 0.001)),
                    memory("latent:lmpo", [1, 0, 1, 1], vs_none=against(0.5, 0.002), vs_text=against(0.75, 0.4)),
                ],
            },
        )
        for variant in variants
        for seed in seeds
    ]
    return summarise("runs/g", section, runs, failures, 3 * len(runs) + len(failures), 200, train_teams)


@pytest.mark.parametrize(
    ("teams", "said"),
    [
        (["macnet", "camel"], ["Composers were trained, and banks filled, by macnet, camel; unseen: autogen."]),
        (["autogen"], ["Composers were trained, and banks filled, by autogen."]),
        ([], []),
    ],
)
def test_the_verdict_names_who_trained_for_all_and_who_is_unseen(teams, said):
    assert [line for line in sentences_of(table_of(train_teams=teams)) if "trained" in line] == said


def test_the_overview_marks_what_is_left_after_correction():
    assert overview(table_of()) == [
        ["memory", "sums, autogen"],
        ["none", "25.0"],
        ["text", "0.0°"],
        ["latent:lmpo", "75.0*"],
    ]
    # 3 x 10 = 30 comparisons: 30 x 0.001 and 20 x 0.002 stay below 5%, each step with fewer left; 60 do not.
    assert overview(table_of(variants=tuple("abcdefghij")))[2][1] == "0.0°"
    many = table_of(variants=tuple("abcdefghijklmnopqrst"))
    assert many["num_comparisons"] == 60
    assert overview(many)[2] == ["text, a", "0.0"]


def test_the_verdict_counts_cells_and_tells_findings_seeds_and_failures():
    failure = Failure(Place("sums", "macnet", "", 2), "latent:sft", "nothing to learn from")
    assert sentences_of(table_of(failures=[failure])) == [
        "3 of 4 cells: 1 benchmark, 1 team, 3 memories, 1 seed.",
        "text (sums, autogen) against none: -25.0 [-35.0, -15.0] points, worse, significant at 5% "
        "(p = 0.003 after correction for 3 comparisons).",
        "latent:lmpo (sums, autogen) against none: +50.0 [+40.0, +60.0] points, better, significant at 5% "
        "(p = 0.004 after correction for 3 comparisons).",
        "The other difference is not.",
        "The intervals cover the choice of tasks, not the luck of training: there is one seed.",
        "Failed: sums, macnet, latent:sft, seed 2: nothing to learn from",
    ]
    several = sentences_of(table_of(seeds=(0, 1)))
    assert (
        "The intervals cover the choice of tasks and the draw of 2 seeds, the p-values that of tasks alone." in several
    )


def test_markdown_has_the_number_of_comparisons_and_corrected_p_values():
    lines = format_markdown(table_of()).splitlines()
    assert lines[0] == "| memory | sums, autogen |"
    assert "| sums | autogen | latent:lmpo | 75.0% \\[37.5, 87.5\\] | +50.0 \\[+40.0, +60.0\\] | 0.004 |" in "\n".join(
        lines
    )
    assert "Holm's correction for all 3 comparisons" in lines[-1]


def test_latex_escapes_names_and_every_row_has_as_many_cells_as_columns():
    text = format_latex(table_of(benchmark=HOSTILE, variants=("a#b", "c~d^e\\f{g}$")))
    assert r"50\%\_\&\textless{}b\textgreater{}x\textless{}/b\textgreater{}|y" in text
    assert r"c\textasciitilde{}d\textasciicircum{}e\textbackslash{}f\{g\}\$" in text
    assert r"a\#b" in text
    tables = re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tables) == 3  # overview, comparisons, costs
    for columns, body in tables:
        rows = [line for line in body.splitlines() if line.endswith(r" \\")]
        assert len(rows) >= 1 + 3
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}
        assert [line for line in body.splitlines() if line not in rows and not line.endswith("rule")] == []
    plain = re.sub(r"\\[\\{}$&#_%]", "", re.sub(r"^%.*$", "", text, flags=re.MULTILINE))
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert not re.search(r"(?<!\\)[#_%~^]", plain.replace(r"$^\circ$", ""))


def test_latex_leaves_ordinary_text_alone_and_keeps_one_line():
    assert escape_latex("latent:lmpo, k2 [95%]\n50°") == r"latent:lmpo, k2 [95\%] 50$^\circ$"
    assert escape_latex("other-task k-2 -4.2 [-23.1, +15.4] - 1-2") == "other-task k-2 $-$4.2 [$-$23.1, +15.4] - 1-2"


def test_tables_and_figure_lie_beside_grid_json(tmp_path):
    told = write_tables(tmp_path, table_of())
    assert {path.name for path in tmp_path.iterdir()} == {"grid.md", "grid.tex", "grid.png"}
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert "latent:lmpo          75.0*" in told
    assert f"latentmem report {tmp_path}" in told


def test_a_grid_without_a_single_result_has_tables_that_say_so(tmp_path):
    section = GridSection(benchmarks={"sums": "x"})
    table = summarise("runs/g", section, [], [Failure(Place("sums", "autogen", "", 0), "text", "no")], 5, 10)
    assert "0 of 5 cells" in write_tables(tmp_path, table)
    assert not (tmp_path / "grid.png").exists()
    (tmp_path / "grid.json").write_text(json.dumps(table))
    assert "0 of 5 cells" in write_page(tmp_path).read_text()


def test_the_page_shows_names_as_text_fetches_nothing_and_is_made_by_report(tmp_path, capsys):
    (tmp_path / "grid.json").write_text(json.dumps(table_of(benchmark=HOSTILE)))
    assert cli.main(["report", str(tmp_path)]) == 0
    page = tmp_path / "report" / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    html = page.read_text()
    assert "<b>x" not in html
    assert "50%_&amp;&lt;b&gt;x&lt;/b&gt;|y" in html
    assert "default-src 'none'" in html
    assert not re.findall(r"""(?:src|href|srcset)="(?!data:|#)""", html)
    assert "latent:lmpo" in html
    assert (tmp_path / "report" / "grid.tex").exists()


def test_a_newer_grid_or_one_among_runs_is_refused(tmp_path, capsys):
    (tmp_path / "grid.json").write_text('{"schema_version": 2}')
    with pytest.raises(RunError, match=r"grid\.json: schema_version is 2, newer than 1.*upgrade"):
        write_page(tmp_path)
    assert cli.main(["report", str(tmp_path), str(tmp_path)]) == 2
    assert "is a grid; report it alone" in capsys.readouterr().err


def test_a_table_of_an_older_version_is_still_told(tmp_path):
    table = table_of()
    for row in [*table["rows"], *table["overall"], *table["cells"]]:
        for key in ("vs_real", "memory_prompt_tokens", "memory_generated_tokens", "learning"):
            row.pop(key, None)
    del table["train_teams"]
    (tmp_path / "grid.json").write_text(json.dumps(table))
    assert "latent:lmpo" in write_page(tmp_path).read_text()
