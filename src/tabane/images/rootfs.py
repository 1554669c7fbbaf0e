"""Trees of files to layers and back.

Unpacking trusts no name in an archive. The kernel resolves each entry's directory with the image's
tree as its root (openat2's RESOLVE_IN_ROOT), so that `..`, absolute names and symbolic links of
earlier entries lead to where they would lead inside the container, never out of the tree; the last
component is then made relative to that directory and never followed. Ids, modes, times and harmless
extended attributes are kept; device nodes are left out, an instance's /dev is made by its driver.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from tabane.errors import Corrupt, UsageError

LARGEST_ID = 65535
"""Ids of an image are mapped to the app's range of 65,536."""
XATTR = "SCHILY.xattr."
"""Prefix of extended attributes among a tar entry's PAX headers."""
BINARY = ("utf-8", "surrogateescape")
"""How PAX headers, which are text here, carry bytes."""
KEPT_XATTRS = ("user.", "security.capability")
OVERLAYS_XATTRS = "user.overlay."
"""Not these, nor `trusted.`: overlay's own marks would make an image lie about what is in it."""
WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
SYS_OPENAT2 = 437
RESOLVE_IN_ROOT = 0x10
IMPOSSIBLE = (
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EEXIST,
    errno.ENOENT,
)
"""What the names of a broken archive lead to, as opposed to what a broken machine does."""
GONE = (FileNotFoundError, NotADirectoryError)
ENTRY_BYTES = 512
"""What an entry costs at the least, however small it is: a header, an inode."""
MOST_HEADER_BYTES = 1 << 20
"""Of a long name or of extended attributes, which are read into memory as a whole."""
O_PATH_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
Spend = Callable[[int], object]

_libc = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    """`struct open_how` of linux/openat2.h."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("flags", "mode", "resolve"))


# Packing


def write_layer(tree: Path, file: IO[bytes]) -> None:
    """Write `tree` as an uncompressed layer: the same tree gives the same bytes.

    Raises `UsageError` when a file's owner is above 65,535 or a file cannot be read.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in _walk(tree):
            info = tar.gettarinfo(path, arcname=str(path.relative_to(tree)))
            if info is None or (info.isdev() and not info.isfifo()):
                continue
            _normalise(info, path)
            try:
                if info.isreg():
                    with path.open("rb") as content:
                        tar.addfile(info, content)
                else:
                    tar.addfile(info)
            except OSError as error:
                raise UsageError(f"{path} cannot be packed: {error.strerror}") from error


def _walk(tree: Path) -> Iterator[Path]:
    """Everything in the tree, itself first, directories before what is in them, sorted."""
    yield tree
    for directory, names, files in os.walk(tree):
        names.sort()
        yield from (Path(directory, name) for name in sorted((*names, *files)))


def _normalise(info: tarfile.TarInfo, path: Path) -> None:
    if max(info.uid, info.gid) > LARGEST_ID:
        owner = f"{info.uid}:{info.gid}"
        raise UsageError(f"{path} belongs to {owner}: ids in an image end at {LARGEST_ID}")
    info.uname = info.gname = ""
    info.mtime = int(info.mtime)
    names = sorted(os.listxattr(path, follow_symlinks=False))
    info.pax_headers = {
        XATTR + name: os.getxattr(path, name, follow_symlinks=False).decode(*BINARY)
        for name in names
        if _is_kept(name)
    }


def _is_kept(attribute: str) -> bool:
    return attribute.startswith(KEPT_XATTRS) and not attribute.startswith(OVERLAYS_XATTRS)


# Unpacking


def unpack_layer(source: IO[bytes], tree: Path, spend: Spend = lambda size: None) -> None:
    """Apply an uncompressed layer's tar stream to `tree`, whiteouts included. `spend` is told how
    much will be written, before it is; what it raises ends the unpacking.

    Raises `Corrupt` for a stream that is no tar archive, breaks off, or has an impossible entry.
    """
    with _Unpacker(tree, spend) as unpacker:
        try:
            with tarfile.open(fileobj=source, mode="r|", tarinfo=_Entry) as tar:
                for entry in tar:
                    unpacker.add(tar, entry)
            unpacker.finish()
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise Corrupt(f"a layer cannot be read: {error}") from error


