"""Training over two processes against training in one. They meet over gloo, so no GPU is needed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentmem.memory.checkpoints import read_checkpoint

HERE = Path(__file__).parent
SEARCHED = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])


def run(num_processes: int, script: str, *words: str | Path) -> tuple[int, str]:
    """Exit status, and what was said."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    done = subprocess.run(
        [sys.executable, *(start if num_processes > 1 else []), str(HERE / script), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "PYTHONPATH": SEARCHED, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def launch(tmp_path: Path, tiny_model_dir: Path, other_model_dir: Path) -> Callable[..., tuple[int, str, Path]]:
    """Runs sharded_training.py in so many processes: exit status, what was said, the folder of its results."""

    def launch(num_processes: int, *mode: str) -> tuple[int, str, Path]:
        out = tmp_path / f"out{num_processes}"
        out.mkdir()
        paths = [tmp_path / "shared.sqlite", tiny_model_dir, other_model_dir, out]
        return *run(num_processes, "sharded_training.py", *paths, *mode), out

    return launch


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["steps", "fsdp"])
def test_two_processes_equal_one_also_where_one_of_them_has_nothing_to_do(launch: Callable, mode: str) -> None:
    found = {}
    for num_processes in (1, 2):
        status, said, out = launch(num_processes, mode if num_processes == 2 else "steps")
        assert status == 0, said
        found[num_processes] = (json.loads((out / "results.json").read_text()), out)
    (one, one_folder), (two, two_folder) = found[1], found[2]
    assert (one.pop("num_processes"), two.pop("num_processes")) == (1, 2)
    for of_model in two.pop("held", []):  # of all frozen layers each process holds half
        assert [(2 * held, whole) for held, whole in of_model] == [(whole, whole) for _, whole in of_model]
    assert one.keys() == two.keys()
    for name, metrics in one.items():
        assert two[name] == pytest.approx(metrics, rel=2e-4, abs=2e-5), name
        first, second = read_checkpoint(one_folder / name)[1], read_checkpoint(two_folder / name)[1]
        for key, tensor in first.items():
            # AdamW's first step is the sign of the gradient where that is much larger than its eps.
            assert torch.allclose(second[key], tensor, rtol=1e-3, atol=2e-4), (name, key)
    assert one["idle"]["updated"] == one["bnpo"]["updated"] == 1
    assert one["whole"] == {"steps": 3, "first": 2, "lines": 7}


@pytest.mark.slow
def test_mistake_in_one_process_ends_the_other_too(launch: Callable) -> None:
    status, said, _ = launch(2, "crash")
    assert status != 0
    assert "rank 1 stumbles" in said
