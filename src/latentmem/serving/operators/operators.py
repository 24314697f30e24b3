"""What an operator puts around a desk and an application: keys, limits, audit, metrics and logs, as one part.

`watched` goes around the desk, `gate` around the whole application, `routes` into it. All take their facts from the
visit, so a figure, a line of the log and a line of the audit about one request agree.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from threading import Lock

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from latentmem.errors import AuditError
from latentmem.serving.asks import Desk, Who
from latentmem.serving.operators.audit import AuditLog
from latentmem.serving.operators.gate import Gate, SessionOf, caller_of
from latentmem.serving.operators.keys import Keys
from latentmem.serving.operators.limits import Limits
from latentmem.serving.operators.logs import RequestLog
from latentmem.serving.operators.metrics import CONTENT_TYPE, Metrics
from latentmem.serving.operators.visits import Visit, current
from latentmem.serving.operators.watching import Told, WatchedDesk

logger = logging.getLogger(__name__)

_REFUSALS_PER_MINUTE = 60
"""Refusals that the audit tells one by one; more are counted, else whoever is refused could fill the disk."""


class Operators:
    """Everything that watches one server."""

    def __init__(
        self, keys: Keys, audit: AuditLog, log: RequestLog, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the keys, and where to write to."""
        self.keys = keys
        self.audit = audit
        self.log = log
        self.limits = Limits(clock)
        self.metrics = Metrics()
        self._refusals = _Refusals(audit, clock)

    def gate(self, app: ASGIApp, session_of: SessionOf = lambda token: None) -> Gate:
        """Return the application behind a gate.

        Args:
            app: the application.
            session_of: finds a session by its own token.
        """
        return Gate(app, self.keys, self.limits, session_of, self._ended)

    def watched(self, desk: Desk) -> WatchedDesk:
        """Return the desk with somebody who keeps the books."""
        return WatchedDesk(desk, self.limits.spent, self._recalled, self.metrics.lost, self.log.detail == "texts")

    async def authenticate(self, request: Request) -> Who:
        """Return whose a request is; it has passed the gate."""
        caller = caller_of(request.scope)
        return Who(tenant=caller.tenant, key=caller.key, session=caller.session)

    def shares(self, who: Who) -> bool:
        """Return whether the judged episodes of who asks now go to the common pool."""
        visit = current.get()
        return not who.tenant or (visit is not None and visit.caller.shares)

    def routes(self) -> APIRouter:
        """Return the routes of operators."""
        router = APIRouter(tags=["operators"])

        @router.get("/metrics", response_class=PlainTextResponse)
        async def metrics() -> Response:
            """Tell the figures of this server as Prometheus reads them."""
            return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

        return router

    def close(self) -> None:
        """Write the refusals that were only counted, and close the files."""
        self._refusals.flush()
        self.keys.close()
        self.audit.close()

    def _recalled(self, told: Told) -> None:
        self.audit.append("recalled", {**asdict(told), "sources": list(told.sources)})

    def _ended(self, visit: Visit) -> None:
        self.metrics.observe(visit)
        self.log.write(visit)
        if visit.status in (401, 403, 429):
            self._refusals.add(visit)


class _Refusals:
    """Tells the audit of refusals, so many a minute; of the others only their number."""

    def __init__(self, audit: AuditLog, clock: Callable[[], float]) -> None:
        self._audit = audit
        self._clock = clock
        self._lock = Lock()
        self._since = clock()
        self._told = 0
        self._left_out = 0

    def add(self, visit: Visit) -> None:
        """Tell of one."""
        with self._lock:
            if self._clock() - self._since >= 60:
                self._begin_anew()
            if self._told >= _REFUSALS_PER_MINUTE:
                self._left_out += 1
                return
            self._told += 1
            caller = visit.caller
            self._append(
                {"status": visit.status, "route": visit.route, "tenant": caller.tenant, "key": caller.key,
                 "reason": visit.reason}
            )  # fmt: skip

    def flush(self) -> None:
        """Tell the number of those that were left out."""
        with self._lock:
            self._begin_anew()

    def _begin_anew(self) -> None:
        if self._left_out:
            self._append({"left out": self._left_out})
        self._since, self._told, self._left_out = self._clock(), 0, 0

    def _append(self, told: dict[str, str | int]) -> None:
        try:
            self._audit.append("refused", dict(told))
        except AuditError as error:  # what is refused stays refused
            logger.warning("%s", error)
