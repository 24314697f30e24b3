"""To be forgotten: episodes are deleted wherever they are, with a receipt, and then it is looked whether any is left.

    bank       records, index and lists, and the file's own bytes
    sessions   what was recorded of them, and what of them was told to others as memory
    caches     latents that were composed from them, and all prompts that the model keeps as it has read them
    audit      keeps ids, counts and who asked, and nothing that was said

What a composer learned from them in training stays in its weights. Episodes that others played with a memory made of
forgotten ones keep, as a record, the text that the memory was made from; those of the same tenant are named in the
receipt as derived, and are deleted too if that is asked for.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace

from pydantic import AwareDatetime, BaseModel, ConfigDict, JsonValue

from latentmem.bank import ExperienceBank
from latentmem.errors import DataError
from latentmem.serving.operators.audit import AuditLog
from latentmem.serving.sessions.endings import merged
from latentmem.serving.sessions.session import UNJUDGED, Session
from latentmem.serving.sessions.store import SessionStore
from latentmem.trajectory import Task, Trajectory

_SEARCHES = 100
"""Forgotten episodes whose own task is searched for, to see that nothing comes back."""
_NEAREST = 20
_IDS_IN_AUDIT = 10_000
"""Ids that one line of the audit tells; of more, only their number."""


class Wish(BaseModel):
    """What is to be forgotten: what meets all that is given."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    tenant: str | None = None
    """Whose; null: everybody's."""
    session: str | None = None
    domain: str | None = None
    task_id: str | None = None
    success: bool | None = None
    before: AwareDatetime | None = None
    """A time with its zone; what was recorded earlier."""
    everything: bool = False
    """That nothing else is given is meant so."""
    derived: bool = False
    """Whether episodes that were played with a memory made of these are forgotten too."""

    @property
    def is_whole(self) -> bool:
        """Whether it has no filter but the tenant."""
        return all(value is None for value in (self.session, self.domain, self.task_id, self.success, self.before))


@dataclass(frozen=True)
class Proof:
    """A look for what is left, after all was deleted."""

    problems: tuple[str, ...]
    """What is left where; empty: nothing."""
    num_searches: int
    """Searches for the forgotten episodes' own tasks, of which none found one."""
    num_cached: int
    """Kept recalls that were made of them; they are not given any more."""

    @property
    def holds(self) -> bool:
        """Whether nothing of it is recalled any more."""
        return not self.problems and not self.num_cached


@dataclass(frozen=True)
class Touched:
    """What of one tenant was deleted, or would be."""

    tenant: str
    """Empty: of nobody, or of the operator."""
    count: int
    """Trajectories; those that it had shared with the common pool too, as long as its sessions tell which."""
    num_sessions: int


@dataclass(frozen=True)
class Forgotten:
    """The receipt: what was deleted, or would be."""

    wish: Wish
    is_dry_run: bool
    count: int
    """Trajectories."""
    ids: tuple[str, ...]
    num_sessions: int
    tenants: tuple[Touched, ...]
    """Whose they are: each tenant with its numbers."""
    num_scrubbed: int
    """Calls of other sessions from whose record a memory's text was deleted."""
    derived: tuple[str, ...]
    """Ids of trajectories that were played with a memory made of these."""
    is_erased: bool
    """Whether the files of this host hold none of its bytes any more."""
    digest_before: str
    """`ExperienceBank.digest` before."""
    digest_after: str
    proof: Proof | None
    """None for a dry run."""
    audit: str | None
    """Hash of the line in the audit log that tells of it."""

    def as_json(self) -> dict[str, JsonValue]:
        """Return the receipt as JSON values."""
        told: dict[str, JsonValue] = {name: _plain(value) for name, value in asdict(self).items() if name != "wish"}
        return told | {"wish": self.wish.model_dump(mode="json", exclude_none=True)}


