"""Trees of files as a tar stream, with flat memory, and without trusting either side of it.

Entries begin with the name of what is copied. Packing follows a link only if that is what was
named; unpacking follows none (`follow` apart, for who is locked into a root anyway): every
directory is opened by its name alone, beneath the one above it, so an archive reaches nothing
outside of its target, whatever it has in it and whoever changes the tree meanwhile. A file is
written under another name and then renamed, so that nothing is ever written through a link, and
who reads a file that is replaced reads the old one or the new one.

Modes and times are kept, to the nanosecond; owners are not: what is made is its maker's. Holes stay
holes (GNU's sparse format 1.0 in PAX headers, which GNU tar, libarchive and Python read).
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tabane.errors import SystemFault, UsageError
from tabane.units import shorten

BLOCK_BYTES = 256 << 10
MAX_DEPTH = 200
"""Of directories: each has a descriptor open."""
MOST_PIECES = 1 << 14
"""Of a file with holes; what has more is sent whole."""
MAX_EXTENSION_BYTES = 1 << 20
"""Of what describes one entry beside its header: it is held in memory."""
UNSIZED_BYTES = 4 << 20
"""Of a file whose size is said to be 0, as those in /proc."""
SECTOR = 512
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
EXTENSIONS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)

Write = Callable[[bytes], object]
Complain = Callable[[str], object]


class Full(SystemFault):
    """There is no room for what is copied."""

    code = "full"


# Packing


def pack(path: str, write: Write, complain: Complain) -> None:
    """Write what `path` means, links followed, as an archive with its end. What cannot be read is
    left out, and said. Raises `UsageError` when there is nothing of that name."""
    name = os.path.basename(path.rstrip("/"))  # noqa: PTH119 - the "." of "x/." must stay
    name = "." if name in ("", "..") else name
    try:
        found = os.stat(path)  # noqa: PTH116
        flags = (READ_FLAGS | os.O_DIRECTORY) if stat.S_ISDIR(found.st_mode) else READ_FLAGS
        descriptor = os.open(path, flags & ~os.O_NOFOLLOW)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    out = _Buffered(write)
    packer = _Packer(out.write, complain, found.st_dev)
    try:
        if stat.S_ISDIR(found.st_mode):
            packer.add_directory(name, descriptor, 0)
        elif stat.S_ISREG(found.st_mode):
            packer.add_file(name, descriptor)
        else:
            raise UsageError(f"{path} is neither a file nor a directory")
    finally:
        os.close(descriptor)
    out.write(bytes(2 * SECTOR))
    out.flush()


class _Buffered:
    """So that many small files do not mean many small writes."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._waiting = bytearray()

    def write(self, data: bytes) -> None:
        self._waiting += data
        if len(self._waiting) >= BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        self._write(bytes(self._waiting))
        self._waiting.clear()


