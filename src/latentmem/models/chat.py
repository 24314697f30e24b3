"""Between text and token ids: chat prompts as the model's template writes them, and text from outside as plain text.

A control token that is written in a task, a response or a memory stays a row of ordinary characters, whatever the
tokenizer's flags say; only the template's own stay what they are.
"""

import logging
import re
from collections.abc import Callable, Sequence
from datetime import date, datetime
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from latentmem.errors import ModelError
from latentmem.outside import well_formed
from latentmem.trajectory import Conversation

logger = logging.getLogger(__name__)

PLAIN_TEMPLATE = "{system}\n\nUser: {user}\n\nAssistant:"
"""Used for a model without a chat template."""

_CUT = "\ud800"
"""Marks a cut in text that is about to be encoded. Half of a surrogate pair is no character, so no text holds one."""
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_SYSTEM, _USER = "sys-5e1f07c2a94b", "usr-c83d6b20f7e1"
"""Placeholders for the two texts when a template is tried; no template holds them by itself."""


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, today: date, thinking: bool) -> None:
        """Try the template out.

        Args:
            tokenizer: the model's.
            name: the model's name, for errors.
            today: the date that a template is told which asks for it, so that a prompt is the same every day.
            thinking: whether templates that know `enable_thinking` let the model think before it answers.

        Raises:
            ModelError: the template fails, or leaves the user's text out.
        """
        self.tokenizer = tokenizer
        control = _control_tokens(tokenizer)
        self._control_ids = frozenset(control.values())
        guarded = [text for text in control if len(text) > 1]  # a single character has no inside to cut
        pattern = "|".join(map(re.escape, guarded)) or r"(?!)"
        self._control_starts = re.compile(f"(?=(?:{pattern}))(.)", re.DOTALL)
        # Without a normalizer a control token has one spelling, and the cuts above find it.
        fast = getattr(tokenizer, "backend_tokenizer", None)
        self._has_other_spellings = fast is None or fast.normalizer is not None
        self._render = _renderer(tokenizer, name, today, thinking)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text."""
        return self._encode_pieces(self._guard(text))

    def encode_prompt(self, system: str, user: str) -> list[int]:
        """Return the token ids of the chat prompt with its generation prompt.

        They equal the tokenizer's own encoding of the rendered chat, but for control tokens in the two texts.
        """
        return self._encode_pieces(self._render(self._guard(system), self._guard(user)))

    def encode_conversation(self, conversation: Conversation) -> list[int]:
        """Return the token ids of a chat of any form, with its tools and the generation prompt.

        A control token that is written in any of its texts stays text.
        """
        return self.encode_prompt(conversation.system, conversation.user)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, control tokens left out."""
        return self._text(token_ids, skip_special_tokens=True)

    def spell(self, token_ids: Sequence[int]) -> str:
        """Return the text of any tokens, control tokens written out."""
        return self._text(token_ids, skip_special_tokens=False)

    def _text(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _guard(self, text: str) -> str:
        """Cut inside each control token that the text holds, so that the tokenizer finds none."""
        guarded = self._control_starts.sub(rf"\1{_CUT}", well_formed(text))
        if self._has_other_spellings and not self._control_ids.isdisjoint(self._encode_pieces(guarded)):
            return _CUT.join(well_formed(text))
        return guarded

    def _encode_pieces(self, guarded: str) -> list[int]:
        ids: list[int] = []
        for piece in guarded.split(_CUT):
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens, with their ids, that text from outside must not bring about.

    These are all added tokens but ordinary text: Gemma adds runs of blanks, and some people add words of their field.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {t.content: i for i, t in added if t.special or not re.fullmatch(r"[\w\s]*", t.content)}


@lru_cache
def _on_that_day(template: str, today: date, name: str) -> str:
    """Return the template with the day written in where it asks for today's."""
    noon = datetime(today.year, today.month, today.day, 12)
    fixed = _CLOCK.sub(lambda call: repr(noon.strftime(call[2])), template)
    if "strftime_now(" in fixed:
        logger.warning(
            "the chat template of model %s reads the clock in a way that cannot be fixed to model.date; its prompts "
            "change from day to day",
            name,
        )
    return fixed


def _renderer(tokenizer: PreTrainedTokenizerBase, name: str, today: date, thinking: bool) -> Callable[[str, str], str]:
    """Return a function (system, user) -> the chat as text, ending in the generation prompt."""
    if tokenizer.chat_template is None:
        logger.warning("model %s has no chat template; prompts are written as %r", name, PLAIN_TEMPLATE)
        # A chat template writes the token that texts begin with by itself; here we have to, for models that expect one.
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        begin = tokenizer.bos_token if begins else ""
        return lambda system, user: begin + PLAIN_TEMPLATE.format(system=system, user=user)

    def chat(*messages: tuple[str, str]) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        text: str = tokenizer.apply_chat_template(
            turns,
            chat_template=_on_that_day(tokenizer.get_chat_template(), today, name),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        return text

    def apart(system: str, user: str) -> str:
        return chat(("system", system), ("user", user))

    def together(system: str, user: str) -> str:
        return chat(("user", f"{system}\n\n{user}"))

    reasons = []
    for render in (apart, together):
        try:
            text = render(_SYSTEM, _USER)
        except Exception as error:  # a template is a program, and fails as programs do
            reasons.append(" ".join(str(error).split())[:200] or type(error).__name__)
            continue
        if text.count(_SYSTEM) == 1 and text.count(_USER) == 1:
            if render is together:
                logger.warning(
                    "the chat template of model %s takes no system message; it is put before the user's", name
                )
            return render
        reasons.append("it leaves out some of the text, or repeats it")
    raise ModelError(
        f"the chat template of model {name!r} cannot be used: {'; '.join(dict.fromkeys(reasons))}; put one into the "
        "model's folder that writes a system and a user message of plain text"
    )
