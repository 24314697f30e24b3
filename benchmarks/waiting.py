"""What it costs that episodes wait for each other: rollouts in step against episodes that go their own ways.

The model is a stand-in for a server that makes its own batches: a call takes as long for one prompt as for all of them.
The environment sleeps, as one that waits for a search or a sandbox: most turns are short, some are long. Which ones are
is drawn from a seed, the same for both ways. In step, all environments may act at the same time, too, so only waiting
makes the difference. Both ways run alternately; that their trajectories are equal is asserted.

    python benchmarks/waiting.py [--rounds 5] [--turns 4] [--out results.json]
    python benchmarks/waiting.py --quick      a smoke run, seconds
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from latentmem.config import Sampling
from latentmem.environments.environment import Outcome
from latentmem.memory.memory import NoMemory
from latentmem.models.agent import Prompt, Sampled
from latentmem.rollout import rollout
from latentmem.seeds import stream_seed
from latentmem.teams.team import load_team
from latentmem.trajectory import Task


@dataclass(frozen=True)
class Size:
    """How much is played, and how long everything takes, in seconds."""

    num_tasks: int = 16
    group_size: int = 8
    num_turns: int = 4
    respond: float = 0.1
    short: float = 0.05
    long: float = 2.0
    share_long: float = 0.1


@dataclass(frozen=True)
class Server:
    """Responds after a fixed time, however many prompts it got."""

    seconds: float
    concurrent: bool
    name: str = "stand-in"

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        time.sleep(self.seconds)
        return [Sampled(f"{prompt.seed % 1000}", (1,), (0.0,), "stop", 1) for prompt in prompts]


class Sleeping:
    """Sleeps at each turn for a time that depends on the task, the turn and what the team said."""

    instructions = ""

    def __init__(self, task: Task, size: Size) -> None:
        self.task, self.size, self.turn = task, size, 0

    def step(self, action: str) -> Outcome:
        draw = random.Random(stream_seed(0, self.task.key, self.turn, action)).random()
        time.sleep(self.size.long if draw < self.size.share_long else self.size.short)
        self.turn += 1
        return Outcome("", 0.0, self.turn == self.size.num_turns)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=Size.num_turns, help="turns of an episode")
    parser.add_argument("--quick", action="store_true", help="small sizes: only to see that it works")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    size = Size(2, 4, 2, 0.01, 0.005, 0.1) if options.quick else Size(num_turns=options.turns)
    team = load_team("autogen")
    tasks = [Task(id=str(i), domain="sleep", text=f"task {i}") for i in range(size.num_tasks)]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for round_ in range(options.rounds):
        played = {}
        for concurrent in (False, True) if round_ % 2 else (True, False):
            began = time.perf_counter()
            played[concurrent] = rollout(
                team,
                NoMemory(),
                Server(size.respond, concurrent),
                tasks,
                lambda task: Sleeping(task, size),
                group_size=size.group_size,
                seed=round_,
                max_turns=size.num_turns,
                workers=size.num_tasks * size.group_size,
            ).groups
            seconds[concurrent].append(time.perf_counter() - began)
        assert played[False] == played[True]
    in_step, apart = (statistics.median(seconds[way]) for way in (False, True))
    print(f"{size}")
    print(f"in step {in_step:.2f} s, apart {apart:.2f} s (medians of {options.rounds}); ratio {in_step / apart:.2f}")
    if options.out:
        figures = {"size": asdict(size), "in_step": seconds[False], "apart": seconds[True], "ratio": in_step / apart}
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
