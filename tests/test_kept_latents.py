"""Kept latents: what is written is read, tasks composed again replace theirs, and damage is one line."""

from pathlib import Path

import numpy as np
import pytest

from latentmem.errors import RunError
from latentmem.kept_latents import KeptLatents, keep_latents, read_latents


def kept(*tasks: str, seed: int = 0, roles: tuple[str, ...] = ("a", "b"), num_latents: int = 2) -> KeptLatents:
    rng = np.random.default_rng([seed, len(tasks)])
    values = rng.standard_normal((len(tasks), len(roles), num_latents, 3)).astype(np.float32)
    return KeptLatents(tuple(tasks), tuple(f"domain of {task[:20]}" for task in tasks), roles, values)


def test_batches_add_up_bit_for_bit_and_a_task_composed_again_replaces_its_own(tmp_path: Path) -> None:
    path = tmp_path / "latent-lmpo.safetensors"
    first, second = kept("sums:1", "text:What is ü\u2028\n?"), kept("sums:3", seed=1)
    keep_latents(path, first)
    keep_latents(path, second)
    found = read_latents(path)
    assert (found.tasks, found.domains) == (first.tasks + second.tasks, first.domains + second.domains)
    assert found.roles == ("a", "b")
    np.testing.assert_array_equal(found.latents, np.concatenate([first.latents, second.latents]))

    again = kept("sums:3", seed=7)
    keep_latents(path, again)
    np.testing.assert_array_equal(read_latents(path).latents, np.concatenate([first.latents, again.latents]))
    assert read_latents(path).tasks == found.tasks
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_equal_latents_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        keep_latents(tmp_path / name, kept("x", "y"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("other", [kept("z", num_latents=4), kept("z", roles=("a", "c"))], ids=["K", "roles"])
def test_latents_of_another_composer_or_team_are_not_mixed_in(tmp_path: Path, other: KeptLatents) -> None:
    path = tmp_path / "latent-lmpo.safetensors"
    keep_latents(path, kept("x"))
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"holds latents \[2, 2, 3\] of the roles a, b, and .* are to be added; remove"):
        keep_latents(path, other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_a_damaged_file_is_one_line(tmp_path: Path, size: int) -> None:
    path = tmp_path / "latent-lmpo.safetensors"
    keep_latents(path, kept("x", "y"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunError, match=r"latent-lmpo\.safetensors: damaged \(.*\); remove it") as error:
        read_latents(path)
    assert "\n" not in str(error.value)
    with pytest.raises(RunError, match="damaged"):
        keep_latents(path, kept("z"))


def test_a_file_of_something_else_and_a_newer_one_are_told(tmp_path: Path) -> None:
    from safetensors.numpy import save

    path = tmp_path / "x.safetensors"
    for content in (
        save({"latents": np.zeros((1, 1, 1, 1), np.float32)}),
        save({"other": np.zeros(3, np.float32)}, {"latentmem": "{}"}),
        save({"latents": np.zeros((2, 1, 1, 1), np.float32)}, {"latentmem": header(1)}),
        save({"latents": np.full((1, 1, 1, 1), np.nan, np.float32)}, {"latentmem": header(1)}),
        save({"latents": np.zeros((1, 1, 1, 1), np.float64)}, {"latentmem": header(1)}),
    ):
        path.write_bytes(content)
        with pytest.raises(RunError, match="damaged"):
            read_latents(path)
    path.write_bytes(save({"latents": np.zeros((1, 1, 1, 1), np.float32)}, {"latentmem": header(2)}))
    with pytest.raises(RunError, match="format 2 is newer than 1; upgrade"):
        read_latents(path)
    with pytest.raises(RunError, match="cannot be read"):
        read_latents(tmp_path / "absent")


def header(version: int) -> str:
    return f'{{"format_version": {version}, "tasks": ["t"], "domains": ["d"], "roles": ["r"]}}'
