"""What usage tells: tokens that another server counts, and tokens of prompts that were kept from earlier ones."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from served import Parts, client, on_a_port, parts_of
from whole import whole

from chat_standin import chat_stand_in
from latentmem.engines.batching import Batcher
from latentmem.engines.upstream import UpstreamEngine
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefilling import Kept
from latentmem.serving.desk import Voice

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(str(tiny_model_dir))


def speak_with(parts: Parts, voice: Voice) -> None:
    parts.desk.shop = replace(parts.desk.shop, voice=voice)


@contextmanager
def keeping(folder: Path, model: LanguageModel, tokens: int, **more: Any) -> Iterator[httpx2.Client]:
    """A client of a server whose model keeps so many tokens of prompts."""
    with closing(Batcher(model, kept=Kept(tokens))) as batcher, parts_of(folder, batcher, **more) as parts:
        speak_with(parts, Voice(batcher, model.chat.said, model.chat.tool_form))
        with on_a_port(parts.app()) as address, client(address) as http:
            yield http


def turn(http: httpx2.Client, messages: list[Any], **more: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 12, "latentmem": {"tokens": True}}
    answer = http.post(CHAT, json=body | more)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def cached(told: dict[str, Any]) -> int:
    return int(told["usage"]["prompt_tokens_details"]["cached_tokens"])


@contextmanager
def columns_read(model: LanguageModel) -> Iterator[list[int]]:
    """The numbers of columns that pass the model, one for each pass."""
    passed: list[int] = []
    handle = model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    try:
        yield passed
    finally:
        handle.remove()


def chat(http: httpx2.Client) -> list[dict[str, Any]]:
    """Three turns of a chat."""
    messages: list[Any] = [{"role": "system", "content": "You solve. Think first, then answer."}]
    told = []
    for text in ("What is 17 + 25?", "And one more?", "And one less than that?"):
        messages.append({"role": "user", "content": text})
        told.append(turn(http, messages))
        messages.append(told[-1]["choices"][0]["message"])
    return told


def test_a_second_turn_reads_only_what_is_new_and_answers_the_same(tmp_path: Path, model: LanguageModel) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with keeping(tmp_path / "a", model, 4096) as http, columns_read(model) as with_kept:
        first, second, third = chat(http)
    with keeping(tmp_path / "b", model, 0) as http, columns_read(model) as without:
        plain = chat(http)
    assert [each["choices"] for each in (first, second, third)] == [each["choices"] for each in plain]
    for one, other in zip((first, second, third), plain, strict=True):
        assert one["latentmem"]["choices"][0]["token_ids"] == other["latentmem"]["choices"][0]["token_ids"]
        assert one["latentmem"]["choices"][0]["logprobs"] == pytest.approx(
            other["latentmem"]["choices"][0]["logprobs"], abs=1e-4
        )
    ids = [each["latentmem"]["prompt_token_ids"] for each in (first, second, third)]
    alike = [0]
    for before, now in pairwise(ids):
        same = [one == other for one, other in zip(before, now, strict=False)]
        alike.append(same.index(False) if False in same else len(before))
    assert list(map(cached, (first, second, third))) == alike
    assert alike[1] > len(ids[0]) - 4  # what was said before, to where the response began
    assert list(map(cached, plain)) == [0, 0, 0]
    assert sum(without) - sum(with_kept) == sum(alike)
    assert [each["usage"]["prompt_tokens"] for each in (first, second, third)] == list(map(len, ids))


def test_choices_of_one_request_count_what_was_kept_before_it(tmp_path: Path, model: LanguageModel) -> None:
    asked = [{"role": "user", "content": "What is 17 + 25?"}]
    with keeping(tmp_path, model, 4096) as http:
        first = turn(http, asked, n=3)
        again = turn(http, asked, n=3)
    assert cached(first) == 0  # the second and third have read what the first has, but nothing was kept before
    assert cached(again) == again["usage"]["prompt_tokens"] - 1


def test_the_responses_api_tells_the_same(tmp_path: Path, model: LanguageModel) -> None:
    with keeping(tmp_path, model, 4096) as http:
        body = {"model": "m", "input": "What is 17 + 25?", "max_output_tokens": 4}
        told = [http.post(RESPONSES, json=body).json()["usage"] for _ in range(2)]
        events = http.post(RESPONSES, json=body | {"stream": True}).text.split("data: ")
    streamed = json.loads(events[-1])
    assert [each["input_tokens_details"]["cached_tokens"] for each in told] == [0, told[0]["input_tokens"] - 1]
    assert streamed["response"]["usage"] == told[1]


def test_prompts_of_another_tenant_are_read_anew_and_figures_tell_what_was_kept(
    tmp_path: Path, model: LanguageModel
) -> None:
    asked = [{"role": "user", "content": "What is 17 + 25?"}]
    with closing(Batcher(model)) as batcher, whole(tmp_path, batcher, memory="none") as server:
        speak_with(server.parts, Voice(batcher, model.chat.said, model.chat.tool_form))
        acme, other = server.key("acme"), server.key("globex")
        with server.client(acme) as mine, server.client(other) as theirs:
            found = [cached(turn(each, asked)) for each in (mine, mine, theirs, theirs)]
        with server.client(server.key("", "admin")) as operator:
            figures = operator.get("/metrics").text
        lines = [json.loads(line) for line in server.log.getvalue().splitlines()]
    num = found[1]
    assert num > 10
    assert found == [0, num, 0, num]
    for tenant in ("acme", "globex"):
        assert f'latentmem_cached_prompt_tokens_total{{tenant="{tenant}"}} {float(num)}\n' in figures
        assert f'latentmem_tokens_total{{kind="prompt",tenant="{tenant}"}} {float(2 * num + 2)}\n' in figures
    assert [line["tokens"]["cached"] for line in lines if "tokens" in line] == found


@contextmanager
def upstream(folder: Path) -> Iterator[tuple[httpx2.Client, Any, Any]]:
    """A client, the server behind the server, and what the server before it is made of."""
    with chat_stand_in(lambda asked: {"role": "assistant", "content": "It is 42."}) as behind:
        engine = UpstreamEngine("big", behind.url, retries=0)
        with whole(folder, engine, memory="none") as server, server.client() as http:
            speak_with(server.parts, Voice(engine, engine.said, engine.tool_form))
            yield http, behind, server


def test_the_figures_of_an_upstream_are_told(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    with upstream(tmp_path) as (http, _, _):
        whole_answer = http.post(CHAT, json=body).json()
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        (*_, last, _) = [line[6:] for line in http.post(CHAT, json=asked).text.splitlines() if line]
        two = http.post(CHAT, json=body | {"n": 2}).json()["usage"]
        response = http.post(RESPONSES, json={"model": "m", "input": "What is 17 + 25?"}).json()
        figures = http.get("/metrics").text
    usage = {
        "prompt_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens": 3,
        "total_tokens": 14,
        "latent_tokens": 0,
    }
    assert whole_answer["usage"] == json.loads(last)["usage"] == usage
    assert (two["prompt_tokens"], two["completion_tokens"], two["total_tokens"]) == (11, 6, 17)
    told = response["usage"]
    assert (told["input_tokens"], told["output_tokens"], told["total_tokens"]) == (11, 3, 14)
    assert told["input_tokens_details"]["cached_tokens"] == 8
    assert 'latentmem_tokens_total{kind="generated",tenant=""} 15.0\n' in figures
    ChatCompletion.model_validate(whole_answer, strict=True)
    Response.model_validate_json(json.dumps(response), strict=True)


@pytest.mark.parametrize(
    "told", [None, [], {}, {"prompt_tokens": -1, "completion_tokens": "3", "prompt_tokens_details": [8]}]
)
def test_an_upstream_that_counts_nothing_usable_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    monkeypatch.setattr("chat_standin.USAGE", told)
    with upstream(tmp_path) as (http, _, _):
        answer = http.post(CHAT, json={"model": "m", "messages": [{"role": "user", "content": "Hello"}]})
    usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], cached(answer.json())) == (0, 0, 0)


def test_tokens_that_an_upstream_counts_are_within_the_limits_of_a_key(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    with upstream(tmp_path) as (http, _, server):
        headers = server.key("acme", "infer", tokens_per_minute=20)
        assert [http.post(CHAT, json=body, headers=headers).status_code for _ in range(3)] == [200, 200, 429]
