"""The probe finds what is wrong with a server before any work begins, and names the flag that mends it."""

import logging

import pytest
from standin import stand_in

from latentmem.engines.probe import check_server, check_servers
from latentmem.engines.vllm import VLLMEngine
from latentmem.errors import EngineError
from latentmem.models.language_model import LanguageModel


def engine_at(model, *urls):
    return VLLMEngine(model, urls, 4, 20.0, retries=0, backoff_seconds=0.01)


def test_a_good_server_passes_every_check(model, server):
    found = check_server(engine_at(model, server.url), server.url, 64)
    assert all(finding.is_fine for finding in found)
    assert [finding.text.partition(":")[0] for finding in found] == [
        f"serves {model.name}, 2048 tokens at most",
        "greedy tokens are those of the model here",
        "tempered log-probabilities agree",
        "log-probabilities with other latents agree",
        "two different latents give different results",
        "log-probabilities out of the server's cache agree",
        "a seed gives the same tokens again",
    ]


@pytest.mark.parametrize(
    ("fault", "value", "flag"),
    [
        ("takes_embeds", False, "--enable-prompt-embeds"),
        ("processed_logprobs", False, "--logprobs-mode processed_logprobs"),
        ("name", "other", "--served-model-name"),
        ("max_model_len", 32, "--max-model-len"),
        ("sees_latents", False, "--model"),
        ("mixes_up_latents", True, "--no-enable-prefix-caching"),
    ],
)
def test_each_fault_names_its_flag(model, server, fault, value, flag):
    setattr(server, fault, value)
    *before, last = check_server(engine_at(model, server.url), server.url)
    assert all(finding.is_fine for finding in before)
    assert not last.is_fine
    assert flag in last.text
    assert "\n" not in last.text
    with pytest.raises(EngineError, match=f"^{server.url}: .*{flag}"):
        check_servers(engine_at(model, server.url))


def test_another_model_under_the_same_name_is_found(model, server, wordy_model_dir):
    other = LanguageModel.from_pretrained(str(wordy_model_dir))  # of the same width
    with stand_in(other.model, model.name) as wrong, pytest.raises(EngineError, match="--model"):
        check_servers(engine_at(model, wrong.url))


def test_seeds_that_do_not_repeat_are_told_and_no_reason_to_stop(model, server):
    server.repeats_seeds = False
    (told,) = [f for f in check_server(engine_at(model, server.url), server.url) if not f.is_fine]
    assert "cannot be repeated to the token" in told.text
    check_servers(engine_at(model, server.url))


def test_a_dead_server_is_told_and_the_others_are_used(model, server, caplog):
    with stand_in(model.model, model.name) as other:
        dead = other.url
    with caplog.at_level(logging.WARNING):
        check_servers(engine_at(model, dead, server.url))
    assert f"{dead}: no server of vLLM answers" in caplog.text
    with pytest.raises(EngineError, match=f"^{dead}: no server of vLLM answers .*latentmem engine start CONFIG"):
        check_servers(engine_at(model, dead))


def test_bfloat16_is_held_to_a_mean_difference(tiny_model_dir, model, server):
    rounded = LanguageModel.from_pretrained(str(tiny_model_dir), dtype="bfloat16")
    engine = engine_at(rounded, server.url)  # it samples in float32
    assert all(finding.is_fine for finding in check_server(engine, server.url))
    server.processed_logprobs = False
    assert "processed_logprobs" in check_server(engine, server.url)[-1].text
