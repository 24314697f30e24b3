"""Sampled tokens become text as they come: no half characters, nothing of a stop text, no blanks at either end.

What is read bit by bit is the same text in the end as what is read at once.
"""

from collections.abc import Callable, Sequence

from latentmem.serving.asks import Choice, Spoken, ToolCall
from latentmem.serving.tools import Piece, ToolReader

TextOf = Callable[[Sequence[int]], str]
_WINDOW = 12
"""Tokens that are decoded again with new ones, since a token's text may depend on those before it."""
_HALF = "\ufffd"
"""Stands for the bytes of a character that is not complete yet."""


class Detokenizer:
    """The text of tokens that come one after another."""

    def __init__(self, text_of: TextOf) -> None:
        self._text_of = text_of
        self._ids: list[int] = []
        """The last tokens; older ones say nothing about the text of new ones."""
        self._said = 0
        """How many characters of their text were given out."""

    def feed(self, ids: Sequence[int]) -> str:
        """Return the text that these tokens add, up to the last whole character."""
        self._ids += ids
        text = self._text_of(self._ids)
        whole = len(text.rstrip(_HALF))
        if whole <= self._said:
            return ""
        new, self._said = text[self._said : whole], whole
        if whole == len(text) and len(self._ids) > 2 * _WINDOW:
            self._forget(text)
        return new

    def close(self) -> str:
        """Return the rest."""
        return self._text_of(self._ids)[self._said :]

    def _forget(self, text: str) -> None:
        """Drop tokens that the last ones do not need: without them, their text is still the end of the text so far."""
        for keep in range(_WINDOW, len(self._ids)):
            part = self._text_of(self._ids[-keep:])
            if part and text.endswith(part) and not part.startswith(_HALF):
                self._ids, self._said = self._ids[-keep:], len(part)
                return


class StopFilter:
    """Lets text through up to the first stop text, and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop text was met; nothing is let through any more."""

    def feed(self, text: str) -> str:
        """Return what of the text so far is certain to stand before any stop text."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:  # the one that was whole first ended the response
            self.stopped = True
            passed, self._held = self._held[: min(found)[1]], ""
            return passed
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        passed, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return passed

    def close(self) -> str:
        """Return the rest."""
        held, self._held = self._held, ""
        return held


class BlankFilter:
    """Leaves out the blanks before and after a text."""

    def __init__(self) -> None:
        self._begun = False
        self._blanks = ""

    def feed(self, text: str) -> str:
        """Return the text without blanks that may be its end."""
        text = self._blanks + text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        said = text.rstrip()
        self._blanks = text[len(said) :]
        return said


class Reading:
    """One response, as it is sampled."""

    def __init__(self, text_of: TextOf, stop: Sequence[str], tools: ToolReader, begun: str = "") -> None:
        """Begin.

        Args:
            text_of: writes tokens as text.
            stop: texts that end the response.
            tools: reads calls of tools.
            begun: what the response was made to begin with; the model only went on from there.
        """
        self._begun = begun
        self._tokens = Detokenizer(text_of)
        self._stop = StopFilter(stop)
        self._tools = tools
        self._blanks = BlankFilter()
        self._num_fed = 0
        self._pieces: list[Piece] = []

    def feed(self, ids: Sequence[int]) -> list[Piece]:
        """Take new tokens; return what they say."""
        self._num_fed += len(ids)
        return self._kept(self._tools.feed(self._before() + self._stop.feed(self._tokens.feed(ids))))

    def _before(self) -> str:
        begun, self._begun = self._begun, ""
        return begun

    def close(self, spoken: Spoken) -> tuple[list[Piece], Choice]:
        """Take the finished response; return what was not said yet, and the whole."""
        message = spoken.message
        if message.token_ids or self._num_fed:  # a server of another model may tell bytes, and no tokens in the end
            rest = self._tokens.feed(message.token_ids[self._num_fed :]) + self._tokens.close()
        else:
            rest = message.response
        text = self._before() + self._stop.feed(rest)
        text += self._stop.close()
        pieces: list[Piece] = [text] if spoken.tool_calls is not None else [*self._tools.feed(text)]
        pieces += spoken.tool_calls if spoken.tool_calls is not None else self._tools.close()
        said = self._kept(pieces)
        calls = tuple(piece for piece in self._pieces if isinstance(piece, ToolCall))
        content = "".join(piece for piece in self._pieces if isinstance(piece, str))
        finish = "tool_calls" if calls else "length" if message.finish == "length" else "stop"
        return said, Choice(content=content, tool_calls=calls, finish=finish, message=message, counted=spoken.counted)

    def _kept(self, pieces: Sequence[Piece]) -> list[Piece]:
        kept = [self._blanks.feed(piece) if isinstance(piece, str) else piece for piece in pieces]
        said = [piece for piece in kept if piece != ""]
        self._pieces += said
        return said


def token_texts(text_of: TextOf, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; the parts of a character stand with the token that completes it."""
    reader = Detokenizer(text_of)
    texts = [reader.feed([each]) for each in ids]
    if texts:
        texts[-1] += reader.close()
    return texts


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
