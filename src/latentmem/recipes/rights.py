"""What may be asked about what a server recorded, while no server runs: to be forgotten, and sessions replayed."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from latentmem.config import Config
from latentmem.errors import DataError
from latentmem.recipes.folders import audit_of
from latentmem.recipes.parts import Parts
from latentmem.recipes.serve import recaller_of, serving_folder, voice_of
from latentmem.runs import lock
from latentmem.serving.operators.audit import AuditLog
from latentmem.serving.rights.forget import Forgetting, Forgotten, Wish
from latentmem.serving.rights.replay import Replayed, replay
from latentmem.serving.sessions.store import SessionStore


def forget(config: Config, wish: Wish, *, dry_run: bool) -> Forgotten:
    """Delete what a wish names from a run's bank and sessions.

    Raises:
        RunError: a server works in the run's folder; ask it.
        DataError: nothing is named.
        BankError: the bank cannot be used.
    """
    with _kept(config) as (parts, store, audit):
        return Forgetting(parts.bank.seen_by(None), store, audit).forget(wish, "command", dry_run=dry_run)


def replay_session(config: Config, tenant: str, session: str, limit: int) -> list[Replayed]:
    """Sample a session's calls again, greedily, with and without memory.

    Raises:
        RunError: a server works in the run's folder; ask it.
        DataError: there is no such session.
    """
    with ExitStack() as open_parts:
        parts, store, audit = open_parts.enter_context(_kept(config))
        found = store.get(tenant, session)
        if found is None:
            whose = f"of tenant {tenant}" if tenant else "without a tenant"
            raise DataError(f"{config.run}: no session {session[:200]!r} {whose}; name its tenant with --tenant")
        memory = open_parts.enter_context(closing(recaller_of(parts)))
        model = open_parts.enter_context(voice_of(parts)).model
        messages = [
            choice.message for call in store.calls(found) if call.answer is not None for choice in call.answer.choices
        ]
        replayed = replay(messages, model, memory, limit, tenant=tenant)
        audit.append("replayed", {"tenant": tenant, "session": session, "calls": len(replayed)})
        return replayed


@contextmanager
def _kept(config: Config) -> Iterator[tuple[Parts, SessionStore, AuditLog]]:
    """Yield what a server keeps; no server works with it meanwhile."""
    folder = serving_folder(config)
    with (
        lock(folder),
        closing(SessionStore(folder / "sessions.sqlite")) as store,
        closing(AuditLog(audit_of(config))) as audit,
        closing(Parts(config)) as parts,
    ):
        yield parts, store, audit
