"""Ports that our servers take: their answers leave at once, in however many pieces they are written."""

import asyncio
import socket
from types import SimpleNamespace

from latentmem.errors import ServingError
from latentmem.listening import take_port
from latentmem.serving.programs.desk import ProgramDesk
from latentmem.serving.programs.host import ProgramHost


def test_connections_at_a_taken_port_send_each_piece_at_once():
    async def accepted(listener):
        found = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda _, writer: found.set_result(writer), sock=listener)
        _, writer = await asyncio.open_connection(*listener.getsockname())
        theirs = await found
        is_at_once = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for each in (writer, theirs):
            each.close()
            await each.wait_closed()
        server.close()
        return is_at_once

    assert asyncio.run(accepted(take_port("127.0.0.1", 0, ServingError)))


def test_programs_that_are_played_are_answered_at_once():
    host = ProgramHost(ProgramDesk(lambda: None, ()))
    host.open(SimpleNamespace(id="episode", token="token"))
    try:
        (server,) = host._server.servers
        assert [listener.proto for listener in server.sockets] == [socket.IPPROTO_TCP]
    finally:
        host.close()
