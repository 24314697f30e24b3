"""How much one key may ask for: requests and tokens a minute, and requests at the same time.

A bucket holds what may be used at once, a minute's worth, and fills steadily. What a request costs in tokens is known
only when it is answered, so it is let in while the bucket is not empty, and its tokens are taken afterwards; the bucket
may then be in debt. A refusal says after how many seconds the same request would be let in.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

from latentmem.serving.asks import Refused
from latentmem.serving.operators.keys import Key

_BUSY_SECONDS = 1.0
"""After how long to try again where all places are taken: nobody can know when one is free."""


@dataclass
class _Bucket:
    """What one key may still use."""

    per_minute: int
    level: float
    at: float

    def fill(self, now: float) -> None:
        self.level = min(float(self.per_minute), self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def seconds_until(self, wanted: float) -> float:
        return max(0.0, (wanted - self.level) * 60 / self.per_minute)


@dataclass
class _Use:
    buckets: dict[str, _Bucket] = field(default_factory=dict)
    at_once: int = 0


class Limits:
    """What the keys of one server have used lately. Threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with full buckets."""
        self._clock = clock
        self._lock = Lock()
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def admitted(self, key: Key) -> Iterator[None]:
        """Count one request of a key as long as the block runs, however it ends.

        Raises:
            Refused: 429; the key is at one of its limits.
        """
        with self._lock:
            use = self._uses.setdefault(key.id, _Use())
            now = self._clock()
            requests = self._bucket(use, "requests", key.requests_per_minute, now)
            tokens = self._bucket(use, "tokens", key.tokens_per_minute, now)
            if key.parallel is not None and use.at_once >= key.parallel:
                raise Refused(429, f"this key may ask for {key.parallel} answers at once", retry_after=_BUSY_SECONDS)
            if requests is not None and requests.level < 1:
                raise Refused(
                    429,
                    f"this key may send {requests.per_minute} requests a minute",
                    retry_after=requests.seconds_until(1),
                )
            if tokens is not None and tokens.level <= 0:
                raise Refused(
                    429,
                    f"this key may use {tokens.per_minute} tokens a minute",
                    retry_after=tokens.seconds_until(min(1.0, tokens.per_minute)),
                )
            if requests is not None:
                requests.level -= 1
            use.at_once += 1
        try:
            yield
        finally:
            with self._lock:
                use.at_once -= 1

    def spent(self, key_id: str, tokens: int) -> None:
        """Take tokens that a key has used; a key without that limit has nothing to take them from."""
        with self._lock:
            use = self._uses.get(key_id)
            bucket = use.buckets.get("tokens") if use else None
            if bucket is not None:
                bucket.fill(self._clock())
                bucket.level -= tokens

    def at_once(self, key_id: str) -> int:
        """Return how many requests of a key are being answered."""
        with self._lock:
            return self._uses[key_id].at_once if key_id in self._uses else 0

    def _bucket(self, use: _Use, name: str, per_minute: int | None, now: float) -> _Bucket | None:
        if per_minute is None:
            use.buckets.pop(name, None)
            return None
        bucket = use.buckets.get(name)
        if bucket is None or bucket.per_minute != per_minute:
            bucket = use.buckets[name] = _Bucket(per_minute, float(per_minute), now)
        bucket.fill(now)
        return bucket
