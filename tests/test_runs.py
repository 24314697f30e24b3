"""A run folder is killed, filled to the brim and opened twice; nothing acknowledged may be lost."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latentmem import runs
from latentmem.errors import RunError
from latentmem.files import read_json, write_atomic
from latentmem.runs import Metrics, Run, read_metrics

CONFIG = "run: somewhere\nseed: 11\n"
SECTIONS = {"team": "autogen", "lmpo": {"group_size": 8, "learning_rate": 1e-5, "epsilon": [0.2, 0.3]}, "params": {}}


def start(folder: Path, phase: str = "lmpo", sections: dict | None = None) -> Run:
    return Run.open(folder, CONFIG, phase, SECTIONS if sections is None else sections)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_new_run_records_config_surroundings_and_phase(tmp_path: Path) -> None:
    with start(tmp_path / "deep" / "run") as run:
        assert run.phase_folder == tmp_path / "deep" / "run" / "lmpo"
        assert run.state == {}
    folder = tmp_path / "deep" / "run"
    assert (folder / "config.yaml").read_text() == CONFIG
    assert "group_size: 8" in (folder / "lmpo" / "config.yaml").read_text()
    info = json.loads((folder / "run.json").read_text())
    assert info["seed"] == 11
    assert info["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert info["versions"]["torch"]
    assert info["continued"] == []
    assert info["started"].endswith("+00:00")


def test_opening_again_goes_on_and_keeps_the_start(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log({"step": 1, "reward": 0.5})
        run.state = {"step": 1}
    before = (tmp_path / "run.json").read_bytes()
    with start(tmp_path) as run:
        run.log({"step": 2, "reward": 0.25})
        assert run.state == {"step": 1}
    assert (tmp_path / "run.json").read_bytes() == before
    assert [row["reward"] for row in read_metrics(tmp_path / "metrics.jsonl").rows] == [0.5, 0.25]


def test_other_surroundings_are_added_to_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path).close()
    monkeypatch.setattr(runs, "_version", lambda package: "99")
    for _ in range(2):
        start(tmp_path).close()
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["versions"]["torch"] != "99"
    assert [then["versions"]["torch"] for then in info["continued"]] == ["99"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"lmpo": {**SECTIONS["lmpo"], "group_size": 4}},
            r"lmpo\.group_size was 8 when this phase was started and is 4",
        ),
        ({"lmpo": {**SECTIONS["lmpo"], "beta": 0.1}}, r"lmpo\.beta was absent .* is 0\.1 now"),
        ({"lmpo": {"group_size": 8, "learning_rate": 1e-5}}, r"lmpo\.epsilon was \[0\.2, 0\.3\] .* is absent now"),
        ({"params": {"a": 1}}, r"params\.a was absent"),
    ],
)
def test_a_phase_goes_on_only_with_the_configuration_it_was_started_with(
    tmp_path: Path, change: dict, expected: str
) -> None:
    start(tmp_path).close()
    with pytest.raises(RunError, match=f"lmpo/config.yaml: {expected}.*; set it back, or name a new run folder"):
        start(tmp_path, sections={**SECTIONS, **change})
    start(tmp_path).close()
    start(tmp_path, "sft", {**SECTIONS, **change}).close()


def test_a_key_that_was_unknown_at_the_start_is_no_change_at_its_default(tmp_path: Path) -> None:
    def complete(sections: dict) -> dict:
        return {**sections, "lmpo": {"beta": 0.0, **sections["lmpo"]}}

    def go_on(beta: float) -> None:
        sections = {**SECTIONS, "lmpo": {**SECTIONS["lmpo"], "beta": beta}}
        Run.open(tmp_path, CONFIG, "lmpo", sections, complete=complete).close()

    start(tmp_path).close()
    go_on(0.0)
    with pytest.raises(RunError, match=r"lmpo\.beta was 0\.0 when this phase was started and is 0\.1 now; set it back"):
        go_on(0.1)


def test_a_run_folder_is_held_by_one_opener(tmp_path: Path) -> None:
    with start(tmp_path), pytest.raises(RunError, match=f"process {os.getpid()} is working in this run folder"):
        start(tmp_path)
    start(tmp_path, "sft").close()


def test_a_killed_process_leaves_no_lock_and_loses_no_acknowledged_line(tmp_path: Path) -> None:
    program = f"""
