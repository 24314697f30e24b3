"""Between text and token ids: chat prompts as the model's template writes them, and text from outside as plain text.

A control token that is written in a task, a response or a memory stays a row of ordinary characters, whatever the
tokenizer's flags say; only the template's own stay what they are.
"""

import logging
import re
from collections.abc import Callable, Sequence
from datetime import date, datetime
from functools import cached_property, lru_cache, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from latentmem.errors import ModelError
from latentmem.models.chat_forms import CALL_MARKS, ChatForms, ToolForm, Write, begun_call, try_out
from latentmem.models.conversations import as_two, fold, marked, names_of
from latentmem.outside import well_formed
from latentmem.trajectory import Conversation

logger = logging.getLogger(__name__)

PLAIN_TEMPLATE = "{system}\n\nUser: {user}\n\nAssistant:"
"""Used for a model without a chat template."""

_CUT = "\ud800"
"""Marks a cut in text that is about to be encoded. Half of a surrogate pair is no character, so no text holds one."""
_EDGE = "\ud801"
"""Marks where a text begins and ends, when it is looked for control tokens that two texts would make together."""
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
        added = tokenizer.added_tokens_decoder.items()
        self._unsaid = frozenset(i for i, token in added if token.special and token.content not in CALL_MARKS)
        self._insides = "\0".join(guarded)
        self._beginnings = {text[:n] for text in guarded for n in range(1, len(text))}
        self._ends = {text[n:] for text in guarded for n in range(1, len(text))}
        across = "|".join(rf"[{_EDGE}\s]*".join(map(re.escape, text)) for text in guarded) or r"(?!)"
        self._across = re.compile(across)
        # Without a normalizer a control token has one spelling, and the cuts above find it.
        fast = getattr(tokenizer, "backend_tokenizer", None)
        self._has_other_spellings = fast is None or fast.normalizer is not None
        self._write = _writer(tokenizer, name, today, thinking)
        self._render = _renderer(tokenizer, name, self._write)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text."""
        return self._encode_pieces(self._guard(text))

    def encode_prompt(self, system: str, user: str) -> list[int]:
        """Return the token ids of the chat prompt with its generation prompt.

        They equal the tokenizer's own encoding of the rendered chat, but for control tokens in the two texts.
        """
        return self._encode_marked(lambda mark: self._render(mark(system), mark(user)))

    def encode_conversation(self, conversation: Conversation) -> list[int]:
        """Return the token ids of a chat of any form, with its tools and the generation prompt.

        A control token that is written in any of its texts stays text. What the template has no place for is told in
        other words, see `conversations.fold`; a system message followed by a user's is the prompt of these two. Where
        a tool has to be called, the call's beginning follows the generation prompt.
        """
        begun = begun_call(self.tool_form, conversation.must_call, names_of(conversation.tools))
        return self._encode_chat(conversation) + (self._encode_pieces(begun) if begun else [])

    def _encode_chat(self, conversation: Conversation) -> list[int]:
        messages, tools = fold(conversation, self.forms)
        roles = [message["role"] for message in messages]
        if self._write is None or (roles == ["system", "user"] and not tools):
            return self.encode_prompt(*as_two(messages))
        write = self._write
        try:
            return self._encode_marked(lambda mark: write(*self._marked(messages, tools, mark)))
        except Exception as error:  # the template took other chats of this form
            logger.debug("the chat template refuses a chat of %s: %s", roles, error)
            return self.encode_prompt(*as_two(fold(conversation, _NO_FORMS)[0]))

    @cached_property
    def forms(self) -> ChatForms:
        """What chats the template takes."""
        return _NO_FORMS if self._write is None else try_out(self._write)

    @property
    def tool_form(self) -> ToolForm:
        """How the model writes a call of a tool: in the form of its template, or as it is told to."""
        return self.forms.tool_form

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, control tokens left out."""
        return self._text(token_ids, skip_special_tokens=True)

    def said(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, without control tokens but those that stand around calls of tools."""
        return self._text([each for each in token_ids if each not in self._unsaid], skip_special_tokens=False)

    def spell(self, token_ids: Sequence[int]) -> str:
        """Return the text of any tokens, control tokens written out."""
        return self._text(token_ids, skip_special_tokens=False)

    def _text(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _encode_marked(self, render: Callable[[Callable[[str], str]], str]) -> list[int]:
        """Encode a rendered chat; `render` writes it and passes each text from outside through the given function."""
        at_an_edge = False

        def guard(text: str) -> str:
            nonlocal at_an_edge
            at_an_edge = at_an_edge or self._may_join(text)
            return self._guard(text)

        rendered = render(guard)
        if at_an_edge:
            shadow = render(partial(self._edged, _EDGE))
            if any(_EDGE in found[0] for found in self._across.finditer(shadow)):
                rendered = render(partial(self._edged, _CUT))
        return self._encode_pieces(rendered)

    def _marked(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], mark: Callable[[str], str]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return messages and tools with each text in them marked. Roles are words of ours, and keys have no edges."""

        def each(value: Any) -> Any:
            return marked(value, mark, self._guard)

        written = [{"role": m["role"]} | {key: each(m[key]) for key in m if key != "role"} for m in messages]
        return written, each(list(tools))

    def _edged(self, edge: str, text: str) -> str:
        """Return the guarded text between two marks, if its ends matter."""
        return f"{edge}{self._guard(text)}{edge}" if self._may_join(text) else self._guard(text)

    def _may_join(self, text: str) -> bool:
        """Return whether what stands next to the text may make a control token together with it, or with its ends."""
        text = text.strip()
        if text and text in self._insides:
            return True
        longest = max(map(len, self._beginnings), default=0)
        ends = (text[-n:] for n in range(1, longest + 1))
        beginnings = (text[:n] for n in range(1, longest + 1))
        return any(end in self._beginnings for end in ends) or any(begin in self._ends for begin in beginnings)

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


_NO_FORMS = ChatForms(system=True, begins_with_assistant=True, without_user=True)
"""For a chat that is told in two texts."""


def _writer(tokenizer: PreTrainedTokenizerBase, name: str, today: date, thinking: bool) -> Write | None:
    """Return a function that writes messages and tools as the template does; None if there is no template."""
    if tokenizer.chat_template is None:
        return None

    def write(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        offered = list(tools) or None
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=offered,
            chat_template=_on_that_day(tokenizer.get_chat_template(tools=offered), today, name),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        return text

    return write


def _renderer(tokenizer: PreTrainedTokenizerBase, name: str, write: Write | None) -> Callable[[str, str], str]:
    """Return a function (system, user) -> the chat as text, ending in the generation prompt."""
    if write is None:
        logger.warning("model %s has no chat template; prompts are written as %r", name, PLAIN_TEMPLATE)
        # A chat template writes the token that texts begin with by itself; here we have to, for models that expect one.
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        begin = tokenizer.bos_token if begins else ""
        return lambda system, user: begin + PLAIN_TEMPLATE.format(system=system, user=user)

    def apart(system: str, user: str) -> str:
        return write([{"role": "system", "content": system}, {"role": "user", "content": user}], ())

    def together(system: str, user: str) -> str:
        return write([{"role": "user", "content": f"{system}\n\n{user}"}], ())

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
