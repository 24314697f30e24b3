"""Draw our own problems for the four worlds from a random generator, each with a plan that solves it.

So the benchmark can be played and trained on without a download. A problem is built around its plan, so it is solvable.
The plan takes at most 30 actions, the number of turns that AgentBoard allows; it need not be the shortest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal

from latentmem.environments.pddl_world import Action, Fact

Size = Literal["small", "medium"]


@dataclass(frozen=True)
class Problem:
    """A problem in our own definition of its world."""

    objects: dict[str, str]
    """Types of the objects, by name; the type is `object` in a world without types."""
    initial: tuple[Fact, ...]
    goal: tuple[Fact, ...]
    plan: tuple[Action, ...]
    """Actions that reach the goal."""

    def pddl(self, name: str, domain: str) -> str:
        """Return the problem as PDDL text."""
        objects = " ".join(n if kind == "object" else f"{n} - {kind}" for n, kind in self.objects.items())
        return (
            f"(define (problem {name}) (:domain {domain})\n  (:objects {objects})\n"
            f"  (:init {' '.join(map(_atom, self.initial))})\n  (:goal (and {' '.join(map(_atom, self.goal))})))\n"
        )


def generate(world: str, size: Size, random: Random) -> Problem:
    """Draw a problem whose goal does not hold at the start."""
    while True:
        problem = _GENERATORS[world](random, size)
        if not set(problem.goal) <= set(problem.initial):
            return problem


def _gripper(random: Random, size: Size) -> Problem:
    """Small: 2 rooms, 2 to 4 balls. Medium: 3 rooms, 4 to 6 balls. The goal puts some balls into certain rooms."""
    rooms = ["rooma", "roomb"] if size == "small" else ["rooma", "roomb", "roomc"]
    balls = [f"ball{i + 1}" for i in range(random.randint(2, 4) if size == "small" else random.randint(4, 6))]
    hands = ["left", "right"]
    place = {ball: random.choice(rooms) for ball in balls}
    robot = random.choice(rooms)
    wanted = {ball: random.choice(rooms) for ball in sorted(random.sample(balls, random.randint(2, len(balls))))}
    initial = [*_all("room", rooms), *_all("ball", balls), *_all("gripper", hands), *_all("free", hands)]
    initial += [("at-robby", robot), *(("at", ball, room) for ball, room in place.items())]

    plan: list[Action] = []
    waiting = [ball for ball, room in wanted.items() if place[ball] != room]
    while waiting:
        way = (place[waiting[0]], wanted[waiting[0]])
        load = [ball for ball in waiting if (place[ball], wanted[ball]) == way][:2]
        if robot != way[0]:
            plan.append(Action("move", (robot, way[0])))
        plan += [Action("pick", (ball, way[0], hand)) for ball, hand in zip(load, hands, strict=False)]
        plan.append(Action("move", way))
        plan += [Action("drop", (ball, way[1], hand)) for ball, hand in zip(load, hands, strict=False)]
        robot, waiting = way[1], [ball for ball in waiting if ball not in load]
    goal = tuple(("at", ball, room) for ball, room in wanted.items())
    return Problem(dict.fromkeys([*rooms, *balls, *hands], "object"), tuple(initial), goal, tuple(plan))


def _blockworld(random: Random, size: Size) -> Problem:
    """Small: 3 or 4 blocks. Medium: 5 or 6. The goal tells which block stands on which."""
    blocks = [f"b{i + 1}" for i in range(random.randint(3, 4) if size == "small" else random.randint(5, 6))]
    towers, wanted = _towers(random, blocks), _towers(random, blocks)
    initial: list[Fact] = [("arm-empty",)]
    plan: list[Action] = []
    for tower in towers:  # from the table up
        initial += [("on-table", tower[0]), ("clear", tower[-1])]
        initial += [("on", upper, lower) for lower, upper in pairwise(tower)]
        for lower, upper in zip(tower[-2::-1], tower[:0:-1], strict=True):
            plan += [Action("unstack", (upper, lower)), Action("putdown", (upper,))]
    goal: list[Fact] = []
    for tower in wanted:
        for lower, upper in pairwise(tower):
            plan += [Action("pickup", (upper,)), Action("stack", (upper, lower))]
            goal.append(("on", upper, lower))
    return Problem(dict.fromkeys(blocks, "object"), tuple(initial), tuple(goal), tuple(plan))


def _towers(random: Random, blocks: list[str]) -> list[list[str]]:
    towers: list[list[str]] = []
    for block in random.sample(blocks, len(blocks)):
        i = random.randint(0, len(towers))
        if i == len(towers):
            towers.append([block])
        else:
            towers[i].append(block)
    return towers


def _barman(random: Random, size: Size) -> Problem:
    """Small: 1 goal, or 2 of ingredients only. Medium: 2 or 3 goals, 1 or 2 of them cocktails."""
    small = size == "small"
    ingredients = [f"ingredient{i + 1}" for i in range(random.randint(2, 3) if small else random.randint(3, 4))]
    cocktails = [f"cocktail{i + 1}" for i in range(random.randint(1, 2) if small else random.randint(2, 3))]
    shots = [f"shot{i + 1}" for i in range(random.randint(2, 3) if small else random.randint(3, 4))]
    levels, hands, shaker = ["l0", "l1", "l2"], ["left", "right"], "shaker1"
    parts = {cocktail: random.sample(ingredients, 2) for cocktail in cocktails}
    tap = {ingredient: f"dispenser{i + 1}" for i, ingredient in enumerate(ingredients)}
    num_cocktails = random.randint(0, 1) if small else random.randint(1, 2)
    num_ingredients = (0 if num_cocktails else random.randint(1, 2)) if small else random.randint(2 - num_cocktails, 1)
    filled = random.sample(shots, num_cocktails + num_ingredients)
    mixes = [(shot, random.choice(cocktails)) for shot in filled[:num_cocktails]]
    plain = [(shot, random.choice(ingredients)) for shot in filled[num_cocktails:]]

    initial = [*_all("handempty", hands), *_all("ontable", [shaker, *shots]), *_all("empty", [shaker, *shots])]
    initial += [*_all("clean", [shaker, *shots]), ("shaker-empty-level", shaker, "l0"), ("shaker-level", shaker, "l0")]
    initial += [("next", "l0", "l1"), ("next", "l1", "l2")]
    initial += [("dispenses", dispenser, ingredient) for ingredient, dispenser in tap.items()]
    for cocktail, (first, second) in parts.items():
        initial += [("cocktail-part1", cocktail, first), ("cocktail-part2", cocktail, second)]

    plan: list[Action] = []
    for i, (shot, cocktail) in enumerate(mixes):
        first, second = parts[cocktail]
        if i:
            plan += [Action("empty-shaker", ("left", shaker, mixes[i - 1][1], "l1", "l0"))]
            plan += [Action("clean-shaker", ("left", "right", shaker)), Action("leave", ("left", shaker))]
        plan += [
            Action("grasp", ("left", shot)),
            Action("fill-shot", (shot, first, "left", "right", tap[first])),
            Action("pour-shot-to-clean-shaker", (shot, first, shaker, "left", "l0", "l1")),
            Action("clean-shot", (shot, first, "left", "right")),
            Action("fill-shot", (shot, second, "left", "right", tap[second])),
            Action("pour-shot-to-used-shaker", (shot, second, shaker, "left", "l1", "l2")),
            Action("clean-shot", (shot, second, "left", "right")),
            Action("leave", ("left", shot)),
            Action("grasp", ("left", shaker)),
            Action("shake", (cocktail, first, second, shaker, "left", "right")),
            Action("pour-shaker-to-shot", (cocktail, shot, "left", shaker, "l2", "l1")),
        ]
    if mixes and plain:
        plan.append(Action("leave", ("left", shaker)))
    for i, (shot, ingredient) in enumerate(plain):
        plan += [Action("leave", ("left", plain[i - 1][0]))] if i else []
        plan += [Action("grasp", ("left", shot))]
        plan += [Action("fill-shot", (shot, ingredient, "left", "right", tap[ingredient]))]
    goal = tuple(("contains", shot, drink) for shot, drink in [*mixes, *plain])
    kinds = {
        **dict.fromkeys(hands, "hand"),
        **dict.fromkeys(levels, "level"),
        **dict.fromkeys(tap.values(), "dispenser"),
        **dict.fromkeys(ingredients, "ingredient"),
        **dict.fromkeys(cocktails, "cocktail"),
        **dict.fromkeys(shots, "shot"),
        shaker: "shaker",
    }
    return Problem(kinds, tuple(initial), goal, tuple(plan))


def _tyreworld(random: Random, size: Size) -> Problem:
    """Small: 1 wheel. Medium: 2. The goal is part of this: spares on and inflated, nuts tight, everything put away."""
    numbers = range(1, 2 if size == "small" else 3)
    tools = ["wrench", "pump", "jack"]
    is_open = random.random() < 0.5
    in_hand = {tool for tool in tools if random.random() < 0.3}
    is_inflated = {n for n in numbers if random.random() < 0.3}
    initial: list[Fact] = [("unlocked", "boot"), ("isopen" if is_open else "closed", "boot")]
    initial += [("have", tool) if tool in in_hand else ("in", tool, "boot") for tool in tools]
    for n in numbers:
        hub, nuts, spare, flat = f"hub{n}", f"nuts{n}", f"r{n}", f"w{n}"
        initial += [("in", spare, "boot"), ("intact", spare), ("on", flat, hub), ("on-ground", hub)]
        initial += [("tight", nuts, hub), ("fastened", hub)]
        initial += [("inflated" if n in is_inflated else "not-inflated", spare)]

    # The plan does the whole job. `holds` maps each possible goal fact to the number of actions after which it lasts.
    plan: list[Action] = [] if is_open else [Action("open", ("boot",))]
    holds: dict[Fact, int] = {}
    plan += [Action("fetch", (tool, "boot")) for tool in tools if tool not in in_hand]
    for n in numbers:
        hub, nuts, spare, flat = f"hub{n}", f"nuts{n}", f"r{n}", f"w{n}"
        plan.append(Action("fetch", (spare, "boot")))
        plan += [] if n in is_inflated else [Action("inflate", (spare,))]
        holds["inflated", spare] = len(plan)
        plan += [Action("loosen", (nuts, hub)), Action("jack-up", (hub,)), Action("undo", (nuts, hub))]
        plan += [Action("remove-wheel", (flat, hub)), Action("put-on-wheel", (spare, hub))]
        holds["on", spare, hub] = len(plan)
        plan += [Action("do-up", (nuts, hub)), Action("jack-down", (hub,)), Action("tighten", (nuts, hub))]
        holds["tight", nuts, hub] = len(plan)
        plan.append(Action("put-away", (flat, "boot")))
        holds["in", flat, "boot"] = len(plan)
    for tool in tools:
        plan.append(Action("put-away", (tool, "boot")))
        holds["in", tool, "boot"] = len(plan)
    plan.append(Action("close", ("boot",)))
    holds["closed", "boot"] = len(plan)

    goal = random.sample(list(holds), random.randint(2, min(len(holds), 3 if size == "small" else 6)))
    kinds = {"boot": "container"}
    for n in numbers:
        kinds |= {f"hub{n}": "hub", f"nuts{n}": "nut", f"r{n}": "wheel", f"w{n}": "wheel"}
    return Problem(kinds, tuple(initial), tuple(goal), tuple(plan[: max(holds[fact] for fact in goal)]))


def _all(predicate: str, names: list[str]) -> list[Fact]:
    return [(predicate, name) for name in names]


def _atom(fact: Fact) -> str:
    return f"({' '.join(fact)})"


_GENERATORS: dict[str, Callable[[Random, Size], Problem]] = {
    "gripper": _gripper,
    "blockworld": _blockworld,
    "barman": _barman,
    "tyreworld": _tyreworld,
}
