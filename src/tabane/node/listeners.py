"""The listening sockets of apps' TCP ports: they come and go while the node runs, and the holder
has them, so that what connects waits in their backlogs while gateways are away.

The agent says which there shall be; a gateway asks for those it is told of, a line each, one after
the other, at a unix socket for that. All gateways of a node share a port's one socket: what is in
its backlog is not lost with any of them. The standard library only, as in the holder.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Iterable
from pathlib import Path

from tabane.node.parts import bind_socket, explain
from tabane.unix import connect_unix

LONGEST_ADDRESS = 100
THERE, NOT_THERE = b"+", b"-"
TAKE_TIMEOUT_S = 5.0
DESCRIPTOR_BYTES = array.array("i").itemsize


class Listeners:
    """By address, as `10.1.2.3:25`."""

    def __init__(self) -> None:
        self._sockets: dict[str, socket.socket] = {}

    def set(self, addresses: Iterable[str]) -> dict[str, str]:
        """Listen at these, and no others; returns why where it is impossible. Idempotent. Who waits
        in the backlog of one that goes is reset by the kernel, once no gateway has it either."""
        wanted = set(addresses)
        for address in self._sockets.keys() - wanted:
            self._sockets.pop(address).close()
        problems = {}
        for address in sorted(wanted - self._sockets.keys()):
            try:
                entry = {"kind": "tcp", "address": address, "freebind": True}
                self._sockets[address] = bind_socket(entry)
            except OSError as error:
                problems[address] = explain(error)
        return problems

    def hand_over(self, client: socket.socket) -> bool:
        """Answer one request of a gateway with the socket it names; False: it has left."""
        line = client.recv(LONGEST_ADDRESS)
        if not line:
            return False
        found = self._sockets.get(line.decode(errors="replace").rstrip("\n"))
        if found is None:
            client.send(NOT_THERE)
        else:
            rights = array.array("i", [found.fileno()])
            client.sendmsg([THERE], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        return True


def take_listeners(path: Path, addresses: Iterable[str]) -> dict[str, socket.socket]:
    """Those of a holder's sockets that are there. Blocks for as long as the holder takes. Raises
    `OSError`."""
    taken: dict[str, socket.socket] = {}
    try:
        with connect_unix(path, TAKE_TIMEOUT_S) as holder:
            for address in addresses:
                if (sock := _take(holder, address)) is not None:
                    taken[address] = sock
    except BaseException:
        for sock in taken.values():
            sock.close()
        raise
    return taken


def _take(holder: socket.socket, address: str) -> socket.socket | None:
    holder.sendall(f"{address}\n".encode())
    space = socket.CMSG_LEN(DESCRIPTOR_BYTES)
    answer, rights, _, _ = holder.recvmsg(len(THERE), space, socket.MSG_CMSG_CLOEXEC)
    if not answer:
        raise ConnectionResetError(f"the holder left before it handed {address} over")
    for _, _, data in rights:
        (number,) = array.array("i", data[:DESCRIPTOR_BYTES])
        return socket.socket(fileno=number)
    return None