class _Packer:
    def __init__(self, write: Write, complain: Complain, device: int) -> None:
        self._write = write
        self._complain = complain
        self._device = device

    def add_directory(self, name: str, directory: int, depth: int) -> None:
        self._write(_header(name + "/", os.fstat(directory), tarfile.DIRTYPE))
        if depth == MAX_DEPTH:
            self._complain(f"{name} is more than {MAX_DEPTH} directories deep: left out")
            return
        for entry in sorted(os.listdir(directory)):
            try:
                self._add(f"{name}/{entry}", entry, directory, depth)
            except OSError as error:
                self._complain(f"{name}/{entry}: {error.strerror}")

    def _add(self, name: str, entry: str, directory: int, depth: int) -> None:
        found = os.stat(entry, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            link = os.readlink(entry, dir_fd=directory)
            self._write(_header(name, found, tarfile.SYMTYPE, link=link))
        elif stat.S_ISDIR(found.st_mode) and found.st_dev != self._device:
            self._complain(f"{name} is another file system: left out")
        elif stat.S_ISDIR(found.st_mode):
            with _opened(entry, READ_FLAGS | os.O_DIRECTORY, directory) as below:
                self.add_directory(name, below, depth + 1)
        elif stat.S_ISREG(found.st_mode):
            with _opened(entry, READ_FLAGS, directory) as file:
                self.add_file(name, file)
        else:
            self._complain(f"{name} is neither a file nor a directory: left out")

    def add_file(self, name: str, file: int) -> None:
        found = os.fstat(file)
        if not found.st_size:
            data = _read_up_to(file, UNSIZED_BYTES)
            self._write(_header(name, found, tarfile.REGTYPE, size=len(data)) + _padded(data))
            return
        pieces = _pieces(file, found)
        if pieces is None:
            self._write(_header(name, found, tarfile.REGTYPE, size=found.st_size))
            self._send(name, file, [(0, found.st_size)])
        else:
            plan = _padded(b"%d\n" % len(pieces) + b"".join(b"%d\n%d\n" % p for p in pieces))
            size = len(plan) + sum(length for _, length in pieces)
            self._write(_header(name, found, tarfile.REGTYPE, size=size, whole=found.st_size))
            self._write(plan)
            self._send(name, file, pieces)

    def _send(self, name: str, file: int, pieces: list[tuple[int, int]]) -> None:
        """Exactly as much as was announced, whatever becomes of the file."""
        total, short = sum(length for _, length in pieces), False
        for start, length in pieces:
            offset, end = start, start + length
            while offset < end:
                block = _read_at(file, min(BLOCK_BYTES, end - offset), offset)
                short = short or not block
                block = block or bytes(min(BLOCK_BYTES, end - offset))
                self._write(block)
                offset += len(block)
        self._write(bytes(-total % SECTOR))
        if short:
            self._complain(f"{name} could not be read to its end: the rest is zeros")


def _read_at(file: int, most: int, offset: int) -> bytes:
    """Nothing where it cannot be read: its header is on its way already."""
    with suppress(OSError):
        return os.pread(file, most, offset)
    return b""


def _read_up_to(file: int, most: int) -> bytes:
    data = b""
    while len(data) < most and (block := os.read(file, most - len(data))):
        data += block
    return data


def _pieces(file: int, found: os.stat_result) -> list[tuple[int, int]] | None:
    """Where a file with holes has data, and its end; None when it has none, or too many."""
    if found.st_blocks * SECTOR >= found.st_size:
        return None
    pieces: list[tuple[int, int]] = []
    end = 0
    while len(pieces) < MOST_PIECES:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
            end = min(os.lseek(file, start, os.SEEK_HOLE), found.st_size)
        except OSError as error:
            if error.errno != errno.ENXIO:
                return None
            return [*pieces, (found.st_size, 0)]
        if start >= found.st_size:
            return [*pieces, (found.st_size, 0)]
        pieces.append((start, end - start))
    return None


def _header(
    name: str,
    found: os.stat_result,
    kind: bytes,
    *,
    size: int = 0,
    link: str = "",
    whole: int | None = None,
) -> bytes:
    """`whole`: the size of a file with holes, of which only `size` bytes come."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    info.mode, info.uid, info.gid = stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
    seconds, nanoseconds = divmod(found.st_mtime_ns, 10**9)
    info.mtime = seconds
    more: dict[str, str] = {}
    if nanoseconds and seconds >= 0:
        more["mtime"] = f"{seconds}.{nanoseconds:09}"
    if whole is not None:
        info.name = "GNUSparseFile.0/" + os.path.basename(name)  # noqa: PTH119
        sparse = {"major": "1", "minor": "0", "name": name, "realsize": str(whole)}
        more |= {f"GNU.sparse.{key}": value for key, value in sparse.items()}
    info.pax_headers = more
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SECTOR)


@contextmanager
def _opened(name: str, flags: int, directory: int) -> Iterator[int]:
    descriptor = os.open(name, flags, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# Unpacking


class _Info(tarfile.TarInfo):
    """An entry whose description cannot fill the memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in EXTENSIONS and self.size > MAX_EXTENSION_BYTES:
            raise UsageError(f"the archive describes an entry in {self.size} bytes: too many")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise UsageError("the archive has a file with holes in an old way: make it --posix")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_gnusparse_10(self, member: Any, headers: dict[str, str], tar: Any) -> None:
        """The numbers before the data: how many pieces there are, and where each goes."""
        rest, wanted = b"", 1
        numbers: list[int] = []
        while len(numbers) < wanted:
            if b"\n" not in rest:
                block = tar.fileobj.read(SECTOR)
                if len(block) < SECTOR or len(rest) > SECTOR:
                    raise UsageError("the archive breaks off, or its plan of a file is none")
                rest += block
                continue
            word, _, rest = rest.partition(b"\n")
            numbers.append(int(word) if word.isdigit() else -1)
            wanted = 1 + 2 * numbers[0]
            if wanted > 2 * MOST_PIECES + 3 or min(numbers) < 0:
                raise UsageError(f"the archive has a file of {numbers[0]} pieces: too many")
        member.offset_data = tar.fileobj.tell()
        member.sparse = list(zip(numbers[1::2], numbers[2::2], strict=True))


def unpack(stream: Any, target: int, *, name: str | None = None, trusted: bool = False) -> None:
    """Unpack what `stream.read(n)` gives below the directory `target` (a descriptor). `name`: what
    the archive has (one tree) is called that. `trusted`: links that lead to directories are
    followed, and set-user-ID bits kept.

    Raises `UsageError` for an archive that is none or reaches out, `Full`, and `OSError` (with the
    name in the archive). What came before stays.
    """
    tree = _Tree(target, trusted)
    roots = _Roots(name)
    try:
        with tarfile.open(
            fileobj=stream,
            mode="r|",
            bufsize=BLOCK_BYTES,
            tarinfo=_Info,
            encoding="utf-8",
            errors="surrogateescape",
        ) as tar:
            while (info := tar.next()) is not None:
                parts = roots.place(info.name)
                with _named(info.name):
                    tree.add(tar, info, parts, roots)
                tar.members.clear()  # type: ignore[attr-defined]
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UsageError(f"that is no tar archive, or a broken one: {error}") from None
    finally:
        tree.close()


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Full(f"{name}: there is no space left") from None
        raise OSError(error.errno, error.strerror, name) from None


class _Roots:
    """Where entries go: as they are called, or, when a name is given, all below that."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._first: str | None = None

    def place(self, entry: str) -> list[str]:
        parts = [part for part in entry.split("/") if part not in ("", ".")]
        if entry.startswith("/") or ".." in parts or "\0" in entry:
            raise UsageError(f"the archive has an entry outside of it: {shorten(entry)}")
        if self._name is None:
            return parts
        if self._first is None:
            self._first = parts[0] if parts else ""
        if self._first:
            if parts[:1] != [self._first]:
                raise UsageError(f"the archive has more than {self._first}: {shorten(entry)}")
            parts = parts[1:]
        return [self._name, *parts]


class _Tree:
    """The directories that are open, from the target down, and what they are to be in the end."""

    def __init__(self, target: int, trusted: bool) -> None:
        self._path: list[str] = []
        self._open = [target]
        self._finals: list[tuple[int, int] | None] = [None]
        self._trusted = trusted

    def add(
        self, tar: tarfile.TarFile, info: tarfile.TarInfo, parts: list[str], roots: _Roots
    ) -> None:
        if not parts:
            return
        if info.isdir():
            self._descend(parts)
            self._finals[-1] = (self._mode(info), _mtime_ns(info))
            return
        *above, name = parts
        directory = self._descend(above)
        if info.isreg():
            self._make(name, directory, lambda new: self._write(tar, info, new, directory))
        elif info.issym():
            self._make(name, directory, lambda new: _link(info, new, directory))
        elif info.islnk():
            *where, old = roots.place(info.linkname)
            with self._apart(where) as source:
                self._make(name, directory, lambda new: _hard_link(old, source, new, directory))
        else:
            raise UsageError(f"{shorten(info.name)} is a device or a pipe: none is made")

    def _mode(self, info: tarfile.TarInfo) -> int:
        return info.mode & (0o7777 if self._trusted else 0o777)

    def _descend(self, parts: list[str]) -> int:
        """The directory of that path, made if it is not there; what is left is made final."""
        common = 0
        while common < min(len(parts), len(self._path)) and parts[common] == self._path[common]:
            common += 1
        while len(self._path) > common:
            self._leave()
        if len(parts) > MAX_DEPTH:
            raise UsageError(f"the archive is more than {MAX_DEPTH} directories deep")
        for part in parts[common:]:
            self._open.append(self._enter(part, self._open[-1], make=True))
            self._path.append(part)
            self._finals.append(None)
        return self._open[-1]

    def _enter(self, part: str, above: int, *, make: bool) -> int:
        flags = DIRECTORY_FLAGS | (0 if self._trusted else os.O_NOFOLLOW)
        try:
            return os.open(part, flags, dir_fd=above)
        except FileNotFoundError:
            if not make:
                raise
            os.mkdir(part, 0o700, dir_fd=above)
            self_made = os.open(part, flags, dir_fd=above)
            os.fchmod(self_made, 0o755)
            return self_made

    @contextmanager
    def _apart(self, parts: list[str]) -> Iterator[int]:
        """A directory of the tree, without leaving the one that is open."""
        current = os.dup(self._open[0])
        try:
            for part in parts:
                below = self._enter(part, current, make=False)
                os.close(current)
                current = below
            yield current
        finally:
            os.close(current)

    def _make(self, name: str, directory: int, make: Callable[[str], None]) -> None:
        """Make a new thing and give it its name, in the place of another file or link only."""
        with suppress(FileNotFoundError):
            there = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
            if stat.S_ISDIR(there):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not (stat.S_ISREG(there) or stat.S_ISLNK(there)):
                raise UsageError(f"{name} is there and no file: it is not replaced")
        new = f".tabane-{os.urandom(6).hex()}"
        try:
            make(new)
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:  # also where both were one file already, which rename(2) leaves as it is
            with suppress(OSError):
                os.unlink(new, dir_fd=directory)

    def _write(self, tar: tarfile.TarFile, info: tarfile.TarInfo, new: str, directory: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(new, flags, 0o600, dir_fd=directory)
        try:
            source: Any = tar.fileobj
            source.seek(info.offset_data)
            pieces: Any = info.sparse or [(0, info.size)]
            for start, length in pieces:
                if start + length > info.size:
                    raise UsageError(f"{shorten(info.name)}: a piece of it is beyond its end")
                _copy(source, file, start, length)
            os.truncate(file, info.size)
            os.fchmod(file, self._mode(info))
            os.utime(file, ns=(_mtime_ns(info),) * 2)
        finally:
            os.close(file)

    def _leave(self) -> None:
        descriptor, final = self._open.pop(), self._finals.pop()
        self._path.pop()
        try:
            if final is not None:
                with suppress(PermissionError):  # it was there before, and is another's
                    os.fchmod(descriptor, final[0])
                    os.utime(descriptor, ns=(final[1],) * 2)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Make all final; the target stays open."""
        while self._path:
            self._leave()


def _copy(source: Any, file: int, start: int, length: int) -> None:
    offset, end = start, start + length
    while offset < end:
        block = source.read(min(BLOCK_BYTES, end - offset))
        if not block:
            raise UsageError("the archive breaks off in the middle of a file")
        view = memoryview(block)
        while view:
            done = os.pwrite(file, view, offset)
            view, offset = view[done:], offset + done


def _link(info: tarfile.TarInfo, new: str, directory: int) -> None:
    os.symlink(info.linkname, new, dir_fd=directory)
    os.utime(new, ns=(_mtime_ns(info),) * 2, dir_fd=directory, follow_symlinks=False)


def _hard_link(old: str, source: int, new: str, directory: int) -> None:
    if not stat.S_ISREG(os.stat(old, dir_fd=source, follow_symlinks=False).st_mode):
        raise UsageError(f"{shorten(old)} is linked to and no file")
    os.link(old, new, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)


def _mtime_ns(info: tarfile.TarInfo) -> int:
    whole, _, part = info.pax_headers.get("mtime", "").partition(".")
    if whole.isdigit() and part.isdigit():
        return int(whole) * 10**9 + int(part[:9].ljust(9, "0"))
    return int(info.mtime) * 10**9
