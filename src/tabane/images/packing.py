"""Packing an image for its journey to a node: from what the author wrote to a digest.

    rootfs:DIR            a directory tree, packed into an image of one layer
    oci:DIR[:TAG]         an OCI image layout directory
    archive:FILE[:TAG]    a tar of a layout, or what `docker save` writes
    wasm:FILE             a WebAssembly module or component, packed into an image of one file
    solo5:FILE            a solo5 unikernel, likewise

The same tree gives the same digest everywhere: names are sorted, times are whole seconds, numbers
instead of names for owners. Times are kept, since programs look at them (Python's compiled files
are stale when their source's time differs).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tabane.errors import UsageError
from tabane.images import layout, oci, rootfs
from tabane.images.programs import HEAD_BYTES, platform_of

KINDS = ("rootfs", "oci", "archive", "wasm", "solo5")


class Packed:
    """An image ready to be sent. Close it (or leave its block) to remove what was made for it."""

    def __init__(self, digest: str, blobs: dict[str, Path], made: Path | None = None) -> None:
        self.digest = digest
        self.bytes = sum(path.stat().st_size for path in blobs.values())
        self._blobs = blobs
        self._made = made

    def chunks(self) -> Iterator[bytes]:
        """A tar stream for `ImageStore.import_layout`."""
        return layout.stream(self.digest, self._blobs)

    def close(self) -> None:
        """Idempotent."""
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def pack(source: str, base: Path) -> Packed:
    """Pack `source` (see the module's text); relative paths are relative to `base`.

    Blocking: call it where that does no harm. Raises `UsageError` (wrong source, nothing for this
    platform) or `Corrupt` (missing or truncated parts).
    """
    kind, _, rest = source.partition(":")
    if kind not in KINDS or not rest:
        forms = ", ".join(f"{kind}:PATH" for kind in KINDS)
        raise UsageError(f"image source {source!r} is none of {forms}, host")
    made = Path(tempfile.mkdtemp(prefix="tabane-image-"))
    try:
        if kind == "rootfs":
            return _pack_rootfs(_existing(base / rest, source), made)
        if kind in (oci.WASM, oci.SOLO5):
            return _pack_program(kind, _existing(base / rest, source), made)
        path, tag = _split_tag(base / rest, source)
        if kind == "oci":
            made.rmdir()
            return _from_layout(path, tag, source, None)
        _unpack_archive(path, made / "layout", source)
        return _from_layout(made / "layout", tag, source, made)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _existing(path: Path, source: str) -> Path:
    if not path.exists():
        raise UsageError(f"image source {source!r}: {path} does not exist")
    return path


def _split_tag(path: Path, source: str) -> tuple[Path, str]:
    """A path may contain colons, so what exists decides where the tag begins."""
    if path.exists():
        return path, ""
    name, _, tag = str(path).rpartition(":")
    if name and "/" not in tag and Path(name).exists():
        return Path(name), tag
    return _existing(path, source), ""


def _from_layout(directory: Path, tag: str, source: str, made: Path | None) -> Packed:
    digest, manifest, _ = layout.find_manifest(directory, tag, source)
    digests = (digest, *manifest.digests())
    return Packed(digest, {d: layout.blob_path(directory, d) for d in digests}, made)


def _unpack_archive(archive: Path, directory: Path, source: str) -> None:
    if not _is_docker_archive(archive):
        layout.extract(archive, directory, source)
        return
    if shutil.which("skopeo") is None:
        raise UsageError(f"{source} is of the kind `docker save` writes: install skopeo to read it")
    options = ("--dest-oci-accept-uncompressed-layers", "--quiet")
    argv = ("skopeo", "copy", *options, f"docker-archive:{archive}", f"oci:{directory}:latest")
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UsageError(f"skopeo cannot read {source}: {words[0]}")


def _is_docker_archive(archive: Path) -> bool:
    """Docker's own format; since version 25 `docker save` writes a layout as well."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            names = {member.name.removeprefix("./") for member in tar}
    except (tarfile.TarError, EOFError):
        return False
    return "manifest.json" in names and "index.json" not in names


def _pack_rootfs(tree: Path, made: Path) -> Packed:
    if not tree.is_dir():
        raise UsageError(f"rootfs:{tree} is not a directory")
    return _pack_tree(tree, made, oci.NATIVE, None)


def _pack_program(kind: str, program: Path, made: Path) -> Packed:
    """As runtimes elsewhere take them too: one file in one layer, named by the entrypoint."""
    if not program.is_file():
        raise UsageError(f"{kind}:{program} is not a file")
    with program.open("rb") as file:
        platform = platform_of(kind, file.read(HEAD_BYTES), f"{kind}:{program}")
    tree = made / "tree"
    tree.mkdir()
    name = program.name if oci.FILE_NAME.fullmatch(program.name) else oci.PROGRAM
    shutil.copyfile(program, tree / name)
    (tree / name).chmod(0o755)
    for path in (tree / name, tree):
        os.utime(path, (0, 0))
    return _pack_tree(tree, made, platform, oci.Process(entrypoint=(f"/{name}",)))


def _pack_tree(
    tree: Path, made: Path, platform: oci.Platform, process: oci.Process | None
) -> Packed:
    """An image of one layer that has what is in `tree`."""
    directory = made / "layout"
    (directory / "blobs/sha256").mkdir(parents=True)
    with (made / "layer").open("w+b") as file:
        rootfs.write_layer(tree, file)
        file.seek(0)
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        layer = oci.Descriptor(oci.LAYER, digest, os.fstat(file.fileno()).st_size)
    (made / "layer").rename(layout.blob_path(directory, digest))
    root = oci.RootFs((digest,))
    config = oci.encode(oci.Config(platform.architecture, platform.os, root, process))
    manifest = oci.encode(oci.Manifest(oci.describe(oci.CONFIG, config), (layer,)))
    for data in (config, manifest):
        layout.blob_path(directory, oci.digest_of(data)).write_bytes(data)
    digests = (oci.digest_of(manifest), oci.digest_of(config), digest)
    return Packed(digests[0], {d: layout.blob_path(directory, d) for d in digests}, made)
