"""Serve agent programs: build the parts of the server, and answer until a signal comes."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from math import ceil
from pathlib import Path

from latentmem.bank import ExperienceBank
from latentmem.config import Config, ProgramSection
from latentmem.engines.batching import Batcher
from latentmem.engines.upstream import UpstreamEngine
from latentmem.errors import LatentMemError, RunError, ServingError
from latentmem.folders import audit_of, composer_folder, keys_of, trained_checkpoint
from latentmem.listening import take_port
from latentmem.memory.composer import Composer
from latentmem.memory_names import TRAININGS
from latentmem.models.language_model import LanguageModel
from latentmem.models.prefilling import Kept
from latentmem.recipes.memories import rater_of, recalling
from latentmem.recipes.parts import Parts
from latentmem.runs import lock
from latentmem.serving.allocation import giving_memory_back
from latentmem.serving.app import create_app
from latentmem.serving.desk import ServingDesk, Shop, Voice
from latentmem.serving.following import Following
from latentmem.serving.identity import KnownRole
from latentmem.serving.operators.audit import AuditLog
from latentmem.serving.operators.keys import Keys, check_reach
from latentmem.serving.operators.logs import RequestLog
from latentmem.serving.operators.metrics import Metrics
from latentmem.serving.operators.operators import Operators
from latentmem.serving.recalling import Recaller, Searching
from latentmem.serving.rights.forget import Forgetting
from latentmem.serving.rights.routes import Rights, rights_routes
from latentmem.serving.serve import run
from latentmem.serving.sessions.endings import Endings
from latentmem.serving.sessions.session import Storing
from latentmem.serving.sessions.store import SessionStore
from latentmem.serving.sessions.tokens import Tokens
from latentmem.trajectory import Role


def serve(config: Config, begin: Callable[[str], object], announce: Callable[[str], object]) -> None:
    """Serve agent programs until SIGTERM or SIGINT.

    Args:
        config: the experiment; of `data` nothing is played.
        begin: called before the model is loaded, which may take a minute, with one line that says so.
        announce: called once the server can answer, with one line that says where.

    Raises:
        ServingError: the port is taken, the address needs keys, or the store cannot be used.
        RunError: another server works in this run's folder.
        LatentMemError: a mistake in the configuration of a part.
    """
    section = config.serve
    folder = serving_folder(config)
    with ExitStack() as open_parts:
        open_parts.enter_context(giving_memory_back())
        operators = open_parts.enter_context(closing(operators_of(config)))
        check_reach(section.host, operators.keys)
        parts = open_parts.enter_context(closing(Parts(config)))
        listener = open_parts.enter_context(take_port(section.host, section.port, ServingError))
        open_parts.enter_context(lock(folder))
        store = open_parts.enter_context(closing(SessionStore(folder / "sessions.sqlite")))
        for name in _latent_memories(config):
            _checkpoint_now(config, name)  # what is missing is told before anybody waits for the model
        begin(f"serve: getting {config.model.name} ready; the address follows once requests are taken")
        voice = open_parts.enter_context(voice_of(parts))
        recaller = open_parts.enter_context(closing(recaller_of(parts)))
        shop = Shop(
            store=store,
            voice=voice,
            recall=recaller,
            sampling=section.defaults,
        )
        desk = ServingDesk(
            shop,
            known_roles(config),
            domain=section.domain,
            parallel=section.parallel,
            queue=section.queue,
            shares=operators.shares,
        )
        storing = Storing(section.team, voice.model.name, section.unjudged)
        endings = Endings(store, parts.bank.add, storing, section.session_seconds)
        tokens = Tokens(store.secret)
        app = create_app(
            desk,
            endings,
            tokens,
            authenticate=operators.authenticate,
            watched=operators.watched,
            routers=[
                operators.routes(),
                rights_routes(rights_of(parts, shop, recaller, operators.audit, desk.pools), operators.authenticate),
            ],
        )
        _tell_figures(operators.metrics, desk, store, parts.bank.seen_by(None), recaller)
        run(
            operators.gate(app, tokens.read),
            desk,
            listener,
            section.host,
            lambda where: announce(f"serve: {voice.model.name} at {where}/v1"),
        )


def recaller_of(parts: Parts) -> Recaller:
    """Make the memories of a server, and load what they need.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit.
        BankError: the bank cannot be used.
    """
    config = parts.config
    section = config.serve
    choices = (section.memory, "text", "none") if section.choose_memory else (section.memory,)
    latent = {
        name: Following(partial(_checkpoint_now, config, name), partial(_composer, parts))
        for name in _latent_memories(config)
    }
    return Recaller(
        section.memory,
        None if choices == ("none",) else recalling(parts, parts.bank),
        latent,
        partial(_count_tokens, parts),
        text_budget=section.text_budget,
        choices=choices,
        searching=Searching(config.bank.num_retrieved, config.bank.only_successes, rater_of(parts)),
        words=config.memory,
    )


def _latent_memories(config: Config) -> list[str]:
    return [config.serve.memory] if config.serve.memory.startswith("latent:") else []


def _checkpoint_now(config: Config, memory: str) -> Path | None:
    """Return the checkpoint of a latent memory that counts now; None: the composer stays untrained.

    Raises:
        CheckpointError: there is none.
    """
    which = memory.partition(":")[2]
    if which == "untrained":
        return None
    if which not in TRAININGS:
        return composer_folder(which)
    return trained_checkpoint(config, which)


def _composer(parts: Parts, weights: Path | None) -> Composer:
    composer = parts.loose_composer()
    try:
        if weights is not None:
            composer.load_weights(weights)
    except LatentMemError:
        composer.detach()  # nobody else will: the one that serves stays
        raise
    return composer


def rights_of(
    parts: Parts, shop: Shop, recaller: Recaller, audit: AuditLog, pools: Callable[[str], Sequence[str]]
) -> Rights:
    """Make what may be asked about what was recorded.

    Args:
        parts: the model, the bank and its embedder.
        shop: the sessions, and the model that samples.
        recaller: the memories.
        audit: is told of what is forgotten.
        pools: whose episodes a tenant may see.
    """
    everybodys = parts.bank.seen_by(None)
    return Rights(
        store=shop.store,
        bank=everybodys,
        embed=parts.embedder,
        memory=recaller,
        model=shop.voice.model,
        weights=parts.agents if isinstance(parts.agents, LanguageModel) else None,
        roles=known_roles(parts.config),
        pools=pools,
        forgetting=Forgetting(everybodys, shop.store, audit, recaller.num_kept_of, shop.voice.drop_kept),
        audit=audit,
    )


def operators_of(config: Config) -> Operators:
    """Make what operators put around a server: keys, the audit and the log.

    Raises:
        LatentMemError: a file cannot be used.
    """
    return Operators(Keys(keys_of(config)), AuditLog(audit_of(config)), RequestLog(sys.stderr, config.serve.log))


def _tell_figures(
    metrics: Metrics, desk: ServingDesk, store: SessionStore, bank: ExperienceBank, recaller: Recaller
) -> None:
    metrics.reads("taken_places", "Requests that are being answered", lambda: desk.load.taken)
    metrics.reads("queue_length", "Requests that wait for a place", lambda: desk.load.waiting)
    metrics.reads(
        "sessions", "Sessions by state", lambda: {str(k): v for k, v in store.num_by_state().items()}, "state"
    )
    metrics.reads("bank_trajectories", "Trajectories in the bank", lambda: len(bank.seen_by(None)))
    metrics.reads("kept_recalls", "Latents that need not be composed again", lambda: len(recaller.kept))


@contextmanager
def voice_of(parts: Parts) -> Iterator[Voice]:
    """Yield what speaks for the agents, for many threads: an engine, or a batcher before the weights here.

    Raises:
        ModelError: the model cannot be loaded.
    """
    agents = parts.agents
    if isinstance(agents, UpstreamEngine):
        yield Voice(agents, agents.said, agents.tool_form)
        return
    if agents.concurrent:
        yield Voice(agents, agents.chat.said, agents.chat.tool_form)
        return
    section = parts.config.serve
    batcher = Batcher(agents, max_waiting=section.queue, kept=Kept(section.kept_prompt_tokens))
    try:
        yield Voice(batcher, agents.chat.said, agents.chat.tool_form, batcher.drop_kept)
    finally:
        batcher.close()


def _count_tokens(parts: Parts, text: str) -> int:
    """Count tokens; where there is no tokenizer, four characters count as one."""
    agents = parts.agents
    return len(agents.encode(text)) if isinstance(agents, LanguageModel) else ceil(len(text) / 4)


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
    """Return the roles of the configuration: those of `serve`, or else those that its program was trained with."""
    listed = config.serve.roles or (config.team.roles if isinstance(config.team, ProgramSection) else ())
    return [
        KnownRole(
            Role(name=role.name, profile=role.profile), None if role.pattern is None else re.compile(role.pattern)
        )
        for role in listed
    ]