class _Entry(tarfile.TarInfo):
    """An entry whose headers fit into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in HEADERS and self.size > MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


class _Unpacker:
    """One layer on its way into a tree."""

    def __init__(self, tree: Path, spend: Spend) -> None:
        self._spend = spend
        self._root = os.open(tree, O_PATH_DIRECTORY)
        self._parent: tuple[str, int] = ("", os.dup(self._root))
        """The directory of the last entry, which mostly is the next one's too."""
        self._made: set[str] = set()
        self._times: dict[str, float] = {}
        """Of directories, set when nothing changes in them any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._parent[1])
        os.close(self._root)

    def add(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        """Make what `entry` says. Raises `Corrupt` when it cannot be."""
        self._spend(ENTRY_BYTES + (entry.size if entry.isreg() else 0))
        parts = [part for part in entry.name.split("/") if part not in ("", ".")]
        parent, name = "/".join(parts[:-1]), parts[-1] if parts else "."
        try:
            directory = self._enter(parent)
            if name.startswith(WHITEOUT):
                self._hide(directory, parent, name)
            elif name == "." and entry.isdir():
                self._finish(directory, name, entry)
            else:
                self._make(tar, entry, directory, _plain(name))
                self._made.add("/".join(parts))
        except OSError as error:
            if error.errno not in IMPOSSIBLE:
                raise
            raise Corrupt(f"{entry.name!r} in a layer cannot be: {error.strerror}") from error

    def finish(self) -> None:
        """Set the directories' times, the deepest first."""
        for path in sorted(self._times, reverse=True):
            parent, _, name = path.rpartition("/")
            times = (self._times[path], self._times[path])
            with suppress(*GONE):
                os.utime(name, times, dir_fd=self._enter(parent), follow_symlinks=False)

    def _enter(self, path: str) -> int:
        """The directory that `path` means in the tree, made if need be."""
        if path != self._parent[0]:
            fresh = self._open(path)
            os.close(self._parent[1])
            self._parent = (path, fresh)
        return self._parent[1]

    def _open(self, path: str) -> int:
        try:
            return open_in_root(self._root, path or ".")
        except FileNotFoundError:
            parent, _, name = path.rpartition("/")
            above = self._open(parent)
            try:
                os.mkdir(_plain(name), 0o755, dir_fd=above)
            finally:
                os.close(above)
            return open_in_root(self._root, path)

    def _hide(self, directory: int, parent: str, name: str) -> None:
        """A whiteout: lower layers' file, or all they have in the directory, is gone."""
        if name != OPAQUE:
            return self._remove(directory, _plain(name.removeprefix(WHITEOUT)))
        for below in os.listdir(f"/proc/self/fd/{directory}"):  # noqa: PTH208 - of a descriptor
            if f"{parent}/{below}".lstrip("/") not in self._made:
                self._remove(directory, below)

    def _remove(self, directory: int, name: str) -> None:
        if _is_directory(directory, name):
            shutil.rmtree(name, dir_fd=directory)
            self._parent = ("/", self._parent[1])
        else:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)

    def _make(
        self, tar: tarfile.TarFile, entry: tarfile.TarInfo, directory: int, name: str
    ) -> None:
        if entry.ischr() or entry.isblk():
            return
        if entry.isdir() and _is_directory(directory, name):
            return self._finish(directory, name, entry)
        self._remove(directory, name)
        if entry.isdir():
            os.mkdir(name, 0o700, dir_fd=directory)
        elif entry.issym():
            os.symlink(entry.linkname, name, dir_fd=directory)
        elif entry.islnk():
            return self._link(entry.linkname, directory, name)
        elif entry.isfifo():
            os.mkfifo(name, 0o600, dir_fd=directory)
        elif entry.isreg():
            _write(tar, entry, directory, name)
        else:
            raise Corrupt(f"{entry.name!r} in a layer is of an unknown kind")
        self._finish(directory, name, entry)

    def _link(self, target: str, directory: int, name: str) -> None:
        parent, _, source = target.rstrip("/").rpartition("/")
        above = open_in_root(self._root, parent or ".")
        try:
            if _is_directory(above, _plain(source)):
                raise Corrupt(f"a layer has a hard link to the directory {target!r}")
            os.link(
                source,
                name,
                src_dir_fd=above,
                dst_dir_fd=directory,
                follow_symlinks=False,
            )
        finally:
            os.close(above)

    def _finish(self, directory: int, name: str, entry: tarfile.TarInfo) -> None:
        if not 0 <= min(entry.uid, entry.gid) <= max(entry.uid, entry.gid) <= LARGEST_ID:
            owner = f"{entry.uid}:{entry.gid}"
            raise Corrupt(f"{entry.name!r} in a layer belongs to {owner}, above {LARGEST_ID}")
        os.chown(name, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
        if not entry.issym():
            os.chmod(name, entry.mode & 0o7777, dir_fd=directory)
        for key, value in entry.pax_headers.items():
            attribute = key.removeprefix(XATTR)
            if attribute != key and _is_kept(attribute):
                data = value.encode(*BINARY)
                path = f"/proc/self/fd/{directory}/{name}"
                os.setxattr(path, attribute, data, follow_symlinks=False)
        if entry.isdir():
            self._times[entry.name.strip("/")] = entry.mtime
        else:
            times = (entry.mtime, entry.mtime)
            os.utime(name, times, dir_fd=directory, follow_symlinks=False)


def open_in_root(root: int, path: str, flags: int = O_PATH_DIRECTORY) -> int:
    """A descriptor of what `path` means to a process whose root is `root`: a directory, unless
    `flags` say otherwise."""
    how = _How(flags, 0, RESOLVE_IN_ROOT)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    found = int(_libc.syscall(SYS_OPENAT2, root, os.fsencode(path), ctypes.byref(how), size))
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return found


def _plain(name: str) -> str:
    """A name that means an entry of its directory, and nothing else."""
    if name in ("", ".", ".."):
        raise Corrupt(f"a layer has an entry named {name!r}")
    return name


def _is_directory(directory: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _write(tar: tarfile.TarFile, entry: tarfile.TarInfo, directory: int, name: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    content = tar.extractfile(entry)
    assert content is not None
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
