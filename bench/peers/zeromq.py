"""ZeroMQ: the sender publishes to all members and pulls what each of them pushes back. There is no
server between them: the sender's process is the one they dial."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

from peers import api
from peers.processes import Processes, free_port

SERVER = ""
SOCKETS = 4096


def serve(processes: Processes) -> str:
    """Where the sender will be: one port to publish on, one to pull from."""
    return f"tcp://127.0.0.1:{free_port()},tcp://127.0.0.1:{free_port()}"


class Clients(api.Clients):
    sender_is_server = True

    def __init__(self, url: str, members: int) -> None:
        super().__init__(url, members)
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, SOCKETS)
        self._sockets: list[zmq.Socket[bytes]] = []

    async def join(self, number: int) -> None:
        said, back = self._socket(zmq.SUB), self._socket(zmq.PUSH)
        said.connect(self.urls[0])
        back.connect(self.urls[1])
        said.subscribe(b"")
        self._on_message(said, lambda message: back.send(b""))

    async def open_sender(self) -> None:
        """Returns once all members have subscribed."""
        self._said, acknowledged = self._socket(zmq.XPUB), self._socket(zmq.PULL)
        self._said.set(zmq.XPUB_VERBOSE, 1)
        self._said.bind(self.urls[0])
        acknowledged.bind(self.urls[1])
        subscribed, self._acknowledged = api.Count(), api.Count()
        everybody = subscribed.expect(self.members)
        self._on_message(self._said, lambda message: subscribed.add())
        self._on_message(acknowledged, lambda message: self._acknowledged.add())
        await everybody

    async def say(self) -> None:
        done = self._acknowledged.expect(self.members)
        self._said.send(api.MESSAGE)
        await done

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        self._sockets.append(socket)
        return socket

    def _on_message(self, socket: zmq.Socket[bytes], act: Callable[[bytes], object]) -> None:
        """The socket's descriptor says once that there is something: all of it is taken then."""

        def drain() -> None:
            try:
                while True:
                    act(socket.recv(zmq.DONTWAIT))
            except zmq.Again:
                return

        loop = asyncio.get_running_loop()
        loop.add_reader(socket.get(zmq.FD), drain)
        loop.call_soon(drain)
