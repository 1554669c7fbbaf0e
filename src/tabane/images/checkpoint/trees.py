"""The directory of a dump: looked through, read window by window, and written again.

Reading and writing go through a few threads, each of which has one window in memory at a time. What
is zero is never read from a hole, nor written: files are as sparse as they can be, by pages.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, get_native_id

from tabane.errors import Corrupt, UsageError
from tabane.images.checkpoint.manifest import Piece, Stream

WORKERS = 2
PAGE = 4096
ZEROS = bytes(PAGE)
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class GivenUp(Exception):
    """Nobody waits for it any more."""


def survey(directory: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Files and their sizes, and directories, as paths below `directory`. Raises `UsageError` for
    anything else that is there."""
    sizes: dict[str, int] = {}
    directories: list[str] = []
    todo = [""]
    while todo:
        above = todo.pop()
        with os.scandir(directory / above) as entries:
            for entry in entries:
                path = f"{above}/{entry.name}" if above else entry.name
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    directories.append(path)
                    todo.append(path)
                elif stat.S_ISREG(found.st_mode) and _is_text(path):
                    sizes[path] = found.st_size
                else:
                    raise UsageError(f"a checkpoint has files and directories: {path!r} is neither")
    return sizes, tuple(sorted(directories))


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def for_each(
    windows: Sequence[int], work: Callable[[int], object], stop: Event, niceness: int = 0
) -> None:
    """Do `work` for each window, several at a time; raises what went wrong first, or `GivenUp`.
    What is being done then is done to its end."""
    waiting = iter(windows)
    failed = Event()

    def run() -> None:
        if niceness:
            os.setpriority(os.PRIO_PROCESS, get_native_id(), niceness)  # of this thread alone
        for window in waiting:
            if stop.is_set():
                raise GivenUp
            if failed.is_set():
                return
            try:
                work(window)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(WORKERS, "checkpoint") as pool:
        for done in [pool.submit(run) for _ in range(WORKERS)]:
            done.result()


def read_window(directory: Path, stream: Stream, window: int) -> bytearray | None:
    """None: it is all zeros. Raises `Corrupt` when a file is shorter than it was."""
    pieces = [*stream.pieces(window)]
    if len(pieces) == 1 and _is_hole(directory, pieces[0]):
        return None
    data = bytearray(stream.window_size(window))
    view = memoryview(data)
    for piece in pieces:
        into = view[piece.window_offset : piece.window_offset + piece.size]
        _fill(directory / piece.path, piece.file_offset, into)
    return data if any_bits(data) else None


def _is_hole(directory: Path, piece: Piece) -> bool:
    file = os.open(directory / piece.path, READ)
    try:
        return os.lseek(file, piece.file_offset, os.SEEK_DATA) >= piece.file_offset + piece.size
    except OSError as error:
        if error.errno == errno.ENXIO:  # there is nothing but a hole up to its end
            return True
        raise
    finally:
        os.close(file)


def _fill(path: Path, offset: int, into: memoryview) -> None:
    file = os.open(path, READ)
    try:
        done = 0
        while done < len(into):
            count = os.preadv(file, [into[done:]], offset + done)
            if not count:
                raise Corrupt(f"{path} became shorter while it was read")
            done += count
    finally:
        os.close(file)


def any_bits(data: bytes | bytearray) -> bool:
    """Whether anything in it is not zero."""
    return data[:PAGE] != ZEROS[: len(data)] or data != bytes(len(data))


def make_files(directory: Path, directories: Iterable[str], stream: Stream) -> None:
    """All files, with nothing in them yet, and what they are in; nobody else may see them."""
    for path in directories:
        (directory / path).mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in stream.files:
        made = WRITE | os.O_CREAT | os.O_EXCL
        descriptor = os.open(directory / file.path, made, 0o600)
        try:
            os.ftruncate(descriptor, file.size)
        finally:
            os.close(descriptor)


def write_window(directory: Path, stream: Stream, window: int, data: bytes) -> None:
    view = memoryview(data)
    for piece in stream.pieces(window):
        part = view[piece.window_offset : piece.window_offset + piece.size]
        file = os.open(directory / piece.path, WRITE)
        try:
            for start, end in runs(part, piece.file_offset):
                write_all(file, part[start:end], piece.file_offset + start)
        finally:
            os.close(file)


def runs(data: memoryview, offset: int = 0) -> Iterator[tuple[int, int]]:
    """Where `data`, which is at `offset` of its file, has pages with something in them."""
    begin: int | None = None
    at = 0
    while at < len(data):
        end = min(len(data), at + PAGE - (offset + at) % PAGE)
        page = bytes(data[at:end])
        if page != ZEROS[: end - at]:
            begin = at if begin is None else begin
        elif begin is not None:
            yield begin, at
            begin = None
        at = end
    if begin is not None:
        yield begin, at


def write_all(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


def give_to(directory: Path, group: int) -> int:
    """Let the members of a group read all of it, and nobody but its owner write. Returns what it
    takes, in bytes."""
    size = 0
    for above, directories, files in os.walk(directory):
        for name in directories:
            _give(Path(above, name), group, 0o750)
        for name in files:
            file = Path(above, name)
            _give(file, group, 0o640)
            size += file.stat(follow_symlinks=False).st_blocks * 512
    _give(directory, group, 0o750)
    return size


def _give(path: Path, group: int, mode: int) -> None:
    os.chown(path, 0 if os.geteuid() == 0 else -1, group, follow_symlinks=False)
    path.chmod(mode)
