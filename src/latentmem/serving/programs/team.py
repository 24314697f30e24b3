"""A program as a team: each episode is one run of it, and its agents speak through the host."""

import re
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

from pydantic import JsonValue

from latentmem.config import ProgramSection
from latentmem.models.language_model import LanguageModel
from latentmem.serving.identity import KnownRole
from latentmem.serving.programs.desk import ProgramDesk
from latentmem.serving.programs.host import ProgramHost
from latentmem.serving.programs.runners import Command, Function, Runner, check_program
from latentmem.serving.programs.session import Session
from latentmem.teams.turn import Action, ProgramFailed, Speak
from latentmem.trajectory import Role, Task


class ProgramTeam:
    """A team that is a user's own program; see `teams.turn.Program`."""

    def __init__(self, section: ProgramSection, model: Callable[[], LanguageModel]) -> None:
        """Take what the configuration says; nothing is started yet.

        Args:
            section: the program.
            model: makes the agents' model, which writes tokens as text.

        Raises:
            ConfigError: there is no such command, interpreter, file or module.
        """
        check_program(section)
        self.name = section.label
        self.parallel = section.parallel
        known = [
            KnownRole(Role(name=r.name, profile=r.profile), re.compile(r.pattern) if r.pattern else None)
            for r in section.roles
        ]
        self.roles = tuple(each.role for each in known)
        self._host = ProgramHost(ProgramDesk(lambda: _Writing(model()), known))
        self._runner: Runner
        if section.call is not None:
            self._runner = Function(section.call, section.timeout_seconds, section.python)
        else:
            self._runner = Command(section.command, section.timeout_seconds)
        self._playing: set[Session] = set()
        self._lock = Lock()

    def play(self, task: Task, instructions: str, seed: int, speak: Speak) -> Action:
        """Run the program once; see `Program.play`."""
        session = Session(speak)
        self._host.open(session)
        with self._lock:
            self._playing.add(session)
        failed: ProgramFailed | None = None
        said = ""
        try:
            said = self._runner.run(_shown(task, instructions), self._variables(session), session.can_be_ended_by)
        except ProgramFailed as error:
            failed = error
        finally:
            self._host.end(session)
            with self._lock:
                self._playing.discard(session)
            fault = session.close()
        if fault is not None or failed is not None:
            raise ProgramFailed(fault or str(failed))
        record: dict[str, JsonValue] = {} if session.told is None else {"told_reward": session.told}
        return Action(said, record, session.rewards)

    def stop(self) -> None:
        """End all programs that run."""
        with self._lock:
            playing = list(self._playing)
        for session in playing:
            session.abort("the rollout was ended")

    def close(self) -> None:
        """End the server and the workers."""
        self.stop()
        self._runner.close()
        self._host.close()

    def _variables(self, session: Session) -> Mapping[str, str]:
        address = f"{self._host.url}/sessions/{session.id}"
        return {
            "OPENAI_BASE_URL": f"{address}/v1",
            "OPENAI_API_KEY": session.token,
            "LATENTMEM_SESSION_URL": address,
        }


class _Writing:
    """How a model's tokens become text."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @property
    def tool_form(self) -> str:
        return self._model.chat.tool_form

    def text_of(self, token_ids: Sequence[int]) -> str:
        return self._model.chat.said(token_ids)


def _shown(task: Task, instructions: str) -> dict[str, Any]:
    """Return what a program is told of a task: never what the environment judges by."""
    return {"id": task.id, "text": task.text, "instructions": instructions}
