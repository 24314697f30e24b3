"""Every reader of text from outside against damaged files and hostile texts: it reads them or says so in one line.

A few inputs of each reader run with all tests; `make fuzz` runs ten thousand (FUZZ_INPUTS). Always the same ones.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz_files import (
    CONFIG,
    FACTS,
    GRID,
    MIX,
    OVERRIDES,
    PROBLEM,
    QA,
    READINGS,
    RELEASED,
    RESULTS,
    ROW,
    RUN,
    SERVED,
    SETTINGS,
    TABLE,
    TEXTS,
    TRAJECTORY,
    WEIGHTS,
    adamw,
    header,
    lines,
    mapping,
    plain,
    settings_of,
)
from fuzzing import DAMAGES, Sample, damaged
from latentmem.bank.jsonl import read_batches
from latentmem.config import (
    CodeSection,
    QASection,
    Section,
    load_config,
    packaged_configs,
    packaged_grids,
    read_values,
)
from latentmem.environments.code.domain import extract_code
from latentmem.environments.pddl_folder import read_folder
from latentmem.environments.pddl_language import WORLDS, language
from latentmem.environments.pddl_world import World
from latentmem.environments.qa import extract, yes_or_no
from latentmem.environments.reasoning import extract as extract_result
from latentmem.environments.reasoning import harmless
from latentmem.errors import LatentMemError, RetrieverError
from latentmem.evaluation.batches import resume
from latentmem.grid.file import load_grid
from latentmem.grid.report import write_page
from latentmem.kept_latents import read_latents
from latentmem.memory.checkpoints import fill_parameters, read_checkpoint
from latentmem.parsing import parse_json, parse_yaml
from latentmem.processes import Processes
from latentmem.recipes.domains import DOMAINS
from latentmem.released import read_bank
from latentmem.report import format_markdown, format_table
from latentmem.report.ablation import find_ablation
from latentmem.report.page import write_report
from latentmem.report.read import read_run
from latentmem.report.samples import sample_of
from latentmem.runs import Run
from latentmem.server.corpus import Corpus
from latentmem.teams.team import load_team, packaged_teams
from latentmem.teams.turn import Team
from latentmem.training.checkpoint_folder import read_progress
from latentmem.training.demonstrations import read_demonstrations
from latentmem.training.optimizer import Optimization
from latentmem.trajectory import Trajectory

NUM_INPUTS = int(os.environ.get("FUZZ_INPUTS", "400"))
"""Of all readers together."""


@dataclass(frozen=True)
class Reader:
    """A reader and valid files for it."""

    name: str
    samples: list[Sample]
    read: Callable[[Path], object]
    share: float = 4
    """Of all inputs, relative to the other readers."""


def optimizer() -> Optimization:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    trained = SimpleNamespace(trainable=lambda: {"a": parameter})
    rates = {"learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": 1.0, "weight_decay": 0.0}
    return Optimization(trained, Processes(), num_steps=3, **rates)


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def in_run(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Read the run in whose folder the damaged file has this name; the others are whole."""

    def inside(path: Path) -> object:
        folder = path.parent / "run"
        put(folder / "run.json", json.dumps(RUN))
        put(folder / "metrics.jsonl", (json.dumps(ROW) + "\n") * 2)
        put(folder / "results.json", json.dumps(RESULTS))
        put(folder / "config.yaml", json.dumps(CONFIG))
        put(folder / "evaluate" / "text.jsonl", TRAJECTORY.to_json() + "\n")
        put(folder / "evaluate" / "latent-lmpo.read.json", json.dumps(READINGS))
        put(folder / "lmpo" / "state.json", "{}")
        put(folder / "lmpo" / "config.yaml", json.dumps({"lmpo": CONFIG["lmpo"]}))
        put(folder / name, path.read_bytes())
        return read(folder)

    return inside


def report(folder: Path) -> None:
    """What a report says, without its figures."""
    record = read_run(folder)
    results = record.results or {}
    format_table(results), format_markdown(results), sample_of(record)
    other = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    find_ablation(["a", "b"], [record.config, other.replace("3", "4")], [results, results])


def go_on(folder: Path) -> None:
    """A run that is continued."""
    with Run.open(folder, "seed: 0", "lmpo", {"lmpo": CONFIG["lmpo"]}) as run:
        run.rewind_metrics("lmpo", 1)
        run.log({"step": 2, "loss": 0.5})
        assert isinstance(run.state, dict)


