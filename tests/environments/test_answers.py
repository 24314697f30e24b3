"""Reading the answer out of responses as small models write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmem.environments.answers import bare, boxed, last_line, last_number, stated, tagged
from latentmem.environments.reasoning import extract


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("The answer to this arithmetic problem is 10.", "10"),
        ("12 + 7 = 19", "19"),
        ("12 + 7 = 19.", "19"),
        ("<answer>12 + 7 = 19</answer>", "19"),
        ("<answer>3</answer> no, <answer>4</answer>", "4"),
        ("<ANSWER> 4 </ANSWER> of 9", "4"),
        (r"Thus \boxed{\text{about } 42}, not 43", "42"),
        ("Answer: 5\nI used 3 steps", "5"),
        ("**Answer:** 5\nI used 3 steps", "5"),
        ("The answer is 5. I used 3 steps", "5"),
        ("The final answer is: -1,234.50.", "-1234.50"),
        ("the answer is the sum of both. 12 + 7 = 19", "19"),
        ("it costs $1,234", "1234"),
        ("it is \u22127", "-7"),
        ("10-3=7", "7"),
        ("10-3", "3"),
        ("x = 10.0", "10"),
        ("0.50", "0.50"),
        (".5", "0.5"),
        ("007", "7"),
        ("1.76e-22", "1.76e-22"),
        ("<answer>10", "10"),
        ("<answer>ten</answer> 10", None),
        ("no digits", None),
        ("", None),
    ],
)
def test_numeric_answers_are_read_from_rambling_responses(response, number):
    assert extract(response, numeric=True) == number


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("Let me think.\nleft\n", "left"),
        ("Let me think.\n**left**.\n\n", "left"),
        ('The answer is "left".', "left"),
        ("Answer:\nleft", "left"),
        ("<answer>\n1 2\n3 4\n</answer>\nDone.", "1 2\n3 4"),
        ("<answer>Zoey is an angel.</answer>", "Zoey is an angel."),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("<answer></answer>left", None),
        ("  \n ", None),
    ],
)
def test_text_answers_are_read_from_rambling_responses(response, text):
    assert extract(response, numeric=False) == text


def test_listing_candidates_yields_the_last_one_only():
    assert extract("<answer>" + " ".join(map(str, range(100))) + "</answer>", numeric=True) == "99"
    assert extract("The answer is 1, 2, 3 or 4.", numeric=True) == "4"


def test_unclosed_or_nested_marks_do_not_swallow_the_answer():
    assert tagged("use <answer> tags: <answer>4</answer>") == "4"
    assert tagged("<answer>4") is None
    assert boxed(r"\boxed{4} and \boxed{5") == "4"
    assert stated("The answer is 4 <answer>") == ["4"]


def test_bare_takes_off_decoration_but_not_the_answer():
    assert bare(" **`'Rock & roll'`**. ") == "Rock & roll"
    assert bare("wait...") == "wait..."
    assert last_line("</answer>") is None


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "${:,}", "it is {:,}.", "so **{}**", "= {}.0"]))
def test_every_integer_is_read_back_in_every_dress(value, dress):
    text = dress.format(value)
    if value < 0 and text.startswith("$"):
        text = "-$" + text[2:]
    assert last_number(text) == str(value)


@given(st.text(alphabet="<answer>/ is:.=\n{}\\boxd0123456789,-$e", max_size=80))
def test_no_text_makes_the_reader_fail(text):
    for numeric in (True, False):
        assert extract(text, numeric=numeric) != ""
