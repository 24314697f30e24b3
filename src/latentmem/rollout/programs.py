"""Teams that are programs: each episode runs by itself, and its agents speak when the program wants.

A response's random stream is made from its episode, its role, its conversation and its number in that conversation,
never from the order in which requests arrive. So the responses do not depend on what runs beside them. Roles may be
found while playing; the memory is asked for them then.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

from latentmem.environments.environment import Environment, Outcome
from latentmem.errors import LatentMemError, WindowError
from latentmem.outside import well_formed
from latentmem.rollout.episodes import Episode
from latentmem.rollout.prompts import group_of, message_of, prompt_of, read_by
from latentmem.rollout.recalls import SharedRecalls
from latentmem.rollout.turns import Ask
from latentmem.seeds import stream_seed
from latentmem.teams.turn import Action, Call, Program, ProgramFailed
from latentmem.trajectory import Message, Task

logger = logging.getLogger(__name__)

_NO_CALL = "no call of it reached an agent; is its base_url taken from OPENAI_BASE_URL?"


@dataclass
class ProgramEpisode(Episode):
    """An episode of a program."""

    team: Program
    generation: float = 0.0
    """Seconds of sampling, summed over the calls."""
    stopped_by: Exception | None = None
    """What ends the whole rollout: an error of the model or the memory."""
    was_called: bool = False
    """Whether a call has arrived, answered or not."""
    _ask: Ask | None = None
    _recalls: SharedRecalls | None = None
    _temperature: float = 0.0
    _is_over: bool = False
    _lock: Lock = field(default_factory=Lock)
    _numbers: Counter[tuple[str, str]] = field(default_factory=Counter)

    def play(
        self, start: Callable[[Task], Environment], recalls: SharedRecalls, ask: Ask, temperature: float
    ) -> tuple[float, float]:
        """Play to the end; return the seconds of generation and of the environment.

        Raises:
            LatentMemError: any such error of a part. What a program does wrong is data instead.
        """
        self._ask, self._recalls, self._temperature = ask, recalls, temperature
        began = time.perf_counter()
        self.begin(start)
        environment = time.perf_counter() - began
        if self.done:
            return 0.0, environment
        self.action = self._run()
        if self.stopped_by is not None:
            raise self.stopped_by
        began = time.perf_counter()
        failed = Outcome(observation="", reward=0.0, done=True, info={"extracted": None})
        self.end_step(self.act() if self.error is None else failed, is_last=True)
        return self.generation, environment + time.perf_counter() - began

    def _run(self) -> Action:
        """Run the program and return its action; the one place where its failure becomes data."""
        try:
            action = self.team.play(self.task, self.instructions, self.seed, self.speak)
            self.rewards = action.rewards
            return Action(well_formed(action.text), action.record)
        except LatentMemError:
            raise
        except ProgramFailed as error:
            self.error = well_formed(f"program: {error}")
        except Exception as error:
            self.error = well_formed(f"program: {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._is_over = True
        return Action("")

    def speak(self, calls: Sequence[Call]) -> list[Message]:
        """Let agents speak now; several threads may call this. The messages are kept in the order of completion.

        Raises:
            ProgramFailed: the episode is over, or nobody waits for the response any more.
            WindowError: a prompt does not fit the model's window; the program may go on.
        """
        assert self._ask is not None
        assert self._recalls is not None
        with self._lock:
            self._check_open()
            self.was_called = True
            seeds = [self._next_seed(call) for call in calls]
            earlier = tuple(self.messages)
        try:
            recalls = self._recalls.ask([(self.task, call.role) for call in calls])
            heard = [_Heard(call) for call in calls]
            prompts = [
                prompt_of(call, recall, group_of(self.task, call.role.name), seed)
                for call, recall, seed in zip([one.call for one in heard], recalls, seeds, strict=True)
            ]
            began = time.perf_counter()
            responses = self._ask(prompts)
            seconds = time.perf_counter() - began
        except WindowError:
            raise
        except Exception as error:  # of the model or the memory, not of the program
            self.stopped_by = self.stopped_by or error
            raise
        for call, sampled in zip(calls, responses, strict=True):
            if call.served is not None and call.served.on_sampled is not None:
                call.served.on_sampled(sampled)
        messages = [
            message_of(_with_reads(call, earlier, self._shown), sampled, recall, self._temperature)
            for call, sampled, recall in zip(calls, responses, recalls, strict=True)
        ]
        if any(one.is_gone for one in heard):
            raise ProgramFailed("the client went away")
        with self._lock:
            self._check_open()
            self.messages += messages
            self.generation += seconds
        return messages

    @property
    def _shown(self) -> str:
        """What a prompt may quote without having read a message."""
        return f"{self.task.text}\n{self.instructions}"

    def _next_seed(self, call: Call) -> int:
        if (served := call.served) is not None:
            return stream_seed(self.seed, "call", call.role.name, served.lineage, served.number, served.choice)
        lineage = hashlib.sha256(f"{call.system}\x1f{call.user}".encode("utf-8", "surrogatepass")).hexdigest()
        number = self._numbers[call.role.name, lineage]
        self._numbers[call.role.name, lineage] += 1
        return stream_seed(self.seed, "call", call.role.name, lineage, number)

    def _check_open(self) -> None:
        if self._is_over:
            raise ProgramFailed("it called after its episode had ended")


class _Heard:
    """A call, and whether somebody still waits for its response."""

    def __init__(self, call: Call) -> None:
        self.is_gone = False
        self.call = call
        if call.served is not None and call.served.on_tokens is not None:
            self.call = replace(call, served=replace(call.served, on_tokens=self._on_tokens))
            self._told = call.served.on_tokens

    def _on_tokens(self, token_ids: Sequence[int]) -> bool:
        self.is_gone = self.is_gone or not self._told(token_ids)
        return not self.is_gone


def _with_reads(call: Call, earlier: Sequence[Message], shown: str) -> Call:
    """Return the call with the numbers of the earlier messages that its prompt quotes."""
    if call.reads:
        return call
    asked = call.user if call.served is None else f"{call.served.conversation.system}\n{call.user}"
    return Call(call.role, call.system, call.user, read_by(asked, earlier, shown), call.served)


def warn_of_waste(episodes: Sequence[ProgramEpisode]) -> None:
    """Warn of what teaches nothing: most episodes failed, no call arrived, or silent agents were given rewards.

    If all episodes failed, their causes are told, and nobody has to guess why no call arrived.
    """
    failures = Counter(episode.error for episode in episodes if episode.error is not None)
    if failures.total() > len(episodes) / 2:
        logger.warning(
            "program %s: %d of %d episodes failed, most often so: %s",
            episodes[0].team.name,
            failures.total(),
            len(episodes),
            failures.most_common(1)[0][0],
        )
    ended = [episode for episode in episodes if episode.error is None]
    spoke = {message.role for episode in ended for step in episode.steps for message in step.messages}
    if ended and not any(episode.was_called for episode in episodes):
        logger.warning("program %s: %s", ended[0].team.name, _NO_CALL)
    if spoke and (silent := {role for episode in ended for role in episode.rewards} - spoke):
        logger.warning(
            "program %s: rewards are told for %s, who said nothing; the roles that spoke are %s",
            ended[0].team.name,
            ", ".join(sorted(silent)),
            ", ".join(sorted(spoke)),
        )
