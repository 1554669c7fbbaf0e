"""The open files and sockets of processes, as lsof(8) shows them.

Only of processes whose files who asks may see: root's own right, and everybody's over their own, as
far as the kernel grants it (see `may_look_into`). No file system is asked, since one may never
answer: what is shown is what the kernel knows (see `statx`).
"""

from __future__ import annotations

import os
import re
import stat as modes
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tabane.k2i.host import read_file
from tabane.k2i.process import Attributed, attribution
from tabane.k2i.procfs import GONE, decode, parse_stat
from tabane.k2i.sockets import Endpoint, Socket, read_sockets
from tabane.k2i.statx import Status, status_of
from tabane.k2i.table import Process
from tabane.security.identity import Principal

LINKS = {"cwd": "cwd", "root": "rtd", "exe": "txt"}
"""In /proc/PID, and what lsof calls them."""
MODES = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "u"}

_INODE = re.compile(r"(?:socket|pipe):\[([0-9]+)\]")
_MAPPED = re.compile(
    rb"^0*([0-9a-f]+)-0*([0-9a-f]+) \S+ \S+ ([0-9a-f]+):([0-9a-f]+) ([0-9]+) +(/.*)$", re.MULTILINE
)
UNSIGNED = 1 << 64
"""Where a file has offsets without a sign, as memory has, the kernel tells them with one."""
_INFO = re.compile(rb"^(?:pos|flags):\t(-?[0-9]+)$", re.MULTILINE)


class OpenFile(Attributed, frozen=True, kw_only=True):
    """One row for each descriptor (or working directory, program, mapped file) of a process."""

    pid: int
    start_ticks: int
    uid: int
    user: str
    name: str
    fd: str
    """A number, or `cwd`, `rtd`, `txt`, `mem`."""
    mode: str
    """`r`, `w`, `u` for both; empty where it is no descriptor."""
    type: str
    """`REG`, `DIR`, `CHR`, `BLK`, `FIFO`, `a_inode`, `IPv4`, `IPv6`, `unix`, `netlink`, `packet`,
    `sock` for one of another kind; `unknown` where it could not be looked at."""
    device: str
    """`major,minor`."""
    size: int | None
    """Of a file, in bytes."""
    offset: int | None
    inode: int | None
    path: str
    """Of a file, as its process sees it, or what the kernel calls it; of a unix socket, if bound.
    ` (deleted)` at the end: it has no name any more."""
    protocol: str = ""
    local_address: str = ""
    local_port: int = 0
    peer_address: str = ""
    peer_port: int = 0
    state: str = ""


class _File(NamedTuple):
    """What `OpenFile` says beside its process."""

    fd: str
    mode: str
    target: str
    status: Status | None
    offset: int | None


def read_files(
    root: Path, processes: Iterable[Process], who: Principal, *, mapped: bool
) -> list[OpenFile]:
    """The files of those of these processes that there still are and whose files `who` may see,
    with the `mapped` ones or without."""
    networks: dict[str, dict[int, Socket]] = {}
    found: list[OpenFile] = []
    for process in processes:
        try:
            found += _read_process(root, process, who, networks, mapped=mapped)
        except GONE:
            continue
    return found


def may_look_into(who: Principal, process: Process, owner: int) -> bool:
    """Whether the kernel would let `who` see what it shows only to who may trace a process; `owner`
    is that of its `fd` in /proc. Of one that has had other ids or capabilities, as a daemon that
    was root's when it opened its files, that is root."""
    return who.is_root or who.uid == process.uid == process.ruid == owner


