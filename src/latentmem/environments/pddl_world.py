"""One PDDL problem that can be stepped: unified-planning reads it and judges every action.

States are values, sets of facts, so they can be compared and kept. Only simple problems are accepted, whose goal and
preconditions are conjunctions of facts: progress is counted in facts, and reasons are told in facts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from threading import RLock
from typing import Any

from latentmem.environments.pddl_text import mended
from latentmem.errors import ConfigError, DataError

Fact = tuple[str, ...]
"""A predicate followed by its objects."""

_LIBRARY = RLock()
"""Held while unified-planning works, because its expressions live in one global table that is not thread-safe."""


@dataclass(frozen=True)
class State:
    """The facts that hold; states with the same facts are equal."""

    facts: frozenset[Fact]
    handle: Any = field(compare=False, repr=False)
    """The library's own state."""


@dataclass(frozen=True)
class Action:
    """An action with an object for each parameter."""

    name: str
    objects: tuple[str, ...]


def check_library() -> None:
    """Refuse to go on without unified-planning.

    Raises:
        ConfigError: it is missing; the message says what to install.
    """
    if find_spec("unified_planning") is None:
        raise ConfigError("data.kind pddl needs the package unified-planning; pip install 'latentmem[pddl]'")


class World:
    """One problem; the episodes played on it may share it, even in several threads.

    Args:
        domain: PDDL text of the domain.
        problem: PDDL text of the problem.
        domain_file: name of the domain's file, for errors.
        problem_file: name of the problem's file, for errors.

    Raises:
        DataError: unified-planning cannot read the texts, or goal or preconditions are more than conjunctions of facts.
    """

    def __init__(self, domain: str, problem: str, *, domain_file: str, problem_file: str) -> None:
        from unified_planning.engines import UPSequentialSimulator

        texts = mended(domain, problem, domain_file=domain_file, problem_file=problem_file)
        with _LIBRARY:
            self._problem = _read(*texts, domain_file, problem_file)
            try:
                self._simulator = UPSequentialSimulator(self._problem)
                self.initial = self._state(self._simulator.get_initial_state())
            except Exception as error:  # the library raises exceptions of many kinds for what it cannot step
                raise _unreadable(problem_file, error) from None
            actions = {action.name: action for action in self._problem.actions}
            self._needs = {
                name: (
                    [p.name for p in action.parameters],
                    _facts(action.preconditions, f"{domain_file}: action {name}"),
                )
                for name, action in actions.items()
            }
            self.goal: tuple[Fact, ...] = tuple(dict.fromkeys(_facts(self._problem.goals, f"{problem_file}: the goal")))
            """The facts to bring about, each once."""
            self.parameters: dict[str, tuple[tuple[str, ...], ...]] = {
                name: tuple(tuple(o.name for o in self._problem.objects(p.type)) for p in action.parameters)
                for name, action in actions.items()
            }
            """For each action, the objects that fit each of its parameters."""
            self.static: frozenset[str] = frozenset(fluent.name for fluent in self._problem.get_static_fluents())
            """Predicates that no action changes."""
        self.objects: tuple[str, ...] = tuple(o.name for o in self._problem.all_objects)
        self.predicates: dict[str, int] = {fluent.name: fluent.arity for fluent in self._problem.fluents}
        """Number of objects of each predicate."""
        if not self.goal:
            raise DataError(f"{problem_file}: the goal is empty; expected at least one fact")

    def applicable(self, state: State) -> list[Action]:
        """Return all actions that can be done now.

        Only instances whose needs are all met are passed to the library. Its own search first grounds every action with
        all objects, which takes seconds for barman's six parameters.
        """
        facts: dict[str, list[Fact]] = {}
        for fact in sorted(state.facts):
            facts.setdefault(fact[0], []).append(fact)
        found: list[Action] = []
        for name, (parameters, needed) in self._needs.items():
            bindings: list[dict[str, str]] = [{}]
            for predicate, *terms in needed:
                joined = (_bound(b, terms, fact[1:]) for b in bindings for fact in facts.get(predicate, []))
                bindings = [binding for binding in joined if binding is not None]
            for binding in bindings:
                found += self.instances(name, [binding.get(f"?{parameter}") for parameter in parameters])
        with _LIBRARY:
            return [
                action for action in dict.fromkeys(found) if self._simulator.is_applicable(*self._query(state, action))
            ]

    def apply(self, state: State, action: Action) -> State | None:
        """Return the state that the action leads to, or None if the action cannot be done now."""
        with _LIBRARY:
            query = self._query(state, action)
            return self._state(self._simulator.apply(*query)) if self._simulator.is_applicable(*query) else None

    def unmet(self, state: State, action: Action) -> list[Fact]:
        """Return the facts that the action needs and that do not hold."""
        parameters, needed = self._needs[action.name]
        objects = dict(zip((f"?{name}" for name in parameters), action.objects, strict=True))
        facts = [(predicate, *(objects.get(term, term) for term in terms)) for predicate, *terms in needed]
        return [fact for fact in facts if fact not in state.facts]

    def instances(self, name: str, objects: Iterable[str | None]) -> list[Action]:
        """Return the actions of that name with these objects; None stands for every object that fits there."""
        choices = [
            fitting if wanted is None else tuple(o for o in fitting if o == wanted)
            for fitting, wanted in zip(self.parameters[name], objects, strict=True)
        ]
        return [Action(name, chosen) for chosen in product(*choices)]

    def _query(self, state: State, action: Action) -> tuple[Any, Any, list[Any]]:
        """Return state, action and parameters as the library takes them."""
        return state.handle, self._problem.action(action.name), [self._problem.object(name) for name in action.objects]

    def _state(self, handle: Any) -> State:
        true = (atom for atom in self._problem.initial_values if handle.get_value(atom).is_true())
        return State(frozenset((a.fluent().name, *(o.object().name for o in a.args)) for a in true), handle)


