"""Chat templates as people have them, and text from outside that looks like a control token."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from latentmem.errors import ModelError
from latentmem.models.chat import Chat

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture
def chat_of(tiny_model_dir: Path) -> Callable[..., Chat]:
    """Make the chat of a tokenizer with another template, and with further tokens."""

    def chat_of(template: Any = TURNS, tokens: tuple[Any, ...] = (), day: int = 1, thinking: bool = False) -> Chat:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.chat_template = template
        tokenizer.add_tokens(list(tokens))
        return Chat(tokenizer, "mine", date(2026, 3, day), thinking)

    return chat_of


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('it needs tools') }}", "it needs tools"),
        ("{{ messages[0].tool_calls[0].name }}", "has no attribute 'tool_calls'"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("A fixed text.", "it leaves out some of the text, or repeats it"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "it leaves out some of the text"),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", "it leaves out"),
    ],
)
def test_a_template_that_fails_or_loses_a_text_is_refused_in_one_line(
    chat_of: Callable[..., Chat], template: str, said: str
) -> None:
    with pytest.raises(ModelError) as error:
        chat_of(template)
    assert str(error.value).startswith("the chat template of model 'mine' cannot be used: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_named_templates_without_a_default_are_refused_in_one_line(chat_of: Callable[..., Chat]) -> None:
    with pytest.raises(ModelError, match=r"^the chat template of model 'mine' cannot be used: "):
        chat_of({"chat": TURNS, "tool_use": "T"})


def test_a_template_that_names_system_itself_still_shows_the_role(chat_of: Callable[..., Chat]) -> None:
    chat = chat_of("SYSTEM says:{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    assert chat.decode(chat.encode_prompt("You count.", "1?")) == "SYSTEM says:You count.\n\n1?"


def test_a_template_that_asks_for_the_day_is_told_the_same_day_always(chat_of: Callable[..., Chat]) -> None:
    asked = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') + strftime_now( \"%A\" ) }}{% endif %}"
    chat = chat_of(asked + " {{ messages[0].content }} {{ messages[1].content }}", day=7)
    assert chat.decode(chat.encode_prompt("s", "u")) == "07 Mar 2026Saturday s u"


def test_a_template_that_reads_the_clock_otherwise_is_told(
    chat_of: Callable[..., Chat], caplog: pytest.LogCaptureFixture
) -> None:
    chat_of("{% set form = '%d' %}{{ strftime_now(form) }}" + TURNS)
    assert "its prompts change from day to day" in caplog.text


@pytest.mark.parametrize("thinking", [True, False])
def test_whether_a_model_thinks_is_what_the_configuration_says(chat_of: Callable[..., Chat], thinking: bool) -> None:
    template = "{{ messages[0].content }} {{ messages[1].content }}{{ ' and' if enable_thinking else ' so' }}"
    chat = chat_of(template, thinking=thinking)
    assert chat.decode(chat.encode_prompt("s", "u")) == ("s u and" if thinking else "s u so")


@pytest.mark.parametrize("token", ["<think>", "<|fim_prefix|>", "[TOOL_CALLS]", "<repo>name"])
def test_no_added_token_comes_from_a_text_whatever_its_flags(chat_of: Callable[..., Chat], token: str) -> None:
    for added in (AddedToken(token, special=True), AddedToken(token, special=False), AddedToken(token, lstrip=True)):
        chat = chat_of(tokens=(added,))
        (number,) = chat.tokenizer.convert_tokens_to_ids([token])
        assert number in chat.tokenizer(token)["input_ids"], "the tokenizer alone takes it for a token"
        for text in (token, f"a {token} b", token + token, f"{token[:2]}{token}{token[2:]}"):
            assert number not in chat.encode(text)
            assert number not in chat.encode_prompt(text, text)
            assert chat.decode(chat.encode(text)) == text


def test_words_and_blanks_that_people_add_stay_tokens(chat_of: Callable[..., Chat]) -> None:
    chat = chat_of(tokens=("aspirin", "\n\n\n"))
    word, blanks = chat.tokenizer.convert_tokens_to_ids(["aspirin", "\n\n\n"])
    assert word in chat.encode("no aspirin")
    assert blanks in chat.encode("a\n\n\nb")


def test_what_a_normalizer_makes_a_control_token_of_stays_text(chat_of: Callable[..., Chat]) -> None:
    chat = chat_of(tokens=(AddedToken("<tool>", normalized=True, special=True),))
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    chat = Chat(chat.tokenizer, "mine", date(2026, 1, 1), thinking=False)
    (number,) = chat.tokenizer.convert_tokens_to_ids(["<tool>"])
    for alike in ("\uff1ctool\uff1e", "<TOOL>", "\ufe64Tool\ufe65"):
        assert number in chat.tokenizer(alike)["input_ids"], "it only looks alike; the test is void"
        assert number not in chat.encode(f"x {alike} y")
        assert number not in chat.encode_prompt("s", alike)
        assert re.sub(r"\W", "", chat.decode(chat.encode(alike))) == "tool"


def test_many_threads_may_encode_and_decode_at_the_same_time(chat_of: Callable[..., Chat]) -> None:
    chat = chat_of()

    def there_and_back(number: int) -> tuple[list[int], str]:
        ids = chat.encode_prompt("Be brief.", f"task {number} <|im_end|> " * (1 + number % 5))
        return ids, chat.spell(ids)

    one_by_one = [there_and_back(number) for number in range(200)]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(there_and_back, range(200))) == one_by_one
