"""What may be asked about what a server recorded, while no server runs: to be forgotten, and sessions replayed."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from latentmem.config import Config
from latentmem.errors import DataError
from latentmem.folders import audit_of
from latentmem.recipes.parts import Parts
from latentmem.recipes.serve import recaller_of, serving_folder, voice_of
from latentmem.runs import lock
from latentmem.serving.operators.audit import AuditLog
from latentmem.serving.rights.forget import Forgetting, Forgotten, Wish
from latentmem.serving.rights.replay import Replayed, had_memory, left_out, replay
from latentmem.serving.sessions.store import SessionStore


def forget(config: Config, wish: Wish, *, dry_run: bool) -> Forgotten:
    """Delete what a wish names from a run's bank and sessions.

    Raises:
        RunError: a server works in the run's folder; ask it.
        DataError: nothing is named.
        BankError: the bank cannot be used.
    """
    with _kept(config, "POST /forget") as (parts, store, audit):
        return Forgetting(parts.bank.seen_by(None), store, audit).forget(wish, "command", dry_run=dry_run)


def replay_session(config: Config, tenant: str, session: str, limit: int) -> tuple[list[Replayed], str | None]:
    """Sample a session's calls again, greedily, with and without memory; return also why some are left out.

    Raises:
        RunError: a server works in the run's folder; ask it.
        DataError: there is no such session.
    """
    with ExitStack() as open_parts:
        parts, store, audit = open_parts.enter_context(_kept(config, f"POST /sessions/{session}/replay"))
        found = store.get(tenant, session)
        if found is None:
            whose = f"of tenant {tenant}" if tenant else "without a tenant"
            raise DataError(f"{config.run}: no session {session[:200]!r} {whose}; name its tenant with --tenant")
        messages = [
            choice.message for call in store.calls(found) if call.answer is not None for choice in call.answer.choices
        ]
        if not any(map(had_memory, messages)):
            return [], left_out(messages)  # before anybody waits for the model
        memory = open_parts.enter_context(closing(recaller_of(parts)))
        model = open_parts.enter_context(voice_of(parts)).model
        replayed = replay(messages, model, memory, limit, tenant=tenant)
        audit.append("replayed", {"tenant": tenant, "session": session, "calls": len(replayed)})
        return replayed, left_out(messages)


@contextmanager
def _kept(config: Config, instead: str) -> Iterator[tuple[Parts, SessionStore, AuditLog]]:
    """Yield what a server keeps; no server works with it meanwhile, and one that does can be asked instead."""
    folder = serving_folder(config)
    with (
        lock(folder, f"ask it: {instead}"),
        closing(SessionStore(folder / "sessions.sqlite")) as store,
        closing(AuditLog(audit_of(config))) as audit,
        closing(Parts(config)) as parts,
    ):
        yield parts, store, audit
