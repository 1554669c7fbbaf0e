"""The server process of a cluster's shell: puts view, file system and system calls together."""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque

from tabane.clock import SYSTEM
from tabane.tools.procfs import session
from tabane.tools.procfs.feed import Feed
from tabane.tools.procfs.filter import numbering
from tabane.tools.procfs.local import Local
from tabane.tools.procfs.server import Server
from tabane.tools.procfs.source import ProcSource
from tabane.tools.procfs.supervisor import Carrier, Supervisor
from tabane.tools.procfs.tree import Tree, root_names
from tabane.tools.procfs.users import local_groups, local_users
from tabane.tools.procfs.view import View, local_boot_id

LINES = 200


class Lines(logging.Handler):
    """The latest lines of the log: the server has no terminal, so they are a file of the tree."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record).encode("unicode_escape").decode())

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)


class ClusterShell:
    """Everything between a source of processes and a shell."""

    def __init__(self, source: ProcSource, carrier: Carrier, *, secret: bool) -> None:
        """`secret`: what `source` tells is not for every user of the shell."""
        users, groups = local_users(), local_groups()
        self.view = View(users, groups, local_boot_id())
        self.feed = Feed(source, self.view)
        self._carrier = carrier
        self._lines = Lines()
        self._tree = Tree(
            self.view,
            Local(),
            root_names(),
            secret=secret,
            log=self._lines.text,
            databases=(users, groups),
            clock=SYSTEM,
        )

    @property
    def overlays(self) -> list[tuple[str, str]]:
        """Databases of users and groups that name those whom this machine does not know."""
        return self._tree.overlays()

    def serve(self, meeting: socket.socket) -> None:
        """In the server's process, until nothing is mounted any more."""
        fuse = session.receive(meeting)
        if fuse is None:
            return
        package = logging.getLogger("tabane")
        package.addHandler(self._lines)
        package.setLevel(logging.INFO)
        package.propagate = False
        server = Server(fuse, self._tree, self.feed)
        self.feed.start()
        threading.Thread(target=self._meet, args=(meeting, server), daemon=True).start()
        server.serve()

    def _meet(self, meeting: socket.socket, server: Server) -> None:
        session.acknowledge(meeting)
        self._tree.local.fd = session.receive(meeting)
        session.acknowledge(meeting)
        listener = session.receive(meeting)
        if listener is not None:
            Supervisor(self.view, self.feed, server, self._carrier, numbering()).start(listener)
        session.acknowledge(meeting)
