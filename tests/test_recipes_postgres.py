"""Runs whose bank is on a PostgreSQL server: the same numbers as with a file; two runs that fill one bank at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentmem.bank import ExperienceBank
from latentmem.bank_place import read_url
from latentmem.config import load_config
from postgres_server import sql
from test_recipes import CONFIG, PHASES, metrics, results

pytestmark = pytest.mark.slow


@pytest.fixture
def url(postgres_server, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PGPASSWORD", "unused")
    return postgres_server.new_bank()


@pytest.fixture
def configured(tmp_path, tiny_model_dir):
    def configured(run, *overrides):
        path = tmp_path / f"{run}.yaml"
        path.write_text(CONFIG.format(run=tmp_path / run, model=tiny_model_dir))
        return load_config(str(path), ["bank.embedder=hashing", *overrides])

    return configured


@pytest.mark.usefixtures("lucky")
def test_a_run_with_its_bank_on_a_server_gives_the_numbers_of_one_with_a_file(url, configured, tmp_path):
    options = ("evaluate.online=true", "evaluate.memories=[none, text, latent:sft]")
    secret = url.replace("tester@", "tester:geheim@")
    runs = [configured("file", *options), configured("server", *options, f"bank.path={secret}")]
    for config in runs:
        for phase in ("collect", "sft", "lmpo", "evaluate"):
            PHASES[phase](config)
    assert metrics(runs[0]) == metrics(runs[1])
    assert results(runs[0]) == results(runs[1])
    with ExperienceBank(tmp_path / "file" / "bank.sqlite") as file, ExperienceBank(url) as server:
        assert list(file) == list(server)
        assert server.verify().ok
    written = [file for file in (tmp_path / "server").rglob("*") if file.is_file()]
    assert all(b"geheim" not in file.read_bytes() for file in written)
    assert not (tmp_path / "server" / "bank.sqlite").exists()
    assert read_url(url).shown in (tmp_path / "server" / "config.yaml").read_text()


def test_two_runs_collect_into_one_bank_at_once(url, configured, tmp_path):
    for seed in (1, 2):
        configured(f"run{seed}")
    command = (sys.executable, "-m", "latentmem.cli", "collect")
    processes = [
        subprocess.Popen(
            [*command, str(tmp_path / f"run{seed}.yaml"), "bank.embedder=hashing", f"bank.path={url}", f"seed={seed}",
             "collect.num_tasks=12"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    alone = []
    for seed in (1, 2):
        config = configured(f"alone{seed}", f"seed={seed}", "collect.num_tasks=12")
        PHASES["collect"](config)
        with ExperienceBank(Path(config.run) / "bank.sqlite") as bank:
            alone += list(bank)
    with ExperienceBank(url) as bank:
        assert set(bank.ids()) == {trajectory.id for trajectory in alone}
        assert bank.verify().ok
    assert sql(url, "SELECT count(*) FROM trajectories") == [(len({trajectory.id for trajectory in alone}),)]
