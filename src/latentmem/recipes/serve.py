"""Serve agent programs: build the parts of the server, and answer until a signal comes."""

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock

from latentmem.config import Config, Sampling
from latentmem.errors import RunError, ServingError
from latentmem.listening import take_port
from latentmem.models.agent import AgentModel, Prompt, Sampled
from latentmem.recipes.parts import Parts
from latentmem.runs import lock
from latentmem.serving.app import create_app
from latentmem.serving.desk import ServingDesk, Shop, nothing_recalled
from latentmem.serving.endings import Endings
from latentmem.serving.identity import KnownRole
from latentmem.serving.serve import is_this_machine, run
from latentmem.serving.sessions import Storing
from latentmem.serving.store import SessionStore
from latentmem.serving.tokens import Tokens
from latentmem.trajectory import Role


class _InTurn:
    """A model that serves one at a time, for many threads."""

    concurrent = True

    def __init__(self, model: AgentModel) -> None:
        self.name = model.name
        self._model = model
        self._lock = Lock()

    def respond(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sampled]:
        with self._lock:
            return self._model.respond(prompts, sampling)


def serve(config: Config, announce: Callable[[str], object]) -> None:
    """Serve agent programs until SIGTERM or SIGINT.

    Args:
        config: the experiment; of `data` nothing is played.
        announce: called once the server can answer, with one line that says where.

    Raises:
        ServingError: the port is taken, the address needs keys, or the store cannot be used.
        RunError: another server works in this run's folder.
        LatentMemError: a mistake in the configuration of a part.
    """
    section = config.serve
    if not is_this_machine(section.host):
        raise ServingError(
            f"serve.host is {section.host!r}, which others can reach, and there are no API keys; make one with "
            "`latentmem keys create`, or serve on 127.0.0.1"
        )
    folder = serving_folder(config)
    parts = Parts(config)
    with (
        take_port(section.host, section.port, ServingError) as listener,
        lock(folder),
        closing(SessionStore(folder / "sessions.sqlite")) as store,
        closing(parts),
    ):
        language_model = parts.model
        model: AgentModel = language_model if language_model.concurrent else _InTurn(language_model)
        shop = Shop(
            store=store,
            model=model,
            text_of=language_model.decode,
            tool_form="hermes",
            recall=nothing_recalled,
            sampling=section.defaults,
        )
        desk = ServingDesk(
            shop, known_roles(config), domain=section.domain, parallel=section.parallel, queue=section.queue
        )
        storing = Storing(section.team, language_model.name, section.unjudged)
        endings = Endings(store, parts.bank.add, storing, section.session_seconds)
        app = create_app(desk, endings, Tokens(store.secret))
        run(app, desk, listener, section.host, lambda where: announce(f"serve: {language_model.name} at {where}/v1"))


def serving_folder(config: Config) -> Path:
    """Return the folder of what a server keeps, made if there is none.

    Raises:
        RunError: it cannot be made.
    """
    folder = Path(config.run) / "serve"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made ({error.strerror}); name another with run=FOLDER") from None
    return folder


def known_roles(config: Config) -> list[KnownRole]:
    """Return the roles of the configuration."""
    return [
        KnownRole(
            Role(name=role.name, profile=role.profile), None if role.pattern is None else re.compile(role.pattern)
        )
        for role in config.serve.roles
    ]
