"""mosquitto: each member publishes to the sender's topic, and the sender counts. QoS 1 all the way:
broker and clients confirm every hop to each other as well."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from gmqtt import Client
from gmqtt.mqtt.constants import MQTTv311

from peers import api
from peers.processes import Processes, free_port, wait_for_port

SERVER = "mosquitto"
SAID, CAST, ACKNOWLEDGED, CALLED, ANSWERED = "said", "cast", "acknowledged", "called", "answered"
KEEPALIVE_S = 3600

CONFIG = """\
user root
listener {port} 127.0.0.1
allow_anonymous true
persistence false
log_dest stderr
log_type error
set_tcp_nodelay true
max_inflight_messages 0
max_queued_messages 0
"""

OnMessage = Callable[[Client, str, bytes], None]


def serve(processes: Processes) -> str:
    port, config = free_port(), processes.scratch / "mosquitto.conf"
    config.write_text(CONFIG.format(port=port))
    processes.start(SERVER, "-c", str(config), quiet=True)
    wait_for_port(port)
    return f"mqtt://127.0.0.1:{port}"


class Clients(api.Clients):
    qos = 1

    async def join(self, number: int) -> None:
        def act(session: Client, topic: str, data: bytes) -> None:
            if topic == SAID:
                session.publish(ACKNOWLEDGED, b"", qos=self.qos)
            else:
                self.delivered.add()

        await self._open(f"member-{number}", act, SAID, CAST)

    async def open_sender(self) -> None:
        self._acknowledged = api.Count()

        def act(session: Client, topic: str, data: bytes) -> None:
            self._acknowledged.add()

        self._session = await self._open("sender", act, ACKNOWLEDGED)

    async def say(self) -> None:
        done = self._acknowledged.expect(self.members)
        self._session.publish(SAID, api.MESSAGE, qos=self.qos)
        await done

    async def cast(self) -> None:
        self._session.publish(CAST, api.MESSAGE)

    async def open_answerer(self) -> None:
        def act(session: Client, topic: str, data: bytes) -> None:
            session.publish(f"{ANSWERED}/{topic.partition('/')[2]}", data, qos=self.qos)

        await self._open("answerer", act, f"{CALLED}/+")

    async def open_caller(self, number: int) -> api.Call:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def act(session: Client, topic: str, data: bytes) -> None:
            answer.set_result(data)

        session = await self._open(f"caller-{number}", act, f"{ANSWERED}/{number}")

        async def call(data: bytes) -> bytes:
            nonlocal answer
            answer = asyncio.get_running_loop().create_future()
            session.publish(f"{CALLED}/{number}", data, qos=self.qos)
            return await answer

        return call

    async def _open(self, name: str, act: OnMessage, *topics: str) -> Client:
        """Returns once the broker has the subscriptions."""
        subscribed = api.Count()
        all_of_them = subscribed.expect(len(topics))

        def on_message(session: Client, topic: str, data: bytes, *_: Any) -> int:
            act(session, topic, data)
            return 0

        session = Client(f"{name}-{os.getpid()}")
        session.on_message = on_message
        session.on_subscribe = lambda *_: subscribed.add()
        port = int(self.urls[0].rpartition(":")[2])
        await session.connect("127.0.0.1", port, keepalive=KEEPALIVE_S, version=MQTTv311)
        for topic in topics:
            session.subscribe(topic, qos=self.qos)
        await all_of_them
        return session
