"""Serve agent programs: build the parts of the server, and answer until a signal comes."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from latentmem.config import Config
from latentmem.engines.batching import Batcher
from latentmem.errors import RunError, ServingError
from latentmem.listening import take_port
from latentmem.models.agent import AgentModel
from latentmem.models.language_model import LanguageModel
from latentmem.recipes.parts import Parts
from latentmem.runs import lock
from latentmem.serving.app import create_app
from latentmem.serving.desk import ServingDesk, Shop, nothing_recalled
from latentmem.serving.identity import KnownRole
from latentmem.serving.serve import is_this_machine, run
from latentmem.serving.sessions.endings import Endings
from latentmem.serving.sessions.session import Storing
from latentmem.serving.sessions.store import SessionStore
from latentmem.serving.sessions.tokens import Tokens
from latentmem.trajectory import Role


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
        ExitStack() as stack,
    ):
        language_model = parts.model
        model = stack.enter_context(concurrent_model(language_model, section.queue))
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


@contextmanager
def concurrent_model(model: LanguageModel, max_waiting: int) -> Iterator[AgentModel]:
    """Yield a model that many threads may ask at the same time: the engine's, or a batcher before the weights here."""
    if model.concurrent:
        yield model
        return
    batcher = Batcher(model, max_waiting=max_waiting)
    try:
        yield batcher
    finally:
        batcher.close()


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
