"""Where a response ends: at an end token, at its limit, at a text that the caller named, or when nobody waits for it.

Stop texts are looked for in what the tokens say, so a stop text may begin and end inside tokens. Only the end of the
response is written out for each new token; the whole response decides.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Literal

Finish = Literal["stop", "length", "cut"]
_MARGIN = 8
"""Characters by which the end that is written out is longer than a stop text: the first ones may be written otherwise
than in the middle of a text."""


class Ending:
    """The tokens of one response, and what ended them."""

    def __init__(
        self,
        limit: int,
        eos_ids: Collection[int],
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        on_tokens: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        """Begin a response.

        Args:
            limit: number of tokens at which it ends.
            eos_ids: tokens that end it.
            decode: writes tokens as text.
            stop: texts that end it; an empty one is never found.
            on_tokens: gets each token; False ends the response.
        """
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        """What ended the response. One that nobody waited for ends as if at its limit."""
        self._limit = limit
        self._eos_ids = eos_ids
        self._decode = decode
        self._stop = tuple(filter(None, stop))
        self._longest = max(map(len, self._stop), default=0)
        self._on_tokens = on_tokens
        self._cut: str | None = None
        self._looked_at = [0, 0]
        """Where two pieces of the response begin that reach to its end; any stop text still to come fits the longer."""

    @property
    def text(self) -> str:
        """The text of the tokens, up to where a stop text begins."""
        return self._decode(self.tokens) if self._cut is None else self._cut

    def add(self, token: int) -> bool:
        """Take the next token, and return whether it is the last."""
        self.tokens.append(token)
        if token in self._eos_ids:
            self.finish = "stop"
        elif self._stop and self._is_cut():
            self.finish = "cut"
        elif len(self.tokens) >= self._limit:
            self.finish = "length"
        if self._on_tokens is not None and not self._on_tokens((token,)) and self.finish is None:
            self.finish = "length"
        return self.finish is not None

    def _is_cut(self) -> bool:
        end = self._decode(self.tokens[self._looked_at[0] :])
        if any(stop in end for stop in self._stop):
            whole = self._decode(self.tokens)
            places = [(whole.find(stop), len(stop)) for stop in self._stop]
            ends = [(begin + length, begin) for begin, length in places if begin >= 0]
            if ends:
                self._cut = whole[: min(ends)[1]]
                return True
        if len(self._decode(self.tokens[self._looked_at[1] :])) >= self._longest + _MARGIN:
            self._looked_at = [self._looked_at[1], len(self.tokens)]
        return False
