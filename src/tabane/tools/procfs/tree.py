"""The files of the merged /proc: which there are, their attributes, their contents.

A file's number (`node` in the protocol) says what it is: the process's number, times 256, plus
which of its files. So nothing has to be remembered for the kernel, and no number means two things.
Process 0 stands for the root: its "files" are the host-wide ones.

Of a process of this machine every file is a link into the real procfs, below `tabane/local`; only
directories of processes are the view's own, since tools look for directories. Of a process of
another node there are the files that were fetched; what only its owner could read (open files,
memory, environment) is there, but refused, as the kernel refuses it to strangers.
"""

from __future__ import annotations

import errno
import os
import re
import stat as mode_of
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tabane.clock import SYSTEM, Clock
from tabane.tools.procfs import wire
from tabane.tools.procfs.feed import FRESH_S
from tabane.tools.procfs.local import GONE, Local, host_btime, host_uptime_s
from tabane.tools.procfs.numbers import FIRST
from tabane.tools.procfs.rewrite import shift_start
from tabane.tools.procfs.users import Owners
from tabane.tools.procfs.view import (
    AGE_LIMIT_S,
    CONSTANT_FILES,
    PROCESS_FILES,
    Change,
    Remote,
    View,
)
from tabane.tools.procfs.wire import FOREVER_S, Attributes

DIRECTORY = mode_of.S_IFDIR | 0o555
FILE = mode_of.S_IFREG | 0o444
PRIVATE = mode_of.S_IFREG | 0o400
CLOSED = mode_of.S_IFDIR | 0o500
LINK = mode_of.S_IFLNK | 0o777

HOST_FILES = ("stat", "meminfo", "vmstat", "loadavg", "uptime")
TABANE, LOCAL, NODES, BASHRC, LOG, PASSWD, GROUP = range(10, 17)
_OWN = {"local": LOCAL, "nodes": NODES, "bashrc": BASHRC, "log": LOG}
_OWN |= {"passwd": PASSWD, "group": GROUP}
DATABASES = {PASSWD: "/etc/passwd", GROUP: "/etc/group"}
_FIRST_LINK = 32
"""Of the root's links, in the order in which they were found."""
_TASK, _THREAD, _IN_THREAD = 64, 65, 128
_REFUSED_FILES = ("auxv", "io", "limits", "maps", "mem", "smaps", "smaps_rollup")
_REFUSED_DIRECTORIES = ("fd", "fdinfo", "map_files", "ns")
_REFUSED_LINKS = ("cwd", "exe", "root")
PROCESS_MODES: dict[str, int] = {
    **dict.fromkeys(PROCESS_FILES, FILE),
    "environ": PRIVATE,
    **dict.fromkeys(_REFUSED_FILES, PRIVATE),
    **dict.fromkeys(_REFUSED_DIRECTORIES, CLOSED),
    **dict.fromkeys(_REFUSED_LINKS, LINK),
}
PROCESS_NAMES = tuple(PROCESS_MODES)
_CHILDREN = {
    **{(0, os.fsencode(name)): index for index, name in enumerate(PROCESS_NAMES, 1)},
    (0, b"task"): _TASK,
    **{(_THREAD, os.fsencode(name)): _IN_THREAD + n for n, name in enumerate(PROCESS_NAMES, 1)},
}
"""By directory and name."""
_UNKNOWN_SIZE = 1
"""Of what is refused: the kernel would not even ask for the contents of an empty file."""
_PID = re.compile("[1-9][0-9]{0,9}")
_OFFSET_OF_PIDS = 1 << 12
"""In a listing: what is before it is no process."""

NODES_HEADING = "NODE AGE_S PROCESSES SHOWN\n"
RC = """\
[ -r /etc/bash.bashrc ] && . /etc/bash.bashrc
[ -r ~/.bashrc ] && . ~/.bashrc
PS1="(cluster) $PS1"
"""


class Listed(NamedTuple):
    """A directory's entries as READDIRPLUS has them, and where each begins."""

    offsets: list[int]
    entries: list[bytes]

    def part(self, offset: int, size: int) -> bytes:
        """Those after `offset`, as many as fit into `size` bytes."""
        first = bisect_right(self.offsets, offset)
        found, room = [], size
        for entry in self.entries[first:]:
            room -= len(entry)
            if room < 0:
                break
            found.append(entry)
        return b"".join(found)


