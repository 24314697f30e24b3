"""The phases of a run with servers that sample: collect, train and evaluate, interrupted by a server's death."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from standin import stand_in

from latentmem import recipes
from latentmem.config import parse_config
from latentmem.errors import ConfigError, EngineError, RunError
from latentmem.models.language_model import LanguageModel

pytestmark = pytest.mark.usefixtures("lucky", "no_embedding_model")

CONFIG = """
run: RUN
team: pair
model: {name: MODEL, device: cpu, dtype: float32}
data:
  kind: reasoning_gym
  families: [{name: chain_sum, params: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}]
  train_size: 12
  test_size: 2
composer: {num_latents: 3, rank: 2, max_prompt_tokens: 500, template: '{task} {memory} {role_messages}'}
bank: {num_retrieved: 2, only_successes: false}
sampling: {temperature: 1.0, max_response_tokens: 4}
collect: {num_tasks: 6, batch_size: 3}
rivals: {max_response_tokens: 6}
lmpo: {num_steps: 3, tasks_per_step: 2, group_size: 3, save_every: 1, initial: untrained, learning_rate: 0.01}
evaluate: {batch_size: 2, num_bootstraps: 20, memories: [none, 'latent:lmpo', voyager]}
"""


@pytest.fixture
def configure(tmp_path, tiny_model_dir, server):
    def make(run="run", engine=None, **sections):
        values = yaml.safe_load(CONFIG)
        values["run"], values["model"]["name"] = str(tmp_path / run), str(tiny_model_dir)
        values["model"]["engine"] = engine or {"kind": "vllm", "urls": [server.url], "retries": 0}
        for name, fields in sections.items():
            values[name] |= fields
        return parse_config(values)

    return make


def rows(config, phase):
    lines = map(json.loads, (Path(config.run) / "metrics.jsonl").read_text().splitlines())
    return [{key: v for key, v in row.items() if "seconds" not in key} for row in lines if row["phase"] == phase]


def test_collect_lmpo_and_evaluate_sample_through_the_server_alone(configure, server, monkeypatch):
    asked = []
    local = LanguageModel.sample

    def noted(self, prompts, *rest):
        asked.extend(prompts)
        return local(self, prompts, *rest)

    monkeypatch.setattr(LanguageModel, "sample", noted)
    config = configure()
    recipes.collect(config)
    recipes.train_lmpo(config)
    results = recipes.play_test(config)
    assert {prompt.role for prompt in asked} == {"probe"}
    told = {request["max_tokens"] for request in server.requests}
    assert told == {12, 4, config.rivals.max_response_tokens}  # the probe, the agents, a memory's own questions
    first = [row["first_ratio_max"] for row in rows(config, "lmpo") if "first_ratio_max" in row]
    assert first
    assert first == pytest.approx([1] * len(first), abs=1e-3)
    assert all("importance_max" not in row for row in rows(config, "lmpo"))
    assert [row["name"] for row in results["memories"]] == ["none", "latent:lmpo", "voyager"]


@pytest.mark.slow
def test_a_run_whose_server_dies_goes_on_with_the_same_command_at_another_address(configure, server, model, tmp_path):
    straight = configure("straight")
    recipes.collect(straight)
    recipes.train_lmpo(straight)
    broken = configure("broken")
    shutil.copytree(straight.run, broken.run, ignore=shutil.ignore_patterns("lmpo", "metrics.jsonl"))
    num_asked = len(server.requests)
    server.misdeeds = [""] * 30 + ["die"]
    with pytest.raises(EngineError, match=f"^{server.url}: no usable answer after 1 attempts"):
        recipes.train_lmpo(broken)
    assert len(server.requests) > num_asked + 30
    assert 0 < len(rows(broken, "lmpo")) < 3
    with stand_in(model.model, model.name) as other:
        recipes.train_lmpo(configure("broken", {"kind": "vllm", "urls": [other.url], "parallel": 2}))
    assert rows(broken, "lmpo") == rows(straight, "lmpo")
    with pytest.raises(RunError, match=r"model\.engine\.kind was 'vllm'.* is 'local' now"):
        recipes.train_lmpo(configure("broken", {"kind": "local"}))


def test_servers_that_are_down_at_the_start_are_one_line(configure, server):
    server.kill()
    with pytest.raises(EngineError, match=f"^{server.url}: no server of vLLM answers .*[^\n]*$"):
        recipes.collect(configure())


def test_what_servers_cannot_do_is_refused(configure):
    with pytest.raises(ConfigError, match=r"grpo trains the agents themselves, and model\.engine vllm samples from"):
        recipes.train_grpo(configure())
    for cut in ({"top_p": 0.9}, {"top_k": 5}):
        config = configure(f"{cut}", sampling=cut)
        recipes.collect(config)
        with pytest.raises(ConfigError, match=r"set sampling\.top_p=1 and sampling\.top_k=0"):
            recipes.train_lmpo(config)


def test_in_bfloat16_importance_weights_are_on_by_themselves(configure):
    config = configure(model={"dtype": "bfloat16"})  # the server samples in float32
    recipes.collect(config)
    recipes.train_lmpo(config)
    logged = [row for row in rows(config, "lmpo") if "importance_max" in row]
    assert logged
    assert all(row["importance_mean"] == pytest.approx(1, abs=0.1) for row in logged)
    assert all(row["importance_max"] > 0.9 for row in logged)
