"""What a node remembers of an instance on disk, and what the instance said last."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from tabane.model import App, Instance, Resources, Value
from tabane.node.logfile import parse_line
from tabane.runtimes.api import Handle, Image, Link, Sidecar

LAST_LINE_BYTES = 4096


class Record(Value, frozen=True):
    """All that the next agent needs to adopt an instance, or to clear it away."""

    instance: Instance
    app: App
    image: Image
    link: Link | None = None
    handle: Handle | None = None
    sidecar_images: tuple[Image, ...] = ()
    """Of `app.containers`."""
    restored: str = ""
    """Digest of the checkpoint that it begins from, if it does."""
    resumed: bool = False
    """It was put away, and goes on."""
    ordered: Resources | None = None
    """The limits that somebody ordered for it while it ran: they stand, and follow nothing."""

    @property
    def resources(self) -> Resources:
        """The limits it is to have now, whatever follows its sessions."""
        return self.ordered or self.app.resources

    @property
    def sidecars(self) -> tuple[Sidecar, ...]:
        pairs = zip(self.app.containers, self.sidecar_images, strict=True)
        return tuple(Sidecar(each.name, self.app.beside(each), image) for each, image in pairs)

    @property
    def digests(self) -> set[str]:
        """Of the images that it is made from."""
        return {self.image.digest, *(image.digest for image in self.sidecar_images)}


encode_record = msgspec.json.Encoder(enc_hook=str).encode
parse_record = msgspec.json.Decoder(Record, dec_hook=lambda kind, text: kind(text)).decode


def write_record(directory: Path, record: Record) -> None:
    """Whole or not at all; on the way of every wake, so without pathlib."""
    path = f"{directory}/record"
    descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, encode_record(record))
    finally:
        os.close(descriptor)
    os.rename(f"{path}.new", f"{path}.json")  # noqa: PTH104


def read_record(path: Path) -> Record | None:
    """None for a record that another version wrote. Raises `OSError`."""
    try:
        return parse_record(path.read_bytes())
    except msgspec.DecodeError:
        return None


def last_line(log: Path) -> str:
    """The last line a program wrote, for an error message; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LAST_LINE_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        parsed = parse_line(line)
        if parsed is not None and parsed[3].strip():
            return parsed[3].decode(errors="replace").strip()[:200]
    return ""