class Tree:
    """Answers of the file system. What is refused or gone raises `OSError`."""

    def __init__(
        self,
        view: View,
        local: Local,
        root_names: Iterable[str],
        *,
        secret: bool,
        log: Callable[[], str] = str,
        databases: Sequence[Owners] = (),
        clock: Clock = SYSTEM,
    ) -> None:
        """`root_names`: what the real /proc has besides processes. `secret`: the view holds command
        lines that only their owners and root may read. `databases`: of users and of groups."""
        self.local = local
        self._view = view
        self._log = log
        self._databases = databases
        self._clock = clock
        self._cmdline_mode = PRIVATE if secret else FILE
        own = (*HOST_FILES, "tabane")
        self._links = [name for name in dict.fromkeys(root_names) if name not in own]
        self._root = self._name_root()
        self._local_names: list[str] = []
        self._read: dict[int, bytes] = {}
        """Live files, as their attributes were told last."""
        self._listed: dict[int, tuple[Remote, bytes]] = {}
        self._remote_listed = Listed([], [])
        self._listed_version = -1

    def _name_root(self) -> dict[str, Attributes]:
        root = {name: self._live(index) for index, name in enumerate(HOST_FILES, 2)}
        root["tabane"] = Attributes(TABANE, DIRECTORY, valid_s=FOREVER_S, links=3)
        for index, name in enumerate(self._links, _FIRST_LINK):
            root[name] = Attributes(index, LINK, len(self._link_text(index)), valid_s=FOREVER_S)
        return root

    @staticmethod
    def _live(
        node: int, size: int = 0, now_ns: int = 0, owner: tuple[int, int] = (0, 0)
    ) -> Attributes:
        return Attributes(node, FILE, size, *owner, changed_ns=now_ns)

    # What a request is about

    def is_about_nodes(self, request: wire.Request) -> bool:
        """Whether its answer depends on what other nodes do: then the view should be fresh."""
        if request.opcode not in (wire.LOOKUP, wire.GETATTR, wire.OPENDIR):
            return False
        if request.node == wire.ROOT:
            if request.opcode == wire.LOOKUP:
                name = request.name.decode("ascii", "replace")
                return name in HOST_FILES or pid_of(name) >= FIRST
            return request.opcode == wire.OPENDIR
        number, index = divmod(request.node, 256)
        return number >= FIRST or (
            number == 0 and (2 <= index < 2 + len(HOST_FILES) or index == NODES)
        )

    # Names

    def entry(self, parent: int, name: bytes) -> bytes:
        """The answer to LOOKUP. Which files a process of another node has never changes."""
        number, index = divmod(parent, 256)
        if number < FIRST:
            return wire.encode_entry(self.look_up(parent, os.fsdecode(name)))
        remote = self._remote(number)
        found = remote.entries.get((index, name))
        if found is None:
            child = _child_of(remote, index, name)
            if child is None:
                return wire.ABSENCE
            attributes = self._remote_attributes(remote, child)
            found = remote.entries[index, name] = wire.encode_entry(attributes, FOREVER_S)
            remote.known.add(attributes.node)
        return found

    def changed_files(self, change: Change) -> list[int]:
        """Of those that the kernel knows, the ones that are others now."""
        old, new = change
        known = tuple(new.known)
        if (old.uid, old.gid) != (new.uid, new.gid):
            return [*known]
        return [node for node in known if self._differs(node & 255, change)]

    def _differs(self, index: int, change: Change) -> bool:
        if index in (0, _TASK, _THREAD) or (name := self._file_name(index)) not in PROCESS_FILES:
            return False
        return self._view.render(change.old, name) != self._view.render(change.new, name)

    def look_up(self, parent: int, name: str) -> Attributes:
        number, index = divmod(parent, 256)
        if number == 0:
            return self._look_up_root(index, name)
        if number >= FIRST:
            return self._look_up_remote(self._remote(number), index, name)
        return self._look_up_local(number, name)

    def _look_up_root(self, index: int, name: str) -> Attributes:
        if index == TABANE:
            if name in _OWN:
                return self.attributes(_OWN[name])
        elif index == wire.ROOT:
            if name in self._root:
                return self.attributes(self._root[name].node)
            if number := pid_of(name):
                return self.attributes(number << 8)
        raise FileNotFoundError(errno.ENOENT, name)

    def _look_up_remote(self, remote: Remote, index: int, name: str) -> Attributes:
        child = _child_of(remote, index, os.fsencode(name))
        if child is None:
            raise FileNotFoundError(errno.ENOENT, name)
        return self._remote_attributes(remote, child)

    def _look_up_local(self, pid: int, name: str) -> Attributes:
        if not self.local.has(pid, name):
            raise FileNotFoundError(errno.ENOENT, name)
        return self.attributes((pid << 8) + self._local_index(name))

    def _local_index(self, name: str) -> int:
        if name not in self._local_names:
            if len(self._local_names) == 255:
                raise FileNotFoundError(errno.ENOENT, name)
            self._local_names.append(name)
        return self._local_names.index(name) + 1

    # Attributes

    def attributes(self, node: int) -> Attributes:
        number, index = divmod(node, 256)
        if number == 0:
            return self._root_attributes(index)
        if number >= FIRST:
            return self._remote_attributes(self._remote(number), index)
        return self._local_attributes(number, index)

    def _root_attributes(self, index: int) -> Attributes:
        if index == wire.ROOT:
            return Attributes(index, DIRECTORY, valid_s=FOREVER_S, links=3)
        if index in (TABANE, LOCAL):
            return Attributes(index, DIRECTORY, valid_s=FOREVER_S, links=2)
        if _FIRST_LINK <= index < _FIRST_LINK + len(self._links):
            return Attributes(index, LINK, len(self._link_text(index)), valid_s=FOREVER_S)
        return self._read_live(index, self._host_content(index))

    def _host_content(self, index: int) -> bytes:
        if index == BASHRC:
            return RC.encode()
        if index == LOG:
            return self._log().encode()
        if index in DATABASES:
            return self._database(index)
        if index == NODES:
            return self._nodes().encode()
        if not 2 <= index < 2 + len(HOST_FILES):
            raise FileNotFoundError(errno.ENOENT, str(index))
        return self._view.host_file(HOST_FILES[index - 2], host_uptime_s(), host_btime())

    def _nodes(self) -> str:
        text = NODES_HEADING
        for line in self._view.lines(self._clock.now()):
            age = "-" if line.age_s is None else f"{line.age_s:.1f}"
            text += f"{line.name} {age} {line.processes} {'yes' if line.shown else 'no'}\n"
        return text

    def _database(self, index: int) -> bytes:
        """This machine's, and what only the view knows."""
        known = Path(DATABASES[index]).read_bytes()
        if index - PASSWD >= len(self._databases):
            return known
        more = self._databases[index - PASSWD].own.items()
        fields = (
            "x:{0}:{0}:of another node:/nonexistent:/usr/sbin/nologin"
            if index == PASSWD
            else "x:{0}:"
        )
        lines = (f"{name}:{fields.format(number)}\n" for name, number in more if is_name(name))
        return known.rstrip(b"\n") + b"\n" + "".join(lines).encode()

    def overlays(self) -> list[tuple[str, str]]:
        """What is to be mounted over what, so that the shell knows all names."""
        return [
            (f"/proc/tabane/{name}", DATABASES[index])
            for name, index, database in zip(
                ("passwd", "group"), DATABASES, self._databases, strict=False
            )
            if database.own
        ]

    def _read_live(self, node: int, content: bytes, owner: tuple[int, int] = (0, 0)) -> Attributes:
        """Of a file that is another at every look: what is read next is what was measured here."""
        self._read[node] = content
        return self._live(node, len(content), int(self._clock.wall() * 1e9), owner)

    def _remote_attributes(self, remote: Remote, index: int) -> Attributes:
        owner = (remote.uid, remote.gid)
        node = (remote.number << 8) + index
        if index in (0, _TASK, _THREAD):
            return Attributes(node, DIRECTORY, 0, *owner, 0, FRESH_S, 3)
        name = self._file_name(index)
        mode = self._cmdline_mode if name == "cmdline" else PROCESS_MODES[name]
        if name not in PROCESS_FILES or not remote.has(name):
            return Attributes(node, mode, _UNKNOWN_SIZE, *owner, 0, AGE_LIMIT_S)
        size = len(self._view.render(remote, name))
        valid_s = FOREVER_S if name in CONSTANT_FILES else AGE_LIMIT_S
        return Attributes(node, mode, size, *owner, remote.changed_ns, valid_s)

    def _local_attributes(self, pid: int, index: int) -> Attributes:
        owner = self.local.owner(pid)
        node = (pid << 8) + index
        if index == 0:
            return Attributes(node, DIRECTORY, 0, *owner, links=3)
        name = self._local_names[index - 1]
        if self._is_shifted(name):
            shift = round(self._view.shift_s * os.sysconf("SC_CLK_TCK"))
            return self._read_live(node, shift_start(self.local.read(pid, name), shift), owner)
        return Attributes(node, LINK, 64, *owner)

    def _is_shifted(self, name: str) -> bool:
        """Start times here count from this machine's start, those shown from the view's."""
        return name == "stat" and self._view.shift_s > 0

    @staticmethod
    def _file_name(index: int) -> str:
        place = index - _IN_THREAD if index >= _IN_THREAD else index
        if not 0 < place <= len(PROCESS_NAMES):
            raise FileNotFoundError(errno.ENOENT, str(index))
        return PROCESS_NAMES[place - 1]

    def _remote(self, number: int) -> Remote:
        remote = self._view.find(number)
        if remote is None:
            raise FileNotFoundError(errno.ENOENT, str(number))
        return remote

    # Contents

    def read(self, node: int) -> bytes:
        """The whole file, as its attributes were told last."""
        number, index = divmod(node, 256)
        if number < FIRST:
            if node not in self._read:
                self.attributes(node)
            return self._read[node]
        name = self._file_name(index)
        remote = self._remote(number)
        if name not in PROCESS_FILES or not remote.has(name):
            raise PermissionError(errno.EACCES, name)
        return self._view.render(remote, name)

    def read_link(self, node: int, uid: int) -> bytes:
        """`uid` asks."""
        number, index = divmod(node, 256)
        if number == 0:
            return self._link_text(index)
        if number >= FIRST:
            raise PermissionError(errno.EACCES, str(number))
        name = self._local_names[index - 1]
        if name in _REFUSED_LINKS:
            if uid not in (0, self.local.owner(number).uid):
                raise PermissionError(errno.EACCES, name)
            return os.fsencode(self.local.target(number, name))
        return f"../tabane/local/{number}/{name}".encode()

    def _link_text(self, index: int) -> bytes:
        return f"tabane/local/{self._links[index - _FIRST_LINK]}".encode()

    # Listings

    def listing(self, node: int) -> Listed:
        number, index = divmod(node, 256)
        if node == wire.ROOT:
            return self._list_root()
        if number == 0:
            names = [*_OWN] if index == TABANE else []
        elif number >= FIRST:
            names = self._remote_names(self._remote(number), index)
        else:
            names = self.local.names(number)
        return self._list(node, names)

    def _remote_names(self, remote: Remote, index: int) -> list[str]:
        if index == _TASK:
            return [str(remote.number)]
        if index not in (0, _THREAD):
            raise PermissionError(errno.EACCES, str(remote.number))
        return [*PROCESS_NAMES, *(("task",) if index == 0 else ())]

    def _list(self, node: int, names: Iterable[str]) -> Listed:
        found = Listed([], [])
        for offset, name in enumerate(names, 1):
            try:
                attributes = self.look_up(node, name)
            except GONE:
                continue
            found.offsets.append(offset)
            found.entries.append(wire.encode_listed(offset, os.fsencode(name), attributes))
        return found

    def _list_root(self) -> Listed:
        listed = self._list(wire.ROOT, self._root)
        pids = self.local.pids()
        living = {0, *pids}
        self._read = {node: data for node, data in self._read.items() if node >> 8 in living}
        for pid in pids:
            try:
                attributes = self.attributes(pid << 8)
            except GONE:
                continue
            listed.offsets.append(_OFFSET_OF_PIDS + pid)
            listed.entries.append(
                wire.encode_listed(_OFFSET_OF_PIDS + pid, b"%d" % pid, attributes)
            )
        remote = self._list_remote()
        return Listed(listed.offsets + remote.offsets, listed.entries + remote.entries)

    def _list_remote(self) -> Listed:
        if self._listed_version != self._view.version:
            self._listed_version = self._view.version
            processes = self._view.processes
            self._listed = {n: self._list_one(n, remote) for n, remote in processes.items()}
            offsets = [_OFFSET_OF_PIDS + number for number in processes]
            self._remote_listed = Listed(offsets, [entry for _, entry in self._listed.values()])
        return self._remote_listed

    def _list_one(self, number: int, remote: Remote) -> tuple[Remote, bytes]:
        before = self._listed.get(number)
        if before is not None and (before[0] is remote):
            return before
        attributes = self._remote_attributes(remote, 0)
        entry = wire.encode_listed(_OFFSET_OF_PIDS + number, b"%d" % number, attributes)
        return remote, entry


def _child_of(remote: Remote, index: int, name: bytes) -> int | None:
    """Which file of a process that is."""
    if index == _TASK:
        return _THREAD if name == b"%d" % remote.number else None
    return _CHILDREN.get((index, name))


def number_of_directory(node: int) -> int | None:
    """Of a process of another node; None when a file's number is not that of its directory."""
    number, index = divmod(node, 256)
    return number if number >= FIRST and not index else None


def pid_of(name: str) -> int:
    """The process that a directory is named after; 0 for none."""
    return int(name) if _PID.fullmatch(name) else 0


def is_name(name: str) -> bool:
    """Whether it can stand in a database of users."""
    return name.isprintable() and not set(name) & {":", "/", " "} and not name.isdigit()


def root_names() -> list[str]:
    """What this machine's /proc has besides processes."""
    return sorted(name for name in os.listdir("/proc") if not name.isdigit())  # noqa: PTH208
