"""One request over HTTP that ends at one moment, whatever the other side does; only the standard library is used.

Each request has a fresh connection. Proxies in the environment are ignored, because the servers are usually nearby.
"""

import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

_BLOCK = 1 << 16
_OK = 200


class TooLong(Exception):  # noqa: N818 - names what the answer is
    """The answer has more bytes than the caller takes."""


def ask(
    url: str,
    request: bytes | None,
    seconds: float,
    max_bytes: int,
    tls: ssl.SSLContext | None = None,
    opened: Callable[[socket.socket], object] | None = None,
    headers: Mapping[str, str] | None = None,
    take: Callable[[bytes], bool] | None = None,
) -> tuple[int, bytes]:
    """Post a request in JSON, or get the page if there is none; return the status and the whole body of the answer.

    Args:
        url: the address, with its path.
        request: the body to post; None asks with GET.
        seconds: wall-clock limit, from connecting to the last byte.
        max_bytes: the longest answer that is read.
        tls: checks the server's certificate, where the address is of https.
        opened: receives the connection's socket. Another thread may shut it down to end the request early.
        headers: further headers.
        take: gets the body piece by piece as it comes, if the status is 200, and the body that is returned is empty;
            True: no more is needed, and the connection is closed.

    Raises:
        TimeoutError: there is no whole answer in time.
        TooLong: the answer is longer than `max_bytes`.
        OSError: the connection fails; the same holds for `http.client.HTTPException`.
    """
    parts = urlsplit(url)
    if tls is None:
        connection = http.client.HTTPConnection(parts.netloc)
    else:
        connection = http.client.HTTPSConnection(parts.netloc, context=tls)
    with _Wire(connection.host, connection.port, tls, seconds) as wire:
        if opened is not None:
            opened(wire.socket)
        connection.sock = wire
        sent = {"Content-Type": "application/json", "Connection": "close", **(headers or {})}
        connection.request("GET" if request is None else "POST", parts.path or "/", request, sent)
        body = bytearray()
        num_bytes = 0
        with connection.getresponse() as response:
            taken = take if response.status == _OK else None
            while block := response.read1(_BLOCK):
                num_bytes += len(block)
                if num_bytes > max_bytes:
                    raise TooLong(f"the answer is longer than {max_bytes} bytes")
                if taken is None:
                    body += block
                elif taken(block):
                    break
            return response.status, bytes(body)


class _Wire(io.RawIOBase):
    """A connection that ends at one moment, whatever comes over it: a socket's own timeout begins anew at each read.

    To `http.client` it is a socket, and the file that it reads from.
    """

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.socket = self._connect(host, port)
        if tls is not None:
            try:
                self.socket = tls.wrap_socket(self._limited(), server_hostname=host)
            except BaseException:
                self.socket.close()
                raise

    def _connect(self, host: str, port: int) -> socket.socket:
        error: OSError = OSError(f"no address of {host}")
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            self.socket = socket.socket(family, kind, protocol)
            try:
                self._limited().connect(address)
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as found:
                self.socket.close()
                error = found
            else:
                return self.socket
        raise error

    def _limited(self) -> socket.socket:
        """The socket, for as long as is left."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self.socket.settimeout(seconds)
        return self.socket

    def sendall(self, data: bytes) -> None:
        """Send it."""
        self._limited().sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What answers are read from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Take what comes next."""
        return self._limited().recv_into(buffer)

    def close(self) -> None:
        """Do nothing: `http.client` closes what it was given before it has read the answer."""

    def __exit__(self, *_: object) -> None:
        """Let go of the connection."""
        self.socket.close()