def _read_process(
    root: Path,
    process: Process,
    who: Principal,
    networks: dict[str, dict[int, Socket]],
    *,
    mapped: bool,
) -> list[OpenFile]:
    """Raises one of `GONE`, also when another process has its pid now."""
    directory = f"{root}/{process.pid}"
    network = os.readlink(f"{directory}/ns/net")  # noqa: PTH115
    if network not in networks:
        networks[network] = read_sockets(Path(directory, "net"))
    files = [*_links(directory), *(_mapped(directory) if mapped else ()), *_descriptors(directory)]
    if parse_stat(read_file(f"{directory}/stat")).starttime != process.start_ticks:
        raise ProcessLookupError(f"process {process.pid} has ended, another has its pid")
    if not may_look_into(who, process, os.stat(f"{directory}/fd").st_uid):  # noqa: PTH116
        raise PermissionError(f"the files of process {process.pid} are not shown to uid {who.uid}")
    return [_describe(process, file, networks[network]) for file in files]


def _links(directory: str) -> Iterator[_File]:
    for name, called in LINKS.items():
        try:
            path = f"{directory}/{name}"
            yield _File(called, "", _target(path), status_of(path), None)
        except OSError:  # kernel threads have no program
            continue


def _mapped(directory: str) -> Iterator[_File]:
    """Each file once, but for the program itself."""
    try:
        program = _target(f"{directory}/exe")
        maps = read_file(f"{directory}/maps")
    except OSError:
        return
    seen = {program}
    for start, end, major, minor, inode, path in _MAPPED.findall(maps):
        if (name := decode(path)) in seen:
            continue
        seen.add(name)
        try:
            status = status_of(f"{directory}/map_files/{start.decode()}-{end.decode()}")
        except OSError:  # only root may
            device = f"{int(major, 16)},{int(minor, 16)}"
            status = Status(modes.S_IFREG, int(inode), None, device)
        yield _File("mem", "", name, status, None)


def _descriptors(directory: str) -> Iterator[_File]:
    for name in sorted(os.listdir(f"{directory}/fd"), key=int):  # noqa: PTH208
        path = f"{directory}/fd/{name}"
        try:
            target = _target(path)
            info = read_file(f"{directory}/fdinfo/{name}")
        except OSError:
            continue  # closed meanwhile
        offset, flags = _INFO.findall(info)
        try:
            status = status_of(path)
        except OSError:
            status = None
        access = MODES.get(int(flags, 8) & os.O_ACCMODE, "")
        yield _File(name, access, target, status, int(offset) % UNSIGNED)


def _target(path: str) -> str:
    return decode(os.fsencode(os.readlink(path)))  # noqa: PTH115


def _describe(process: Process, file: _File, sockets: dict[int, Socket]) -> OpenFile:
    status = file.status
    is_file = status is not None and modes.S_IFMT(status.mode) in (modes.S_IFREG, modes.S_IFDIR)
    found = _INODE.fullmatch(file.target)
    sock = sockets.get(int(found[1])) if found and file.target.startswith("socket") else None
    local, peer = (sock.local, sock.peer) if sock else (Endpoint(), Endpoint())
    return OpenFile(
        **attribution(process),
        pid=process.pid,
        start_ticks=process.start_ticks,
        uid=process.uid,
        user=process.user,
        name=process.name,
        fd=file.fd,
        mode=file.mode,
        type=sock.family if sock else _type_of(status),
        device=status.device if status and not sock else "",
        size=status.size if status and is_file else None,
        offset=file.offset,
        inode=status.inode if status else None,
        path=sock.path if sock else file.target,
        protocol=sock.protocol if sock else "",
        local_address=local.address,
        local_port=local.port,
        peer_address=peer.address,
        peer_port=peer.port,
        state=sock.state if sock else "",
    )


_TYPES = {
    modes.S_IFREG: "REG",
    modes.S_IFDIR: "DIR",
    modes.S_IFCHR: "CHR",
    modes.S_IFBLK: "BLK",
    modes.S_IFIFO: "FIFO",
    modes.S_IFSOCK: "sock",
}


def _type_of(status: Status | None) -> str:
    """The kernel's nameless files (eventfd, epoll, ...) have no type at all in their mode."""
    if status is None:
        return "unknown"
    return _TYPES.get(modes.S_IFMT(status.mode), "a_inode")
