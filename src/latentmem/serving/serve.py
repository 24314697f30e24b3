"""The process of a server: it opens its port last, and ends without losing what it acknowledged.

On SIGTERM or SIGINT it takes no more requests (503 with Retry-After), lets those in flight end, and exits with status
0. A second signal ends it at once: what was acknowledged is on stable storage already.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from latentmem.errors import ServingError
from latentmem.listening import BACKLOG, listen, no_port

try:
    import uvicorn
    from starlette.types import ASGIApp
except ImportError as error:
    raise ServingError(f"serving needs the package {error.name}; pip install 'latentmem[serve]'") from None

from latentmem.serving.desk import ServingDesk

_FLUSH_SECONDS = 10
"""How long connections have to take what is left when all requests have ended."""


def run(app: ASGIApp, desk: ServingDesk, listener: socket.socket, host: str, announce: Callable[[str], object]) -> None:
    """Answer requests until a signal comes.

    Args:
        app: the application.
        desk: the desk behind it.
        listener: a socket that is bound but does not listen yet.
        host: the address as the user gave it.
        announce: called once it can answer, with its address.

    Raises:
        ServingError: the port cannot be listened on.
    """
    taken = listener.getsockname()[1]
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise no_port(host, taken, error, ServingError) from None
    shown = f"[{host}]" if ":" in host else host
    asyncio.run(_run(app, desk, listener, lambda: announce(f"http://{shown}:{taken}")))


async def _run(app: ASGIApp, desk: ServingDesk, listener: socket.socket, announce: Callable[[], object]) -> None:
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        backlog=BACKLOG,
        server_header=False,
    )
    server = _Server(config, announce)
    endings: list[asyncio.Task[None]] = []

    async def end() -> None:
        await desk.drain()
        server.should_exit = True

    def on_signal(number: int) -> None:
        if endings:
            os._exit(128 + number)
        endings.append(asyncio.create_task(end()))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await listen(server, listener)
    if not server.started:
        raise ServingError("the server could not be started; its log tells why")


class _Server(uvicorn.Server):
    """A server that leaves signals to us, and tells when it can answer."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], object]) -> None:
        super().__init__(config)
        self._announce = announce

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        if self.started:
            self._announce()
