"""Server-sent events: the data of each event, out of bytes that come in any pieces."""

from collections.abc import Iterator

DONE = b"[DONE]"
"""The data of the event that ends a stream of OpenAI's form."""


class Events:
    """Events as they come."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, block: bytes) -> Iterator[bytes]:
        r"""Take the next bytes; yield the data of each event that they complete.

        >>> events = Events()
        >>> list(events.feed(b": hello\ndata: one\r\n\r\nda")), list(events.feed(b"ta:two\ndata: 2\n\ndata: 3"))
        ([b'one'], [b'two\n2'])
        """
        *lines, self._rest = (self._rest + block).split(b"\n")
        for ended in lines:
            line = ended.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                yield data
