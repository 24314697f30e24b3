"""Read the answer out of a response that may ramble: the most explicit mark wins, and only one answer counts.

A strict match of the whole response scores a small model 0, where reading its last number scores 28 %. But a reader
that accepted *any* right answer in a response would reward listing candidates, so each function here returns one.
"""

import re

_THOUGHT = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
_TAG_NAMES = re.compile(r"</?answer>", re.IGNORECASE)
_STATED = re.compile(r"\banswer(?:[\s*_]*[:=]|\b[^.:=\n<]{0,80}?\bis\b)[\s:*_]*", re.IGNORECASE)
_LINE_STATED = re.compile(
    r"^[\W_]*(?:(?P<final>final)\s+)?answer[\s*_]*[:=][\s*_]*(?P<rest>\S.*)$", re.IGNORECASE | re.MULTILINE
)
_THINKS = re.compile(r"let(?:'s|\u2019s| us| me)\b|(?:we|i) (?:need|know|can|have|must|first)\b|first,", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|<")
# What ends in a full stop and goes on: initials and abbreviations, unless what follows begins a sentence.
_SHORTENED = re.compile(
    r"(?:^|[\s(\"'])(?:(?:[A-Za-z]\.)*[A-Z]|(?:[A-Za-z]\.)+[A-Za-z]|St|Ste|Mr|Mrs|Ms|Dr|Jr|Sr|Prof|Rev|Gen|Col|Capt|Lt|Sgt|Gov|"
    r"Sen|Rep|Hon|Mt|Ft|No|Nos|vs|Vs|v|Co|Corp|Inc|Ltd|Bros|Vol|Op|feat|ft|Messrs|Mme|Mlle|Pt|Cmdr|Adm|Maj|Ph\.D|Bldg|Ave)$"
)
_BEGINS_SENTENCE = re.compile(
    r"\s+(?:It|Its|He|She|They|We|I(?!\.)|This|That|These|Those|The|There|In|On|At|As|So|But|And|Or|Because|Since|However|Also|"
    r"His|Her|Their|When|While|Although|Note|Explanation|Therefore|Thus|Hence|My|You|Yes|For|If|What|Which|Who)\b"
)
_NUMBER = re.compile(
    r"(?<![\w.)])(?P<sign>[-+\u2212]?)\$?"
    r"(?:(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<fraction>\.\d+)?|(?P<only_fraction>\.\d+))"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?"
)


def without_thoughts(response: str) -> str:
    """What follows the last `</think>`; the whole, without these tags, where nothing does.

    >>> without_thoughts("<think>Rome? No.</think> Paris"), without_thoughts("<think>Rome?")
    (' Paris', ' Rome?')
    """
    after = _THOUGHT_ENDS.split(response)[-1]
    return _THOUGHT.sub(" ", after if after.strip() else response)


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


def begun(response: str) -> str | None:
    """The line that an answer tag begins, where no pair of them is closed; None for an empty one.

    >>> begun("I am sure. <answer>Paris")
    'Paris'
    """
    tags = list(_TAG_NAMES.finditer(response))
    if not tags or tags[-1][0].startswith("</"):
        return None
    return response[tags[-1].end() :].strip().split("\n")[0].strip() or None


def first_sentence(text: str) -> str:
    """What stands before the first end of a line, tag or sentence; initials and abbreviations end none.

    >>> first_sentence("St. Louis. It lies on a river."), first_sentence("J. K. Rowling")
    ('St. Louis', 'J. K. Rowling')
    """
    for end in _SENTENCE_END.finditer(text):
        before, after = text[: end.start()], text[end.end() :]
        if end[0] == "." and after.strip() and _SHORTENED.search(before) and not _BEGINS_SENTENCE.match(after):
            continue
        return before
    return text


def stated(response: str) -> list[str]:
    r"""What follows each `answer is`, `answer ... is` or `Answer:`, to the end of its sentence; the last one first.

    A line that is `Answer: ...` or `Final Answer: ...` and no more comes before what running text says later.

    >>> stated("The answer to this problem is 10. No: the answer is 11.")
    ['11', '10']
    >>> stated("Final Answer: 11\nThe answer is well known.")
    ['11', 'well known', '11']
    """
    lines, found = [], []
    for match in _LINE_STATED.finditer(response):
        text = first_sentence(match["rest"])
        whole = not match["rest"][len(text) :].strip(" .!?*_`\"'\u201d")
        if bare(text) and (match["final"] or (whole and not _THINKS.match(text))):
            lines.append((match["final"] is not None, bare(text)))
    for match in _STATED.finditer(response):
        text = bare(first_sentence(response[match.end() :]))
        if text:
            found.append(text)
    ranked = [text for final, text in lines[::-1] if final] + [text for final, text in lines[::-1] if not final]
    return ranked + found[::-1]


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
    texts = (begun(response) or "", boxed(response) or "", *stated(response), response)
    numbers = (last_number(text) for text in texts)
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
