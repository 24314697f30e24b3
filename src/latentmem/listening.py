"""What our servers do with a port and its connections: a port is taken before it is opened, and no client holds one up.

Connections that wait for their client too long are ended, and of too many those that have waited longest. A server's
own work is never hurried: while it makes an answer, nobody waits for the client. What the client owes is a
whole request, however slowly it comes, and the taking of its answer.
"""

import asyncio
import errno
import ipaddress
import logging
import resource
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from latentmem.errors import LatentMemError, ServingError

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

BACKLOG = 256
"""Connections that the kernel holds until they are accepted."""
MAX_WAIT_SECONDS = 30.0
MAX_CONNECTIONS = 512
_LOOK_SECONDS = 0.5
_SAID_AGAIN_SECONDS = 60.0


class Patience:
    """Looks after the connections of a server."""

    def __init__(self, server: "uvicorn.Server") -> None:
        """Begin; never are so many connections kept that the process would run out of descriptors."""
        self._server = server
        self._waiting_since: dict[Any, float] = {}
        self._said = -_SAID_AGAIN_SECONDS
        self._most = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    async def keep(self) -> None:
        """Look every now and then, until this is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        """End what has waited too long; once the server is to end, also whoever has not sent a whole request."""
        now = time.monotonic()
        connections = self._server.server_state.connections
        waiting = [connection for connection in connections if _owes(connection) or _takes(connection)]
        self._waiting_since = {each: self._waiting_since.get(each, now) for each in waiting}
        longest_first = sorted(self._waiting_since, key=self._waiting_since.__getitem__)
        num_too_many = max(0, len(connections) - self._most)
        for number, connection in enumerate(longest_first):
            ending = self._server.should_exit and not _takes(connection)
            if ending or number < num_too_many or now - self._waiting_since[connection] > MAX_WAIT_SECONDS:
                connection.transport.abort()

    def complain(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        """Take what the loop has to tell: that descriptors ran out is told now and then, not at each attempt."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(dict(context))
        elif time.monotonic() - self._said >= _SAID_AGAIN_SECONDS:
            self._said = time.monotonic()
            logger.warning("no more connections for a moment (%s); see `ulimit -n`", error.strerror)


def take_port(host: str, port: int, error_class: type[LatentMemError]) -> socket.socket:
    """Return a socket that is bound to the address but does not listen yet.

    Raises:
        LatentMemError: the port is taken or the address is not there; of the given class.
    """
    try:
        # asyncio sends small pieces at once only if the socket names its protocol; else each answer may wait 40 ms.
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise no_port(host, port, error, error_class) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise no_port(host, port, error, error_class) from None
    return listener


def no_port(host: str, port: int, error: OSError, error_class: type[LatentMemError]) -> LatentMemError:
    """Return the error that says why a port cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return error_class(f"port {port} of {host} is taken by another program; give another with --port")
    return error_class(f"cannot listen on {host}, port {port} ({error.strerror}); see --host and --port")


async def listen(server: "uvicorn.Server", listener: socket.socket) -> None:
    """Answer until a signal comes, and look after the connections meanwhile."""
    patience = Patience(server)
    asyncio.get_running_loop().set_exception_handler(patience.complain)
    looking = asyncio.create_task(patience.keep())
    try:
        await server.serve(sockets=[listener])
    finally:
        looking.cancel()


def _owes(connection: Any) -> bool:
    """Whether a client has to send a request, or the rest of one."""
    request = connection.cycle
    return request is None or request.more_body or request.response_complete


def _takes(connection: Any) -> bool:
    """Whether a client has to take what was sent to it."""
    return bool(connection.transport.get_write_buffer_size())


def is_this_machine(host: str) -> bool:
    """Return whether an address can be reached from this machine alone.

    Raises:
        ServingError: there is no such address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServingError(f"serve.host is {host!r}, which is no address here ({error.strerror})") from None
    return all(ipaddress.ip_address(str(each[4][0]).partition("%")[0]).is_loopback for each in found)
