"""middlecon with its public client."""

from __future__ import annotations

import asyncio
import os

from peers import api
from peers.processes import PYTHON, Processes, free_port, wait_for_port
from tabane.middlecon import Client, Message, Presence, connect

NAMES = f"{os.getpid()}-"
ANSWERER = "answerer"


def serve(processes: Processes, *, pure: bool = False) -> str:
    """A hub on TCP; `pure` without its optional module in C."""
    port = free_port()
    serve_at(processes, f"tcp://127.0.0.1:{port}", pure=pure)
    wait_for_port(port)
    return f"tcp://127.0.0.1:{port}"


def serve_unix(processes: Processes) -> str:
    """A hub on a unix socket (and on TCP, which nobody uses, to see that it is there)."""
    port, path = free_port(), processes.scratch / f"hub-{len(processes)}"
    serve_at(processes, f"unix://{path}", f"tcp://127.0.0.1:{port}")
    wait_for_port(port)
    return f"unix://{path}"


def serve_three(processes: Processes) -> str:
    """Three hubs, each linked to the others."""
    urls = {f"hub-{number}": f"tcp://127.0.0.1:{free_port()}" for number in range(3)}
    for name, url in urls.items():
        others = [f"{peer}={where}" for peer, where in urls.items() if peer != name]
        hub = processes.start(*PYTHON, "peers.linked_hub", name, url, *others)
        assert hub.read_line() == "listening"
    return ",".join(urls.values())


def serve_at(processes: Processes, *urls: str, pure: bool = False) -> int:
    """A hub's process id."""
    listen = [word for url in urls for word in ("--listen", url)]
    env = {"TABANE_MIDDLECON_PURE": "1"} if pure else {}
    return processes.start(*PYTHON, "tabane.middlecon", "serve", *listen, env=env).pid


class Clients(api.Clients):
    async def join(self, number: int) -> None:
        me = await connect(self.url(number), name=f"{NAMES}{number}")
        room = await me.join(api.ROOM, watch=False)

        @room.on_message
        def acknowledge(message: Message) -> None:
            if not message.wants_ack:
                self.delivered.add()

    async def open_sender(self) -> None:
        """Returns once the hub knows all members, those behind links too."""
        self._me = await connect(self.url(0), name=f"{NAMES}sender")
        self._room = await self._me.join(api.ROOM, member=False, watch=True)
        everybody = asyncio.Event()

        @self._room.on_presence
        def count(presence: Presence | None = None) -> None:
            if len(self._room.members) == self.members:
                everybody.set()

        count()
        await everybody.wait()
        self._room.leave()
        self._room = await self._me.join(api.ROOM, member=False, watch=False)

    async def say(self) -> None:
        receipt = await self._room.say(api.MESSAGE)
        if len(receipt.acknowledged) != self.members:
            raise RuntimeError(f"not all of {self.members} have acknowledged: {receipt}")

    async def cast(self) -> None:
        await self._room.cast(api.MESSAGE)

    async def open_answerer(self) -> None:
        self._me = await connect(self.url(0), name=ANSWERER)
        self._me.on_message(lambda message: message.data)

    async def open_caller(self, number: int) -> api.Call:
        caller: Client = await connect(self.url(number), name=f"{NAMES}{number}")
        return lambda data: caller.call(ANSWERER, data)
