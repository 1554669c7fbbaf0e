"""gRPC: the sender is the server, and each member has a stream both ways to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from peers import api
from peers.processes import Processes, free_port

SERVER = ""
SERVICE, METHOD = "bench.Room", "Join"
OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each member
    ("grpc.keepalive_time_ms", 3_600_000),
)

Context = grpc.aio.ServicerContext


def serve(processes: Processes) -> str:
    """Where the sender will be."""
    return f"127.0.0.1:{free_port()}"


class Clients(api.Clients):
    sender_is_server = True

    def __init__(self, url: str, members: int) -> None:
        super().__init__(url, members)
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self, number: int) -> None:
        channel = grpc.aio.insecure_channel(self.urls[0], options=OPTIONS)
        stream = channel.stream_stream(f"/{SERVICE}/{METHOD}")(wait_for_ready=True)
        await stream.write(b"here")

        async def acknowledge() -> None:
            while await stream.read() is not grpc.aio.EOF:
                await stream.write(b"")

        self._tasks.append(asyncio.create_task(acknowledge()))

    async def open_sender(self) -> None:
        """Returns once all members have a stream."""
        self._streams: list[Context] = []
        self._acknowledged, joined = api.Count(), api.Count()
        everybody = joined.expect(self.members)

        async def join(messages: AsyncIterator[bytes], stream: Context) -> None:
            await stream.read()
            self._streams.append(stream)
            joined.add()
            while await stream.read() is not grpc.aio.EOF:
                self._acknowledged.add()

        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        handlers = {METHOD: grpc.stream_stream_rpc_method_handler(join)}
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_insecure_port(self.urls[0])
        await self._server.start()
        await everybody

    async def say(self) -> None:
        done = self._acknowledged.expect(self.members)
        await asyncio.gather(*(stream.write(api.MESSAGE) for stream in self._streams))
        await done
