"""PDDL text: read into nested lists, and mended only where a strict reader would refuse it."""

from latentmem.environments.pddl_text import _typed, mended, parse

DOMAIN = """
; a comment with a ( in it
(define (domain Carts)
  (:types cart crate - thing thing place - object)
  (:predicates (inside ?x - place ?y - thing) (near ?x - thing ?y - place) (idle ?x - cart))
  (:constants Yard - place)
  (:action stow
    :parameters (?t - crate ?p - place?c - cart)
    :precondition (and (near ?t ?p) (idle ?c))
    :effect (and (inside ?t ?p) (not (near ?t ?p)))))
"""
PROBLEM = """(define (problem P) (:domain carts)
  (:objects yard - place c1 c2 - cart k - crate)
  (:init (near k yard) (idle c1)) (:goal (inside k yard)))"""


def words(text):
    return parse(text, "text")


def test_comments_go_case_is_lowered_and_a_variable_begins_a_new_word():
    assert words("(A (b ?X?Y) ; (c\n d-e)") == ["a", ["b", "?x", "?y"], "d-e"]


def test_sections_are_ordered_requirements_added_and_constants_not_declared_again():
    domain, problem = mended(DOMAIN, PROBLEM, domain_file="d", problem_file="p")
    assert [section[0] for section in words(domain)[2:]] == [
        ":requirements", ":types", ":constants", ":predicates", ":action",
    ]  # fmt: skip
    assert words(domain)[2] == [":requirements", ":strips", ":typing"]
    assert words(problem)[3] == [":objects", "c1", "-", "cart", "c2", "-", "cart", "k", "-", "crate"]


def test_only_predicate_types_that_every_use_contradicts_are_replaced_by_those_used():
    domain, _ = mended(DOMAIN, PROBLEM, domain_file="d", problem_file="p")
    inside, near, idle = words(domain)[5][1:]
    assert inside == ["inside", "?x", "-", "crate", "?y", "-", "place"]
    assert near == ["near", "?x", "-", "thing", "?y", "-", "place"]  # a crate is a thing: as it was
    assert idle == ["idle", "?x", "-", "cart"]


def test_a_text_that_needs_no_mending_keeps_every_section():
    domain, problem = mended(DOMAIN, PROBLEM, domain_file="d", problem_file="p")
    assert mended(domain, problem, domain_file="d", problem_file="p") == (domain, problem)


def test_agentboards_tyreworld_is_mended_to_what_was_repaired_by_hand(shared_dir):
    folder = shared_dir / "data" / "pddl"
    original = [(folder / name).read_text() for name in ("tyreworld.pddl", "tyreworld/p03.pddl")]
    by_hand = [(folder / "strict" / name).read_text() for name in ("tyreworld.pddl", "tyreworld/p03.pddl")]
    domain, problem = (words(t) for t in mended(*original, domain_file="d", problem_file="p"))
    strict_domain, strict_problem = map(words, by_hand)
    assert [s for s in problem if s[0] != ":objects"] == [s for s in strict_problem if s[0] != ":objects"]
    assert {*dict(_typed(problem[3][1:]))} == {*dict(_typed(strict_problem[3][1:]))}  # the tools are not among them
    for section in strict_domain[2:]:
        if section[0] != ":predicates":
            assert section in domain
    predicates = {section[0]: section for section in domain[2:]}[":predicates"]
    (within,) = [p for p in predicates[1:] if p[0] == "in"]
    assert within == ["in", "?x", "-", "obj", "?y", "-", "container"]
