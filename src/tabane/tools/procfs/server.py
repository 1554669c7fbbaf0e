"""Serves a merged /proc on an open /dev/fuse: one thread, one request at a time.

A request that wants fresher data than there is waits aside while others are answered. When this
process dies, the kernel ends the connection: whoever reads then gets ENOTCONN, nobody waits.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from tabane.clock import SYSTEM, Clock
from tabane.k2i.procfs import GONE
from tabane.tools.procfs import wire
from tabane.tools.procfs.feed import Feed
from tabane.tools.procfs.tree import Listed, Tree
from tabane.tools.procfs.view import Change
from tabane.tools.procfs.wire import Request

log = logging.getLogger(__name__)


LOOKS = 60
"""For the next request, before this thread sleeps: some 50 microseconds."""
SCAN_S = 3.0
"""As long as that a listing that stays open counts as being gone through."""


class Scan(NamedTuple):
    """The last listing of all processes, while it is open."""

    handle: int = 0
    began: float = float("-inf")


class Server:
    """`serve` returns when the file system is no longer mounted anywhere."""

    def __init__(self, fuse: int, tree: Tree, feed: Feed, *, clock: Clock = SYSTEM) -> None:
        """`fuse`: a descriptor of /dev/fuse, which stays the caller's."""
        self._clock = clock
        self._fuse = fuse
        self._tree = tree
        self._feed = feed
        self._lock = threading.Lock()
        """Of the tree and the handles: requests that waited are answered by another thread."""
        self._waiting: list[Request] = []
        self._someone_waits = threading.Event()
        self._open: dict[int, Listed] = {}
        self._handles = 0
        self._scan = Scan()
        self._requests = select.poll()
        self._requests.register(fuse, select.POLLIN)
        feed.on_changes = self.tell
        self._answers: dict[int, Callable[[Request], bytes]] = {
            wire.LOOKUP: self._on_lookup,
            wire.GETATTR: self._on_getattr,
            wire.READLINK: self._on_readlink,
            wire.READ: self._on_read,
            wire.OPENDIR: self._on_opendir,
            wire.READDIRPLUS: self._on_readdirplus,
            wire.RELEASEDIR: self._on_releasedir,
            wire.STATFS: lambda request: wire.encode_statfs(),
        }

    def tell(self, changes: list[Change]) -> None:
        """Have the kernel read again what has changed, of what it may have kept. From any thread
        but the serving one."""
        for change in changes:
            for node in self._tree.changed_files(change):
                with suppress(OSError):  # it has forgotten it already
                    os.write(self._fuse, wire.encode_changed(node))

    def forget(self, number: int) -> None:
        """Have the kernel ask anew for a process. From any thread but the serving one."""
        with suppress(OSError):  # it knows no such name, or has ended
            os.write(self._fuse, wire.encode_invalid(wire.ROOT, b"%d" % number))

    def serve(self) -> None:
        threading.Thread(target=self._answer_waiting, name="waiting", daemon=True).start()
        os.set_blocking(self._fuse, False)
        while True:
            try:
                data = os.read(self._fuse, wire.BUFFER_BYTES)
            except BlockingIOError:
                self._look_out()
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno != errno.ENOENT:  # withdrawn before it was read
                    raise
            else:
                self._on_request(wire.parse_request(data))

    def _look_out(self) -> None:
        """Wait for a request. Who goes through a listing asks again at once: to stay awake for that
        moment costs less than to be woken, which takes longer than any answer where his CPU is
        another one."""
        if self._is_scanned():
            for _ in range(LOOKS):
                if self._requests.poll(0):
                    return
        self._requests.poll()

    def _is_scanned(self) -> bool:
        return self._clock.now() - self._scan.began < SCAN_S

    def _on_request(self, request: Request) -> None:
        if request.opcode in wire.SILENT:
            return
        if request.opcode == wire.INIT:
            self._write(wire.encode_init(request))
        elif self._wants_fresh(request) and self._feed.wait_s():
            with self._lock:
                self._waiting.append(request)
            self._someone_waits.set()
        else:
            self._answer(request)

    def _wants_fresh(self, request: Request) -> bool:
        """A tool that goes through a listing looks at the processes as they were when it began."""
        if request.opcode != wire.OPENDIR and self._is_scanned():
            return False
        return self._tree.is_about_nodes(request)

    def _answer_waiting(self) -> None:
        while True:
            self._someone_waits.wait()
            self._someone_waits.clear()
            self._feed.wait()
            with self._lock:
                waiting, self._waiting = self._waiting, []
            for request in waiting:
                self._answer(request)

    def _answer(self, request: Request) -> None:
        answer = self._answers.get(request.opcode)
        if answer is None:
            self._write(wire.encode_error(request.unique, errno.ENOSYS))
            return
        try:
            with self._lock:
                body = answer(request)
        except PermissionError:
            self._write(wire.encode_error(request.unique, errno.EACCES))
        except GONE:
            self._write(wire.encode_error(request.unique, errno.ENOENT))
        except Exception as error:
            log.error("request %s failed", request, exc_info=error)
            self._write(wire.encode_error(request.unique, errno.EIO))
        else:
            self._write(wire.encode_answer(request.unique, body))

    def _write(self, data: bytes) -> None:
        try:
            os.write(self._fuse, data)
        except FileNotFoundError:
            pass  # whoever asked was interrupted

    def _on_lookup(self, request: Request) -> bytes:
        return self._tree.entry(request.node, request.name)

    def _on_getattr(self, request: Request) -> bytes:
        return wire.encode_attributes(self._tree.attributes(request.node))

    def _on_readlink(self, request: Request) -> bytes:
        return self._tree.read_link(request.node, request.uid)

    def _on_read(self, request: Request) -> bytes:
        _, offset, size = request.span
        return self._tree.read(request.node)[offset : offset + size]

    def _on_opendir(self, request: Request) -> bytes:
        listed = self._tree.listing(request.node)
        self._handles += 1
        self._open[self._handles] = listed
        if request.node == wire.ROOT:
            self._scan = Scan(self._handles, self._clock.now())
        return wire.encode_handle(self._handles)

    def _on_readdirplus(self, request: Request) -> bytes:
        handle, offset, size = request.span
        return self._open[handle].part(offset, size)

    def _on_releasedir(self, request: Request) -> bytes:
        handle, _, _ = request.span
        self._open.pop(handle, None)
        if handle == self._scan.handle:
            self._scan = Scan()
        return b""