def episodes(path: Path) -> None:
    put(path.with_name("none.jsonl"), TRAJECTORY.to_json() + "\n")
    put(path.with_name("none.costs"), path.read_bytes())
    resume(path.with_name("none.jsonl"), [TRAJECTORY.task] * 2)


def turn(path: Path) -> Team:
    team = load_team(str(path))
    calls = next(team.turn("task", "instructions", []))
    assert calls
    return team


def rows_of(section: type[Section], schema: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        data = {"kind": "qa" if section is QASection else "code", "schema": schema}
        rows = {"path": str(path)}
        return DOMAINS[section](section.model_validate(data | {"train": rows, "test": rows})).tasks("train")

    return read


def corpus(path: Path) -> None:
    found = Corpus(path)
    try:
        [found[i] for i in range(len(found))]
    finally:
        found.close()


def answers(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    for found in (extract(text), extract_result(text, numeric=True), extract_result(text, numeric=False)):
        assert found is None or isinstance(found, str)
        harmless(found or "", "polynomial_equations")
    yes_or_no(text), extract_code(text), language("gripper").extract(text), language("barman").extract(text)


def override(path: Path) -> None:
    load_config("quickstart", [path.read_bytes().decode("utf-8", "surrogateescape")])


def world(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    World(language("gripper").domain, text, domain_file="d", problem_file="p")


def folder_of_pddl(path: Path) -> None:
    for name in ("a.pddl", "b.pddl"):
        put(path.parent / "gripper" / name, PROBLEM)
    put(path.parent / "gripper.pddl", language("gripper").domain)
    put(path.parent / "test.jsonl", path.read_bytes())
    read_folder(str(path.parent), WORLDS)


def passages(path: Path) -> None:
    from latentmem.environments import retriever_client

    try:
        retriever_client._passages(path.read_bytes())
    except retriever_client._BadAnswer as error:
        raise RetrieverError(str(error)) from None


def weights(path: Path) -> None:
    put(path.parent / "ck" / "composer.safetensors", path.read_bytes())
    found, tensors = read_checkpoint(path.parent / "ck")
    parameters = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
    options = {"must_agree": ("rank", "words"), "told": ("agents",), "owner": "composer"}
    fill_parameters(path.parent / "ck", found, tensors, parameters, SETTINGS, **options)
    assert all(parameter.isfinite().all() for parameter in parameters.values())


def moments(path: Path) -> None:
    made = optimizer()
    made.load(path)
    made.parameters["a"].grad = torch.ones(2, 3)
    assert made.step(1, 0.5)[0]


def progress(path: Path) -> None:
    put(path.parent / "progress.json", path.read_bytes())
    read_progress(path.parent)


def only_value_errors(read: Callable[[bytes], object]) -> Callable[[Path], object]:
    def checked(path: Path) -> object:
        try:
            return read(path.read_bytes())
        except ValueError:
            return None

    return checked


TEAMS = packaged_teams()
READERS = [
    Reader("json", [Sample(RESULTS)], only_value_errors(parse_json)),
    Reader("yaml", [Sample(CONFIG)], only_value_errors(lambda content: parse_yaml(content.decode("utf-8", "replace")))),
    Reader("config", [Sample(value) for value in (CONFIG, MIX, FACTS, QA)], lambda path: load_config(str(path)), 10),
    Reader(
        "packaged config",
        [Sample(mapping(packaged_configs()[name])) for name in ("quickstart", "popqa", "kodcode")],
        lambda path: load_config(str(path)),
    ),
    Reader("override", list(map(plain, OVERRIDES)), override),
    Reader("team", [Sample(mapping(TEAMS["autogen"])), Sample(mapping(TEAMS["macnet"]))], turn, 6),
    Reader("dylan", [Sample(mapping(TEAMS["dylan"]))], turn, 4),
    Reader("grid", [Sample(GRID), Sample(mapping(next(iter(packaged_grids().values()))))],
           lambda path: load_grid(read_values(str(path)) | {"grid": read_values(str(path)).get("grid")}, str(path)), 3),
    Reader("trajectory", [Sample(json.loads(played.to_json())) for played in (TRAJECTORY, SERVED)],
           lambda path: Trajectory.from_json(path.read_bytes()).to_json(), 8),
    Reader("bank import", [lines(json.loads(TRAJECTORY.to_json()))], lambda path: list(read_batches(path, 2))),
    Reader("released bank", [Sample(RELEASED)], lambda path: read_bank(path)),
    Reader("question rows", [lines({"id": 1, "question": "Q?", "possible_answers": '["A"]', "o_aliases": "[]"})],
           rows_of(QASection, "popqa")),
    Reader("number rows", [lines({"question": "Q?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"})],
           rows_of(QASection, "gsm8k"), 2),
    Reader("program rows", [lines({"task_id": 1, "text": "Add.", "test_list": ["assert f(1) == 2"], "code": "x"})],
           rows_of(CodeSection, "mbpp")),
    Reader("demonstrations", [lines({"task": "1", "responses": {"scout": "42"}})],
           lambda path: read_demonstrations(path, [TRAJECTORY.task], ["scout"])),
    Reader("corpus", [lines({"id": 1, "contents": '"T"\ntext'}), lines({"id": "a", "title": "T", "text": "x"})],
           corpus),
    Reader("passages", [Sample({"result": [[{"document": {"id": "1", "contents": "T\nx"}, "score": 1.0}]]})], passages),
    Reader("answers", list(map(plain, TEXTS)), answers, 8),
    Reader("problem", [plain(PROBLEM.encode())], world, 2),
    Reader("labels", [lines({"id": 0, "additional_info": {"subtask": "gripper"}, "goal": "x", "difficulty": "easy",
                             "subgoals": ["at ball1 roomb"]})],
           folder_of_pddl, 2),
    Reader("checkpoint", [header(WEIGHTS, latentmem=json.dumps(SETTINGS)), settings_of(WEIGHTS, SETTINGS)], weights, 8),
    Reader("optimizer", [header(adamw())], moments, 2),
    Reader("progress", [Sample({"step": 2, "position": 3, "best_step": 1, "best_score": 0.5, "scores": {"1": 0.5}})],
           progress, 2),
    Reader("costs", [lines({"num_tasks": 1, "recall": 0.1, "composing": 0.1, "generation": 0.1, "environment": 0.1,
                            "peak_memory_mb": 5.0})], episodes),
    Reader("latents", [header({"latents": torch.ones(1, 1, 2, 4)}, latentmem=json.dumps(
        {"format_version": 1, "tasks": ["t"], "domains": ["d"], "roles": ["r"]}))], lambda path: read_latents(path)),
    Reader("run.json", [Sample(RUN)], in_run("run.json", go_on), 2),
    Reader("metrics", [lines(ROW)], in_run("metrics.jsonl", go_on), 2),
    Reader("state", [Sample({"tasks": 3, "inputs": {"text": "x"}})], in_run("lmpo/state.json", go_on), 2),
    Reader("phase", [Sample({"lmpo": CONFIG["lmpo"]})], in_run("lmpo/config.yaml", go_on), 2),
    *(Reader(f"report {name}", [sample], in_run(name, report), share) for name, sample, share in (
        ("run.json", Sample(RUN), 1), ("metrics.jsonl", lines(ROW), 1), ("results.json", Sample(RESULTS), 8),
        ("config.yaml", Sample(CONFIG), 1), ("evaluate/text.jsonl", lines(json.loads(SERVED.to_json())), 4),
        ("evaluate/latent-lmpo.read.json", Sample(READINGS), 3),
    )),
    Reader("figures", [Sample(RESULTS)], in_run("results.json", lambda folder: write_report([folder])), 0.2),
    Reader("figures of metrics", [lines(ROW)], in_run("metrics.jsonl", lambda folder: write_report([folder])), 0.2),
    Reader("grid page", [Sample(TABLE)], lambda path: (put(path.parent / "grid.json", path.read_bytes()),
                                                       write_page(path.parent)), 0.2),
]  # fmt: skip
TOTAL = sum(reader.share for reader in READERS)


@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_damaged_files_are_read_or_refused_in_one_line(
    reader: Reader, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "file"
    for sample in reader.samples:  # whole, it is read; some name files that are not there
        attempt(reader, path, damaged(sample, []))

    @settings(
        max_examples=max(2, round(NUM_INPUTS * reader.share / TOTAL)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(reader.samples), DAMAGES)
    def fuzz(sample: Sample, damages: list) -> None:
        attempt(reader, path, damaged(sample, damages))

    fuzz()


def attempt(reader: Reader, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        reader.read(path)
    except LatentMemError:
        return
