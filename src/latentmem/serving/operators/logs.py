"""A line of JSON for each request, for whatever collects logs; without what was said, unless that is asked for."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from threading import Lock
from typing import Literal, TextIO

from latentmem.outside import one_line
from latentmem.serving.operators.visits import Visit

Detail = Literal["none", "requests", "texts"]
"""What is logged: nothing, the figures of each request, or also its texts."""


class RequestLog:
    """Writes a line for each request that has ended."""

    def __init__(self, stream: TextIO, detail: Detail = "requests", clock: Callable[[], float] = time.time) -> None:
        """Write to an open stream."""
        self.detail = detail
        self._stream = stream
        self._clock = clock
        self._lock = Lock()

    def write(self, visit: Visit) -> None:
        """Write one line; a stream that takes no more lines, as on a full disk, is no reason to refuse requests."""
        if self.detail == "none":
            return
        line = json.dumps(self._told(visit), ensure_ascii=True, allow_nan=False)
        with self._lock:
            try:
                self._stream.write(f"{line}\n")
                self._stream.flush()
            except (OSError, ValueError):
                return

    def _told(self, visit: Visit) -> dict[str, object]:
        told: dict[str, object] = {
            "time": datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
            "request": visit.id,
            "method": visit.method,
            "route": visit.route,
            "status": visit.status,
            "seconds": round(visit.seconds, 4),
            "key": visit.caller.key,
            "tenant": visit.caller.tenant,
        }
        if visit.reason:
            told["reason"] = one_line(visit.reason)
        if visit.calls:
            told |= {
                "session": one_line(visit.session),
                "role": one_line(visit.role),
                "calls": visit.calls,
                "tokens": {
                    "prompt": visit.prompt_tokens,
                    "cached": visit.kept_tokens,
                    "latent": visit.latent_tokens,
                    "generated": visit.generated_tokens,
                },
                "recalled": visit.recalled,
                "sources": list(visit.sources),
            }
        if visit.timings is not None:
            told["parts"] = {part: round(seconds, 4) for part, seconds in asdict(visit.timings).items()}
        if self.detail == "texts" and visit.texts:
            told["texts"] = visit.texts
        return told
