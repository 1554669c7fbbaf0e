"""Trees of unpacked images: made whole or not at all, with what they take written beside them."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tabane.errors import UsageError
from tabane.images import layers, oci
from tabane.images.programs import HEAD_BYTES, platform_of
from tabane.images.rootfs import O_PATH_DIRECTORY, Spend, open_in_root
from tabane.runtimes.api import Image

SIZE = "bytes"

_libc = ctypes.CDLL(None, use_errno=True)


def unpack(
    place: Path,
    manifest: oci.Manifest,
    config: oci.Config,
    blob: Callable[[str], Path],
    spend: Spend,
) -> None:
    """Make `place/rootfs`. `spend` as of `layers.unpack`; raises as that."""
    tree = place / "rootfs"
    tree.mkdir()
    place.chmod(0o755)
    tree.chmod(0o755)
    if (program := oci.program_of(manifest)) is not None:
        spend(program.size)
        shutil.copyfile(blob(program.digest), tree / oci.name_program(program))
        return
    for layer, diff_id in zip(manifest.layers, config.rootfs.diff_ids, strict=True):
        layers.unpack(blob(layer.digest), diff_id, tree, spend)


def check_program(tree: Path, image: Image) -> None:
    """Whether an image that is a program has one, by its first bytes. Raises `UsageError`."""
    if image.kind == oci.LINUX:
        return
    if not image.entrypoint:
        raise UsageError(f"image {image.digest[:19]} names no program: give it an entrypoint")
    platform_of(image.kind, _head(tree, image.entrypoint[0]), image.entrypoint[0])


def _head(tree: Path, path: str) -> bytes:
    """The first bytes of what `path` means in the tree."""
    root = os.open(tree, O_PATH_DIRECTORY)
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        with os.fdopen(open_in_root(root, path, flags), "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise UsageError(f"the image has no program {path!r}: {error.strerror}") from None
    finally:
        os.close(root)


def finish(place: Path, size: int) -> None:
    """Note what it takes, and have all of it on disk."""
    (place / SIZE).write_text(str(size))
    sync_file_system(place)


def measure(directory: Path) -> int:
    """What an image takes beside its blobs: its tree, and what drivers keep of it."""
    total = 0
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(directory):
            if entry.name == SIZE:
                total += int(Path(entry.path).read_text() or 0)
            elif entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def sync_file_system(path: Path) -> None:
    """Everything below is on disk before it gets its final name: one call for all its files."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(directory) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(directory)
