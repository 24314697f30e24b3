"""Read PDDL text as nested lists, mend what a strict reader would refuse, and write it out again.

AgentBoard's problems from pddlgym are read there by a lenient reader; a strict one refuses its tyreworld. Mending the
text when it is read allows the original files to be used unchanged. Mending changes neither the applicable actions nor
the states they lead to, only what a strict reader complains about; see `mended`.
"""

import re

from latentmem.errors import DataError

Expression = str | list["Expression"]

_TOKEN = re.compile(r"[()]|\?[^\s()?;]+|[^\s()?;]+|;[^\n]*")
_SECTIONS = (":requirements", ":types", ":constants", ":predicates")


def mended(domain: str, problem: str, *, domain_file: str, problem_file: str) -> tuple[str, str]:
    """Return domain and problem as a strict reader accepts them, in lower case and without comments.

    - The domain's sections are put into the order that the language asks for: requirements, types, constants,
      predicates, the rest. Requirements are added if none are stated.
    - If no action uses a predicate with its declared type, the type that the actions use replaces it.
    - Objects that the domain already declares as constants are dropped from the problem.

    Args:
        domain: text of the domain file.
        problem: text of the problem file.
        domain_file: name of the domain's file, for errors.
        problem_file: name of the problem's file, for errors.

    Raises:
        DataError: a text is not one parenthesised `(define (domain NAME) ...)` or `(define (problem NAME) ...)`.
    """
    head, sections = _definition(domain, "domain", domain_file)
    by_name = {section[0]: section for section in sections if section[0] in _SECTIONS}
    for name in by_name:
        if sum(section[0] == name for section in sections) > 1:
            raise DataError(f"{domain_file}: {name} stands twice; expected it once")
    typed = [":typing"] if ":types" in by_name else []
    by_name.setdefault(":requirements", [":requirements", ":strips", *typed])
    others = [section for section in sections if section[0] not in _SECTIONS]
    if ":predicates" in by_name:
        _retype(by_name[":predicates"], _supertypes(by_name.get(":types", [])), others)
    constants = {name for name, _ in _typed(by_name.get(":constants", [])[1:])}

    problem_head, problem_sections = _definition(problem, "problem", problem_file)
    for section in problem_sections:
        if section[0] == ":objects":
            kept = [(name, kind) for name, kind in _typed(section[1:]) if name not in constants]
            section[1:] = _untyped(kept)
    ordered = [by_name[name] for name in _SECTIONS if name in by_name]
    return _written([*head, *ordered, *others]), _written([*problem_head, *problem_sections])


def parse(text: str, where: str) -> list[Expression]:
    """Parse the one expression of a text into nested lists of lower-case words.

    Raises:
        DataError: the text is not one expression; the message names the file and, for a lone parenthesis, its line.
    """
    open_lists: list[list[Expression]] = [[]]
    lines: list[int] = []
    line, end = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", end, match.start())
        end, token = match.start(), match.group()
        if token.startswith(";"):
            continue
        if token == "(":  # noqa: S105 - a parenthesis
            lines.append(line)
            open_lists.append([])
        elif token != ")":  # noqa: S105
            open_lists[-1].append(token.lower())
        elif not lines:
            raise DataError(f"{where}:{line}: a ) that closes nothing; expected one PDDL definition")
        else:
            lines.pop()
            closed = open_lists.pop()
            open_lists[-1].append(closed)
    if lines:
        raise DataError(f"{where}:{lines[-1]}: the ( of this line is never closed; expected one PDDL definition")
    (found, *more) = open_lists[0] or [""]
    if more or not isinstance(found, list):
        raise DataError(f"{where}: expected one PDDL definition, (define ...), and nothing else")
    return found


def _definition(text: str, kind: str, where: str) -> tuple[list[Expression], list[list[Expression]]]:
    """Return the `define (KIND NAME)` and the sections that follow it."""
    match parse(text, where):
        case ["define", [found_kind, str()] as named, *sections] if found_kind == kind:
            whole = [section for section in sections if isinstance(section, list) and section]
            if len(whole) == len(sections) and all(isinstance(section[0], str) for section in whole):
                return ["define", named], whole
    raise DataError(f"{where}: expected (define ({kind} NAME) (:SECTION ...) ...), found something else")


def _typed(words: list[Expression]) -> list[tuple[str, Expression]]:
    """Turn `a b - t c` into (a, t), (b, t), (c, object)."""
    found: list[tuple[str, Expression]] = []
    waiting: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "-":
            kind = next(rest, "object")
            found += [(name, kind) for name in waiting]
            waiting = []
        elif isinstance(word, str):
            waiting.append(word)
    return found + [(name, "object") for name in waiting]


def _untyped(pairs: list[tuple[str, Expression]]) -> list[Expression]:
    return [word for name, kind in pairs for word in ([name] if kind == "object" else [name, "-", kind])]


def _supertypes(types: list[Expression]) -> dict[str, set[Expression]]:
    """Map each type to all types that it belongs to, including itself and `object`."""
    parent = dict(_typed(types[1:]))
    found: dict[str, set[Expression]] = {}
    for name in parent:
        chain: list[Expression] = [name]
        while (above := parent.get(str(chain[-1]))) is not None and above not in chain:
            chain.append(above)
        found[name] = {*chain, "object"}
    return found


def _retype(
    predicates: list[Expression], supertypes: dict[str, set[Expression]], actions: list[list[Expression]]
) -> None:
    """Mend, in place, declared types of predicates that every use in an action contradicts."""
    uses: dict[str, list[list[Expression]]] = {}
    for action in actions:
        fields = dict(zip(map(str, action[2::2]), action[3::2], strict=False))
        parameters = fields.get(":parameters")
        kinds = dict(_typed(parameters)) if isinstance(parameters, list) else {}
        for atom in [*_atoms(fields.get(":precondition", [])), *_atoms(fields.get(":effect", []))]:
            if all(argument in kinds for argument in atom[1:]):
                uses.setdefault(atom[0], []).append([kinds[argument] for argument in atom[1:]])
    for declared in predicates[1:]:
        if isinstance(declared, list) and declared and uses.get(str(declared[0])):
            typed = _typed(declared[1:])
            used = uses[str(declared[0])]
            for i, (name, kind) in enumerate(typed):
                seen = [use[i] for use in used if len(use) == len(typed)]
                if seen and not any(kind in supertypes.get(str(s), {s, "object"}) for s in seen):
                    typed[i] = (name, seen[0])
            declared[1:] = _untyped(typed)


def _atoms(condition: Expression) -> list[list[str]]:
    if not isinstance(condition, list) or not condition:
        return []
    words = [word for word in condition if isinstance(word, str)]
    if len(words) == len(condition) and words[0] not in ("and", "or", "not"):
        return [words]
    return [atom for part in condition if isinstance(part, list) for atom in _atoms(part)]


def _written(expression: Expression) -> str:
    if isinstance(expression, str):
        return expression
    return f"({' '.join(map(_written, expression))})"
