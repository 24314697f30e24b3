"""Templates: fields are checked when loaded, and filled in one pass."""

import pytest

from latentmem.errors import ConfigError
from latentmem.templates import check_template, fill


def test_a_field_written_inside_a_value_stays_as_it_is():
    assert fill("{task} | {role}", task="{role} {task}", role="{task}") == "{role} {task} | {task}"


def test_braces_that_are_no_field_stay():
    assert (
        fill('{task} {"a": 1} {} {{ }} \\frac{1}{2} {unknown}', task="t")
        == 't {"a": 1} {} {{ }} \\frac{1}{2} {unknown}'
    )


def test_a_value_may_hold_what_a_regular_expression_would_expand():
    assert fill("{task}", task=r"\1 \g<0> \n") == r"\1 \g<0> \n"


@pytest.mark.parametrize(
    ("template", "tail"),
    [
        ("{taks}", "unknown field {taks}; did you mean 'task'?"),
        ("{Task}", "unknown field {Task}; did you mean 'task'?"),
        ("{task} {zzz}", "unknown field {zzz}; known: role, task"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(template, tail):
    with pytest.raises(ConfigError) as error:
        check_template(template, ("task", "role"), "team x: user prompt of a")
    assert str(error.value) == f"team x: user prompt of a: {tail}"


def test_known_fields_and_other_braces_pass():
    check_template('{task} {role} {task} {"json": {}} {1}', ("task", "role"), "here")
