"""Redis pub/sub: each member publishes into the sender's channel, and the sender counts."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import AbstractConnection

from peers import api
from peers.processes import Processes, free_port, wait_for_port

SERVER = "redis-server"
SAID, ACKNOWLEDGED = "said", "acknowledged"
SETTINGS = {
    "bind": "127.0.0.1",
    "save": "",
    "appendonly": "no",
    "maxclients": "15000",
    "tcp-backlog": "4096",
    "client-output-buffer-limit": "pubsub 0 0 0",
}


def serve(processes: Processes) -> str:
    port = free_port()
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    here = ("--port", str(port), "--dir", str(processes.scratch))
    processes.start(SERVER, *here, *words, quiet=True)
    wait_for_port(port)
    return f"redis://127.0.0.1:{port}"


class Clients(api.Clients):
    """With RESP 3 one connection can listen and publish, once replies are switched off."""

    def __init__(self, url: str, members: int) -> None:
        super().__init__(url, members)
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self, number: int) -> None:
        session, connection = await self._listen(SAID)
        acknowledgement = connection.pack_command("PUBLISH", ACKNOWLEDGED, b"")

        async def acknowledge() -> None:
            while True:
                if await session.get_message(ignore_subscribe_messages=True, timeout=None):
                    await connection.send_packed_command(acknowledgement)

        self._tasks.append(asyncio.create_task(acknowledge()))

    async def open_sender(self) -> None:
        session, self._connection = await self._listen(ACKNOWLEDGED)
        self._message = self._connection.pack_command("PUBLISH", SAID, api.MESSAGE)
        self._acknowledged = api.Count()

        async def count() -> None:
            while True:
                if await session.get_message(ignore_subscribe_messages=True, timeout=None):
                    self._acknowledged.add()

        self._tasks.append(asyncio.create_task(count()))

    async def say(self) -> None:
        done = self._acknowledged.expect(self.members)
        await self._connection.send_packed_command(self._message)
        await done

    async def _listen(self, channel: str) -> tuple[PubSub, AbstractConnection]:
        """Returns once the server has the subscription."""
        session = Redis.from_url(self.urls[0], protocol=3).pubsub()
        await session.connect()
        await session.connection.send_command("CLIENT", "REPLY", "OFF")
        await session.subscribe(channel)
        while (message := await session.get_message(timeout=10)) is not None:
            if message["type"] == "subscribe":
                return session, session.connection
        raise RuntimeError(f"Redis does not confirm the subscription to {channel}")
