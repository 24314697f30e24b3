"""A composer's file: whole or not at all, and refused in one line where it is not what it should be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentmem.errors import CheckpointError
from latentmem.memory.checkpoints import (
    FORMAT_VERSION,
    fill_parameters,
    read_checkpoint,
    weights_file,
    write_checkpoint,
)

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}
SETTINGS = {"num_latents": 3, "template": "{task} ¿ü?\n", "target_modules": ["q_proj"]}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    write_checkpoint(folder, SETTINGS, TENSORS)
    settings, tensors = read_checkpoint(folder)
    assert settings == {"format_version": FORMAT_VERSION, **SETTINGS}
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in TENSORS
    )


def test_equal_composers_give_equal_bytes_whatever_the_order_of_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", SETTINGS, TENSORS)
    write_checkpoint(tmp_path / "b", dict(reversed(SETTINGS.items())), dict(reversed(TENSORS.items())))
    assert weights_file(tmp_path / "a").read_bytes() == weights_file(tmp_path / "b").read_bytes()


def test_folder_without_a_composer_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no composer here (composer.safetensors is missing); name a folder that holds one"
    )


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_file_is_told(tmp_path: Path, length: int) -> None:
    write_checkpoint(tmp_path, SETTINGS, TENSORS)
    path = weights_file(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path)
    assert str(error.value).startswith(f"{path}: damaged (")
    assert str(error.value).endswith("; restore it or take another checkpoint")
    assert "\n" not in str(error.value)


def test_newer_format_and_other_peoples_weights_are_told(tmp_path: Path) -> None:
    path = weights_file(tmp_path)
    save_file(TENSORS, path, {"latentmem": json.dumps({"format_version": FORMAT_VERSION + 1})})
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path)
    assert str(error.value) == f"{path}: format 2 is newer than 1; upgrade latentmem"
    save_file(TENSORS, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not written by latentmem"):
        read_checkpoint(tmp_path)


def test_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/x: the folder cannot be made \(Not a directory\); name another"):
        write_checkpoint(tmp_path / "file" / "x", SETTINGS, TENSORS)


CHILD = """
import resource, signal, sys
from pathlib import Path
import torch
from latentmem.errors import CheckpointError
from latentmem.memory.checkpoints import write_checkpoint
mode, folder = sys.argv[1], Path(sys.argv[2])
if mode == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        write_checkpoint(folder, {}, {"x": torch.ones(10_000)})
    except CheckpointError as error:
        print(error)
        sys.exit(2)
else:
    print("go", flush=True)
    for i in range(10**6):
        write_checkpoint(folder, {"i": i}, {"x": torch.full((20_000,), float(i))})
"""


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SETTINGS, TENSORS)
    done = subprocess.run([sys.executable, "-c", CHILD, "full", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(
        f"{weights_file(tmp_path)}: cannot be written (File too large); the file that was there is kept"
    )
    assert read_checkpoint(tmp_path)[0]["num_latents"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["composer.json", "composer.safetensors"]


def test_kill_at_any_moment_leaves_a_whole_checkpoint_of_one_save(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"i": -1}, {"x": torch.full((20_000,), -1.0)})
    numbers = []
    with subprocess.Popen([sys.executable, "-c", CHILD, "loop", tmp_path], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            for _ in range(100):  # whoever reads meanwhile sees whole ones too
                settings, tensors = read_checkpoint(tmp_path)
                assert (tensors["x"] == settings["i"]).all()
                numbers.append(settings["i"])
        finally:
            child.kill()
    settings, tensors = read_checkpoint(tmp_path)
    assert (tensors["x"] == settings["i"]).all()
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("[]", "not written by latentmem"),
        ('{"format_version": "1"}', "not written by latentmem"),
        ('{"format_version": true}', "not written by latentmem"),
        ('{"format_version": 0}', "not written by latentmem"),
        ("[" * 900 + "]" * 900, "damaged (nested deeper than 100 levels)"),
        ('{"format_version": 1, "rank": 2, "rank": 3}', "damaged (key 'rank' is given twice)"),
        ('{"format_version": 1, "rank": "2"}', "damaged (rank: input should be a valid integer)"),
        ('{"format_version": 1, "words": []}', "damaged (words: input should be an object)"),
    ],
)
def test_settings_that_are_none_are_told(tmp_path: Path, header: str, reason: str) -> None:
    save_file(TENSORS, weights_file(tmp_path), {"latentmem": header})
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path)
    assert str(error.value).startswith(f"{weights_file(tmp_path)}: {reason}")


@pytest.mark.parametrize("value", [torch.ones(4, dtype=torch.int32), torch.tensor([1.0, 2.0, float("nan"), 3.0])])
def test_whole_numbers_and_nan_are_no_weights_and_change_nothing(tmp_path: Path, value: torch.Tensor) -> None:
    parameter = torch.zeros(4)
    with pytest.raises(CheckpointError, match="a holds whole numbers, or values that are not finite"):
        fill_parameters(tmp_path, {}, {"a": value}, {"a": parameter}, {}, must_agree=(), told=(), owner="composer")
    assert not parameter.any()
