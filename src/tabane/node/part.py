"""What Tabane's own processes have in common: sockets from the holder, a loop, an orderly end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from tabane.node.config import NodeConfig, load_node
from tabane.supervise import Supervisor


def inherited_sockets() -> dict[str, socket.socket]:
    """The listening sockets from the holder, by name (`TABANE_SOCKETS=http=100,forward=101`)."""
    given = os.environ.pop("TABANE_SOCKETS", "")
    pairs = [entry.split("=") for entry in given.split(",") if entry]
    return {name: socket.socket(fileno=int(number)) for name, number in pairs}


Close = Callable[[], Awaitable[None]]
Serve = Callable[[NodeConfig, dict[str, socket.socket], Supervisor], Awaitable[Close]]
"""Starts a part and returns how to end it."""


def run_part(serve: Serve) -> None:
    """Run a part of a node (`python -m tabane.node.PART CONFIG.json`) until TERM."""
    import uvloop

    name = os.environ.get("TABANE_PART", Path(sys.argv[0]).stem)
    show_name(name)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s",
    )
    uvloop.run(_main(serve, load_node(Path(sys.argv[1])), name))


def show_name(part: str) -> None:
    """Be `tabane-PART` in `ps`, rather than one of many called python; without a number, as the
    kernel keeps 15 bytes."""
    Path("/proc/self/comm").write_text("tabane-" + part.partition("-")[0])


async def _main(serve: Serve, config: NodeConfig, name: str) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with Supervisor(name) as tasks:
        end = await serve(config, inherited_sockets(), tasks)
        for number in (signal.SIGTERM, signal.SIGINT):  # before that, they just end it
            loop.add_signal_handler(number, ending.set)
        gc.collect()
        gc.freeze()  # what is loaded now stays: no collection need look at it again
        logging.info("serving")
        await ending.wait()
        await end()