class Forgetting:
    """Deletes from everything that one server keeps."""

    def __init__(
        self,
        bank: ExperienceBank,
        sessions: SessionStore,
        audit: AuditLog,
        kept: Callable[[Collection[str]], int] = lambda ids: 0,
        drop_prompts: Callable[[], object] = lambda: None,
    ) -> None:
        """Take what is deleted from.

        Args:
            bank: as everybody sees it.
            sessions: the store of sessions.
            audit: is told of each deletion, durably.
            kept: returns how many kept recalls that were made of these trajectories would still be given.
            drop_prompts: drops the prompts that the model keeps, since any of them may quote a memory.
        """
        self._bank = bank
        self._sessions = sessions
        self._audit = audit
        self._kept = kept
        self._drop_prompts = drop_prompts

    def forget(self, wish: Wish, by: str, *, dry_run: bool) -> Forgotten:
        """Delete what a wish names; the receipt and its line in the audit are durable when this returns.

        If it is interrupted, the same wish finishes it.

        Args:
            wish: what is to be forgotten.
            by: who asks, for the audit: the id of a key, or `command`.
            dry_run: whether it is only counted.

        Raises:
            DataError: nothing is named.
            BankError: the bank is locked or cannot be written.
            AuditError: the audit log cannot be written.
        """
        if wish.is_whole and not wish.everything:
            raise DataError(
                "forget: no filter is given; name one, or say that everything is meant: "
                '"everything": true, or --everything of the command'
            )
        sessions = self._sessions_of(wish)
        ids = self._ids(wish, sessions)
        derived = self._derived(ids, wish.tenant)
        if wish.derived:
            ids, derived = (*ids, *derived), self._derived((*ids, *derived), wish.tenant)
        before = self._bank.digest()
        tenants = self._tenants(ids, sessions)
        told: dict[str, JsonValue] = {
            "by": by,
            "wish": wish.model_dump(mode="json", exclude_none=True),
            "count": len(ids),
            "sessions": len(sessions),
            "tenants": [_plain(asdict(each)) for each in tenants],
            "ids": [*ids] if len(ids) <= _IDS_IN_AUDIT else None,
        }
        if dry_run:
            return Forgotten(
                wish, True, len(ids), ids, len(sessions), tenants, 0, derived, False, before, before, None, None
            )
        self._audit.append("forgetting", told, durable=True)
        found = self._bank.get([id for id in ids if id in self._bank])
        erased = self._delete(ids)
        num_sessions = self._sessions.forget([(session.tenant, session.id) for session in sessions])
        scrubbed = self._sessions.scrub(ids)
        erased = self._sessions.erase() and erased
        late = self._ids(wish, sessions)  # a session that ended meanwhile
        erased = self._delete(late) and erased
        self._drop_prompts()
        proof = self._proof(wish, (*ids, *late), found)
        receipt = Forgotten(
            wish, False, len({*ids, *late}), (*ids, *late), num_sessions, tenants, scrubbed, derived, erased, before,
            self._bank.digest(), proof, None,
        )  # fmt: skip
        line: dict[str, JsonValue] = {
            **told,
            "erased": erased,
            "left": list(proof.problems),
            "digest": receipt.digest_after,
        }
        hash = self._audit.append("forgotten", line, durable=True)
        return replace(receipt, audit=hash)

    def _sessions_of(self, wish: Wish) -> list[Session]:
        found = self._sessions.about(
            tenant=wish.tenant, session=wish.session, domain=wish.domain, task_id=wish.task_id, before=wish.before
        )
        return [each for each in found if wish.success is None or wish.success == self._succeeded(each)]

    def _succeeded(self, session: Session) -> bool:
        if session.ending is None:
            return False
        ending = merged(session.ending, self._sessions.events(session))
        return ending.of_those_who(self._sessions.spoke(session)).team_reward == 1

    def _ids(self, wish: Wish, sessions: Sequence[Session]) -> tuple[str, ...]:
        """Return the trajectories that a wish names, and those of its sessions, which may lie in the common pool."""
        filters = {
            "tenant": wish.tenant,
            "session": wish.session,
            "domain": wish.domain,
            "task_id": wish.task_id,
            "success": wish.success,
            "before": wish.before,
        }
        given = {name: value for name, value in filters.items() if value is not None}
        receipt = self._bank.delete(**given, everything=not given, dry_run=True)  # type: ignore[arg-type]
        shared = [session.trajectory for session in sessions if session.trajectory is not None]
        return (*receipt.ids, *(id for id in dict.fromkeys(shared) if id not in receipt.ids and id in self._bank))

    def _tenants(self, ids: Collection[str], sessions: Sequence[Session]) -> tuple[Touched, ...]:
        owners = {session.trajectory: session.tenant for session in sessions}
        counts = Counter(owners[id] for id in ids if id in owners)
        counts.update(_pool_of(trajectory) for trajectory in self._bank.get([id for id in ids if id not in owners]))
        opened = Counter(session.tenant for session in sessions)
        return tuple(Touched(tenant, counts[tenant], opened[tenant]) for tenant in sorted({*counts, *opened}))

    def _derived(self, ids: Collection[str], tenant: str | None) -> tuple[str, ...]:
        """Return the tenant's own trajectories that a memory made of these was told to."""
        gone = frozenset(ids)
        if not gone:
            return ()
        bank = self._bank if tenant is None else self._bank.seen_by([tenant])
        return tuple(t.id for t in bank if t.id not in gone and _sources(t) & gone)

    def _delete(self, ids: Collection[str]) -> bool:
        return not ids or self._bank.delete(ids=ids).is_erased

    def _proof(self, wish: Wish, ids: Sequence[str], found: Sequence[Trajectory]) -> Proof:
        gone = frozenset(ids)
        problems = [f"{problem.where}: {problem.found}" for problem in self._bank.forgotten(ids).problems]
        problems += [f"session {session.id} is stored" for session in self._sessions_of(wish)]
        tasks = [Task(id=f"forgotten {t.id}", domain=t.task.domain, text=f"{t.task.text} ") for t in found[:_SEARCHES]]
        if tasks:
            for hits in self._bank.search_many(tasks, k=_NEAREST):
                problems += [f"a search finds {hit.trajectory.id}" for hit in hits if hit.trajectory.id in gone]
        return Proof(tuple(problems), len(tasks), self._kept(gone))


def _pool_of(trajectory: Trajectory) -> str:
    tenant = "" if trajectory.origin is None else trajectory.origin.tenant
    return "" if tenant == UNJUDGED else tenant


def _sources(trajectory: Trajectory) -> frozenset[str]:
    return frozenset(source for message in trajectory.messages for source in message.recalled.sources)


def _plain(value: object) -> JsonValue:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    assert value is None or isinstance(value, str | int | float | bool)
    return value
