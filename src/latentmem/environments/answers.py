"""Read the answer out of a response that may ramble: the most explicit mark wins, and only one answer counts.

A strict match of the whole response scores a small model 0, where reading its last number scores 28 %. But a reader
that accepted *any* right answer in a response would reward listing candidates, so each function here returns one.
"""

import re

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
_TAG_NAMES = re.compile(r"</?answer>", re.IGNORECASE)
_STATED = re.compile(r"\banswer(?:[\s*_]*[:=]|\b[^.:=\n<]{0,80}?\bis\b)[\s:*_]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|<")
_NUMBER = re.compile(
    r"(?<![\w.)])(?P<sign>[-+\u2212]?)\$?"
    r"(?:(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<fraction>\.\d+)?|(?P<only_fraction>\.\d+))"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?"
)


def tagged(response: str) -> str | None:
    """Return the text in the last closed pair of answer tags, without surrounding blanks.

    >>> tagged("<answer>3</answer> or rather <answer> 4 </answer>")
    '4'
    """
    found = _TAG.findall(response)
    return found[-1].strip() if found else None


def untagged(response: str) -> str:
    """Return the response with a blank in place of each answer tag."""
    return _TAG_NAMES.sub(" ", response)


def boxed(response: str) -> str | None:
    r"""Return the content of the last closed \boxed{...}, inner braces included.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = response.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + 6, len(response)):
            depth += {"{": 1, "}": -1}.get(response[end], 0)
            if depth == 0:
                return response[start + 7 : end].strip()
        start = response.rfind("\\boxed{", 0, start)
    return None


def stated(response: str) -> list[str]:
    """Return what follows each `answer is`, `answer ... is` or `Answer:` in its sentence, the last one first.

    >>> stated("The answer to this problem is 10. No: the answer is 11.")
    ['11', '10']
    """
    found = []
    for match in _STATED.finditer(response):
        rest = response[match.end() :]
        end = _SENTENCE_END.search(rest)
        text = bare(rest[: end.start()] if end else rest)
        if text:
            found.append(text)
    return found[::-1]


def last_number(text: str) -> str | None:
    """Return the last number, written plainly: no thousands commas, dollar sign, plus, leading zeros or `.0`.

    >>> last_number("12 + 7 = 19."), last_number("It costs $1,234.50"), last_number("none")
    ('19', '1234.50', None)
    """
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    whole = (match["whole"] or "0").replace(",", "").lstrip("0") or "0"
    fraction = match["fraction"] or match["only_fraction"] or ""
    if not fraction.strip(".0"):
        fraction = ""
    number = whole + fraction + (match["exponent"] or "").lower()
    return f"-{number}" if match["sign"] in ("-", "\u2212") and number != "0" else number


def stated_number(response: str) -> str | None:
    r"""Return the last number in the most explicit mark: tags, `\boxed{...}`, `answer is`, else the whole response.

    Marks without a number are skipped, except tags: if there are tags without a number, the result is None.

    >>> stated_number("12 + 7 = 19, so the answer is 19. I checked it 2 times."), stated_number("<answer>x</answer> 3")
    ('19', None)
    """
    tag = tagged(response)
    if tag is not None:
        return last_number(tag)
    numbers = (last_number(text) for text in (boxed(response) or "", *stated(response), response))
    return next((number for number in numbers if number is not None), None)


def last_line(response: str) -> str | None:
    r"""Return the last line with content, without decoration.

    >>> last_line("Let me see.\n**left**\n")
    'left'
    """
    lines = [bare(line) for line in untagged(response).splitlines()]
    return next((line for line in reversed(lines) if line), None)


def bare(text: str) -> str:
    """Strip surrounding blanks, emphasis, backticks, paired quotes and the closing full stop.

    >>> bare(' **"Paris".** ')
    'Paris'
    """
    before = None
    while text != before:
        before = text
        text = text.strip().strip("*`").strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        if len(text) > 1 and (text[0], text[-1]) in {
            ('"', '"'),
            ("'", "'"),
            ("\u201c", "\u201d"),
            ("\u2018", "\u2019"),
        }:
            text = text[1:-1]
    return text
