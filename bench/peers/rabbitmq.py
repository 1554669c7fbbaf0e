"""RabbitMQ: a fanout exchange with a queue for each member, a queue for what they send back, and
the sender counts. Nothing is stored on disk, and nobody confirms to the broker."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import aiormq
from aiormq.abc import AbstractChannel, DeliveredMessage

from peers import api
from peers.processes import Processes, free_port, wait_for_port

SERVER = "rabbitmq-server"
SCRIPT = "/usr/lib/rabbitmq/bin/rabbitmq-server"
"""What Debian's command of that name runs, after changing to its own user and directories."""
EXCHANGE, ACKNOWLEDGED = "said", "acknowledged"
HEARTBEAT_S = 600

CONFIG = """\
listeners.tcp.local = 127.0.0.1:{port}
tcp_listen_options.backlog = 4096
tcp_listen_options.nodelay = true
loopback_users.guest = true
vm_memory_high_watermark.relative = 0.8
disk_free_limit.absolute = 1MB
"""

OnMessage = Callable[[DeliveredMessage], Awaitable[None]]


def serve(processes: Processes) -> str:
    port, epmd_port, home = free_port(), free_port(), processes.scratch
    (home / "rabbitmq.conf").write_text(CONFIG.format(port=port))
    (home / "plugins").write_text("[].")
    for name in ("rabbitmq.conf", "plugins"):
        (home / name).chmod(0o644)
    erlang = {"ERL_EPMD_PORT": str(epmd_port), "ERL_EPMD_ADDRESS": "127.0.0.1", "HOME": str(home)}
    processes.start(
        "epmd", "-port", str(epmd_port), "-address", "127.0.0.1", env=erlang, quiet=True
    )
    wait_for_port(epmd_port)
    settings = {
        "RUNNING_UNDER_SYSTEMD": "true",  # without a shell between this process and the server
        "RABBITMQ_NODENAME": f"bench{os.getpid()}@localhost",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
        "RABBITMQ_MNESIA_BASE": str(home / "data"),
        "RABBITMQ_LOG_BASE": str(home),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(home / "generated"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
    }
    processes.start(SCRIPT, env=erlang | settings, quiet=True)
    wait_for_port(port)
    return f"amqp://guest:guest@127.0.0.1:{port}/"


class Clients(api.Clients):
    async def join(self, number: int) -> None:
        channel = await self._open()

        async def acknowledge(message: DeliveredMessage) -> None:
            await channel.basic_publish(b"", routing_key=ACKNOWLEDGED, wait=False)

        await channel.exchange_declare(EXCHANGE, exchange_type="fanout")
        queue = await self._listen(channel, "", acknowledge)
        await channel.queue_bind(queue, EXCHANGE)

    async def open_sender(self) -> None:
        self._channel = await self._open()
        self._acknowledged = api.Count()

        async def count(message: DeliveredMessage) -> None:
            self._acknowledged.add()

        await self._listen(self._channel, ACKNOWLEDGED, count)

    async def say(self) -> None:
        done = self._acknowledged.expect(self.members)
        await self._channel.basic_publish(api.MESSAGE, exchange=EXCHANGE, wait=False)
        await done

    async def _open(self) -> AbstractChannel:
        connection = await aiormq.connect(f"{self.urls[0]}?heartbeat={HEARTBEAT_S}")
        return await connection.channel(publisher_confirms=False)

    async def _listen(self, channel: AbstractChannel, name: str, act: OnMessage) -> str:
        """A queue of this connection alone."""
        declared = await channel.queue_declare(name, exclusive=True)
        assert declared.queue is not None
        await channel.basic_consume(declared.queue, act, no_ack=True)
        return declared.queue
