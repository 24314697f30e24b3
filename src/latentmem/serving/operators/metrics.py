"""Figures of a running server for Prometheus, in a registry of their own.

Labels take few values, and none that a client chooses: routes are templates, unknown ones are one, tenants are named by
the operator and counted apart up to a bound. What exists elsewhere, such as the length of the queue, is asked for when
it is read.
"""

from collections.abc import Callable, Mapping
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from latentmem.serving.operators.visits import Visit

MAX_TENANTS = 100
"""Tenants with figures of their own; further ones are counted as `other`."""
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Reads = Callable[[], float | Mapping[str, float]]
"""A function that tells a figure as it is now, or several by the value of its one label."""


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        """Begin at zero."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._now = _Now()
        self._registry.register(self._now)
        self._tenants: set[str] = set()
        self._lock = Lock()
        registry = self._registry
        self._requests = Counter(
            "latentmem_requests", "Requests that were answered", ["method", "route", "status"], registry=registry
        )
        self._took = Histogram(
            "latentmem_request_seconds",
            "From a request to the end of its answer",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._parts = Histogram(
            "latentmem_part_seconds",
            "Recall, composing, queue and generation of an answer",
            ["part"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._tokens = Counter(
            "latentmem_tokens", "Tokens of prompts, latents and responses", ["kind", "tenant"], registry=registry
        )
        self._cached = Counter(
            "latentmem_cached_prompt_tokens",
            "Tokens of prompts that were kept from earlier ones, and not read again",
            ["tenant"],
            registry=registry,
        )
        self._refused = Counter("latentmem_refused", "Requests that were refused", ["status"], registry=registry)
        self._lost = Counter("latentmem_lost_calls", "Requests for a response that got none", registry=registry)
        self._recalls = Counter("latentmem_recalls", "Answers by the kind of memory", ["memory"], registry=registry)

    def reads(self, name: str, text: str, read: Reads, label: str | None = None) -> None:
        """Add a figure that is asked for when the metrics are read.

        Args:
            name: its name, without the prefix.
            text: what it is.
            read: returns it; several by the value of their label if there is a `label`. One that raises is left out.
            label: name of the label, whose values are few.
        """
        self._now.add(f"latentmem_{name}", text, read, label)

    def observe(self, visit: Visit) -> None:
        """Count a request that has ended."""
        self._requests.labels(visit.method, visit.route, str(visit.status)).inc()
        self._took.labels(visit.route).observe(visit.seconds)
        if visit.status in (401, 403, 413, 429, 503):
            self._refused.labels(str(visit.status)).inc()
        if visit.timings is not None:
            for part in ("recall", "composing", "queue", "generation"):
                self._parts.labels(part).observe(getattr(visit.timings, part))
        if visit.recalled:
            self._recalls.labels(visit.recalled).inc()
        tenant = self._named(visit.caller.tenant)
        for kind in ("prompt", "latent", "generated"):
            if tokens := getattr(visit, f"{kind}_tokens"):
                self._tokens.labels(kind, tenant).inc(tokens)
        if visit.kept_tokens:
            self._cached.labels(tenant).inc(visit.kept_tokens)

    def lost(self) -> None:
        """Count a call that got no answer."""
        self._lost.inc()

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self._registry)

    def _named(self, tenant: str) -> str:
        with self._lock:
            if tenant in self._tenants or len(self._tenants) < MAX_TENANTS:
                self._tenants.add(tenant)
                return tenant
        return "other"


class _Now(Collector):
    """Figures that are asked for when they are read."""

    def __init__(self) -> None:
        self._figures: list[tuple[str, str, Reads, str | None]] = []

    def add(self, name: str, text: str, read: Reads, label: str | None) -> None:
        self._figures.append((name, text, read, label))

    def describe(self) -> list[GaugeMetricFamily]:
        return [GaugeMetricFamily(name, text) for name, text, _, _ in self._figures]

    def collect(self) -> list[GaugeMetricFamily]:
        families = []
        for name, text, read, label in self._figures:
            try:
                found = read()
            except Exception:  # noqa: S112 - what cannot be told now, such as of a locked bank, is no reason for no metrics
                continue
            family = GaugeMetricFamily(name, text, labels=[label] if label else None)
            values = found if isinstance(found, Mapping) else {"": found}
            for value, figure in values.items():
                family.add_metric([value] if label else [], figure)
            families.append(family)
        return families