import json
from latentmem.runs import Run
run = Run.open({str(tmp_path)!r}, "seed: 1", "sft", {{}})
step = 0
while True:
    step += 1
    run.log({{"step": step, "loss": 0.5}})
    run.state = {{"step": step}}
    print(step, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        for _ in range(20):
            line = child.stdout.readline()
        with pytest.raises(RunError, match=f"process {child.pid} is working in this run folder"):
            start(tmp_path, "sft", {})
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().splitlines()
    acknowledged = int(rest[-1] if rest else line)
    with start(tmp_path, "sft", {}) as run:
        assert run.state["step"] >= acknowledged
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl").rows]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= acknowledged


def test_importing_runs_loads_no_torch() -> None:
    code = "import sys, latentmem.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.log({"step": 1, "loss": float("nan"), "kl": float("-inf"), "reward": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"phase": "lmpo", "step": 1, "loss": None, "kl": None, "reward": 0.5, "non_finite": ["loss", "kl"]}


def test_a_line_without_step_is_our_mistake(tmp_path: Path) -> None:
    with start(tmp_path) as run, pytest.raises(ValueError, match="integer step"):
        run.log({"loss": 0.5})


def test_rewinding_drops_later_lines_of_one_phase_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    kept = b'{"phase":"sft",  "step": 9}\n{"phase": "lmpo", "step": 2, "loss": 1e0}\n'
    with start(tmp_path) as run:
        later = b'{"phase": "lmpo", "step": 3}\n{"phase": "lmpo", "step": 4}\n'
        (tmp_path / "metrics.jsonl").write_bytes(kept + later + b'{"phase": "collect", "step": 8}\n{"phase": "lm')
        run.rewind_metrics("lmpo", 2)
        assert (tmp_path / "metrics.jsonl").read_bytes() == kept + b'{"phase": "collect", "step": 8}\n'
        run.rewind_metrics("sft", 0)
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl").rows] == [2, 8]


def test_details_are_lines_of_the_phases_own_file_and_rewound_like_metrics(tmp_path: Path) -> None:
    path = tmp_path / "lmpo" / "dev.jsonl"
    with start(tmp_path) as run:
        run.rewind_details("dev.jsonl", -1)
        run.log_details("dev.jsonl", [{"step": 1, "loss": math.nan}, {"step": 1, "loss": 2.0}])
        run.log_details("dev.jsonl", [{"step": 2, "loss": 1.0}])
        first = {"step": 1, "loss": None, "non_finite": ["loss"]}
        assert read_metrics(path).rows == [first, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
        with path.open("ab") as file:
            file.write(b'{"step": 0')
        run.rewind_details("dev.jsonl", 1)
        assert read_metrics(path) == Metrics([first, {"step": 1, "loss": 2.0}], 0)
        run.rewind_details("dev.jsonl", -1)
        assert path.read_bytes() == b""


def test_opening_drops_a_torn_line_so_that_the_next_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"phase": "sft", "step": 1}\n{"phase": "sf')
    assert read_metrics(tmp_path / "metrics.jsonl") == Metrics([{"phase": "sft", "step": 1}], 1)
    with start(tmp_path) as run:
        run.log({"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == Metrics(
        [{"phase": "sft", "step": 1}, {"phase": "lmpo", "step": 1}], 0
    )


def test_a_damaged_line_is_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2 is not valid JSON"):
        read_metrics(path)
    path.write_bytes(b'{"step": 1}\n[1]\n')
    with pytest.raises(RunError, match=r"line 2 is a list, not a JSON object"):
        read_metrics(path)


def test_no_metrics_yet_are_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == Metrics([], 0)


def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        RunError, match=r"state\.json: cannot be written \(No space left on device\).*is kept.*Free some"
    ):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(tmp_path) as run:
        run.log({"step": 1})
        before = (tmp_path / "metrics.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_disk)
            with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be added to"):
                run.log({"step": 2})
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        run.log({"step": 2})
    assert len(read_metrics(tmp_path / "metrics.jsonl").rows) == 2


def test_a_write_that_stops_half_way_leaves_no_half_line(tmp_path: Path) -> None:
    # The limit on a file's size does to a write what a disk does that fills up within it.
    program = f"""
import resource
from latentmem.errors import RunError
from latentmem.runs import Run
with Run.open({str(tmp_path)!r}, "seed: 1", "sft", {{}}) as run:
    run.log({{"step": 1}})
    size = (run.folder / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
    try:
        run.log({{"step": 2}})
    except RunError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot be added to (No space left on device)" in done.stdout
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"phase": "sft", "step": 1}\n'


def test_a_lock_that_a_full_disk_does_not_take_is_named(tmp_path: Path) -> None:
    program = f"""
import resource
from latentmem.errors import RunError
from latentmem.runs import Run
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    Run.open({str(tmp_path)!r}, "seed: 1", "sft", {{}})
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"{tmp_path}/.lock: cannot be written (File too large)" in done.stdout
    start(tmp_path, "sft", {}).close()


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match=r"run: the run's folder cannot be made"):
        start(tmp_path / "run")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        (tmp_path / "lmpo" / "state.json").write_text('{"st')
        with pytest.raises(RunError, match=r"state\.json: not valid JSON"):
            _ = run.state
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RunError, match="expected a JSON object, found list"):
        read_json(tmp_path / "list.json")


def test_a_phase_that_does_not_exist_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'ppo'"):
        start(tmp_path, "ppo")


def test_the_commit_is_that_of_our_sources_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert runs._git_commit() is None
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-qm", "someone else's", "--allow-empty"], check=True)
    (tmp_path / "runs.py").write_text("")
    assert runs._git_commit() is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert runs._git_commit() == commit
    (tmp_path / "runs.py").write_text("changed")
    assert runs._git_commit() == f"{commit}-dirty"