@lru_cache(maxsize=64)
def open_world(domain: str, problem: str, domain_file: str, problem_file: str) -> World:
    """Return the world of these texts; recent ones are shared, because reading a world takes longer than playing it."""
    return World(domain, problem, domain_file=domain_file, problem_file=problem_file)


def _read(domain: str, problem: str, domain_file: str, problem_file: str) -> Any:
    from unified_planning.io import PDDLReader

    try:
        return PDDLReader().parse_problem_string(domain, problem)
    except Exception as error:  # the reader raises whatever its parts do, from AssertionError to KeyError
        failed = error
    try:
        PDDLReader().parse_problem_string(domain)
    except Exception as error:
        raise _unreadable(domain_file, error) from None
    raise _unreadable(problem_file, failed)


def _bound(binding: dict[str, str], terms: Sequence[str], objects: Sequence[str]) -> dict[str, str] | None:
    """Bind the parameters among the terms to the objects; return None if the binding or a term contradicts them."""
    bound = dict(binding)
    for term, name in zip(terms, objects, strict=True):
        if (bound.setdefault(term, name) if term.startswith("?") else term) != name:
            return None
    return bound


def _unreadable(where: str, error: Exception) -> DataError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return DataError(f"{where}: not PDDL that unified-planning can step ({reason[:300]}); mend the file")


def _facts(conditions: Iterable[Any], where: str) -> list[Fact]:
    """Return the facts of a conjunction; parameters are written with a question mark."""
    found: list[Fact] = []
    for condition in conditions:
        if condition.is_and():
            found += _facts(condition.args, where)
        elif condition.is_fluent_exp() and all(a.is_parameter_exp() or a.is_object_exp() for a in condition.args):
            terms = (f"?{a.parameter().name}" if a.is_parameter_exp() else a.object().name for a in condition.args)
            found.append((condition.fluent().name, *terms))
        elif not condition.is_true():
            raise DataError(f"{where} asks for {condition}; expected facts joined by and, without not, or, forall")
    return found
