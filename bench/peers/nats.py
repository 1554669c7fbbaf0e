"""NATS: what is said carries an inbox, each member publishes to it, and the sender counts."""

from __future__ import annotations

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from peers import api
from peers.processes import Processes, free_port, wait_for_port

SERVER = "nats-server"
SAID, CAST, CALLED = "said", "cast", "called"


def serve(processes: Processes) -> str:
    port = free_port()
    processes.start(SERVER, "-a", "127.0.0.1", "-p", str(port), quiet=True)
    wait_for_port(port)
    return f"nats://127.0.0.1:{port}"


class Clients(api.Clients):
    async def join(self, number: int) -> None:
        session = await self._connect()

        async def acknowledge(message: Msg) -> None:
            await session.publish(message.reply)

        async def count(message: Msg) -> None:
            self.delivered.add()

        await session.subscribe(SAID, cb=acknowledge)
        await session.subscribe(CAST, cb=count)
        await session.flush()

    async def open_sender(self) -> None:
        self._session = await self._connect()
        self._inbox = self._session.new_inbox()
        self._acknowledged = api.Count()

        async def count(message: Msg) -> None:
            self._acknowledged.add()

        await self._session.subscribe(self._inbox, cb=count)
        await self._session.flush()

    async def say(self) -> None:
        done = self._acknowledged.expect(self.members)
        await self._session.publish(SAID, api.MESSAGE, reply=self._inbox)
        await done

    async def cast(self) -> None:
        await self._session.publish(CAST, api.MESSAGE)

    async def open_answerer(self) -> None:
        session = await self._connect()

        async def answer(message: Msg) -> None:
            await session.publish(message.reply, message.data)

        await session.subscribe(CALLED, cb=answer)
        await session.flush()

    async def open_caller(self, number: int) -> api.Call:
        session = await self._connect()

        async def call(data: bytes) -> bytes:
            return (await session.request(CALLED, data, timeout=10)).data

        return call

    async def _connect(self) -> Client:
        return await nats.connect(self.urls[0], allow_reconnect=False)
