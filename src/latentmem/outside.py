"""Text from outside, at the door: what comes in is text that can be written down, and shown on one line."""


def well_formed(text: str) -> str:
    r"""The text with halves of surrogate pairs joined, or replaced by U+FFFD where one stands alone.

    JSON can smuggle such halves into a string; no tokenizer takes them, and no file in UTF-8 can hold them.

    >>> well_formed("a\ud800b")
    'a\ufffdb'
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def one_line(text: str, max_characters: int = 200) -> str:
    r"""The beginning of a text in one line, with what a terminal would obey or cannot show as escapes.

    >>> one_line("bad\n \x1b[2Jluck")
    'bad \\x1b[2Jluck'
    """
    cut = " ".join(text[: 2 * max_characters].split())[:max_characters]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)
