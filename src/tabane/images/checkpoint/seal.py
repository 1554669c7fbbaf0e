"""What is written to disk is sealed with the node's key: nobody reads it or changes it without.

A sealed blob is a nonce and AES-256-GCM's ciphertext of one byte, which says whether the rest is
compressed, and the rest. Its *label*, by which it is stored, is authenticated as well, so that one
blob cannot stand in another's place. Nonces are random: 2^32 blobs (1 PiB of chunks) are safe with
one key (NIST SP 800-38D, 8.3).

A chunk's name is an HMAC of its digest, with a key of its own: equal chunks of one node meet, but
who only has the disk cannot find out whether it has a page that he guesses, nor whether two nodes
have the same.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tabane.errors import Corrupt, Denied

if TYPE_CHECKING:
    import zstandard

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
RAW, ZSTD = b"\0", b"\1"
LEVEL = 1
WORTH = 0.9
"""What compresses to more of its size is kept as it is, and opened sooner."""


class Damaged(Corrupt):
    """A blob is not what was sealed under its label. `chunk`: the digest of what it should be, if
    it is one."""

    def __init__(self, message: str, chunk: str = "") -> None:
        super().__init__(message)
        self.chunk = chunk


class Sealer:
    """See the module's text. May be used in many threads at once."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._name_key = hmac.digest(key, b"tabane checkpoint: names", "sha256")
        self.fingerprint = hmac.digest(key, b"tabane checkpoint: key", "sha256").hex()
        self._cipher = AESGCM(hmac.digest(key, b"tabane checkpoint: contents", "sha256"))
        self._threads = threading.local()

    def name(self, digest: bytes) -> bytes:
        """By which what has this SHA-256 is stored."""
        return hmac.digest(self._name_key, digest, "sha256")

    def seal(self, label: bytes, data: bytes | bytearray | memoryview) -> bytes:
        packed = self._compressor().compress(data)
        body = ZSTD + packed if len(packed) < WORTH * len(data) else RAW + data
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, body, label)

    def unseal(self, label: bytes, blob: bytes, most_bytes: int) -> bytes:
        """Raises `Damaged`. `most_bytes`: how much it can be."""
        from cryptography.exceptions import InvalidTag

        if len(blob) <= NONCE_BYTES + TAG_BYTES:
            raise Damaged("it is cut off")
        try:
            body = self._cipher.decrypt(blob[:NONCE_BYTES], blob[NONCE_BYTES:], label)
        except InvalidTag:
            raise Damaged("it is not what was sealed with this node's key") from None
        if body[:1] == RAW:
            return body[1:]
        return self._decompressor().decompress(memoryview(body)[1:], max_output_size=most_bytes)

    def _compressor(self) -> zstandard.ZstdCompressor:
        """One for each thread, as it may not be used in two at once."""
        if not hasattr(self._threads, "compressor"):
            import zstandard

            self._threads.compressor = zstandard.ZstdCompressor(level=LEVEL)
        found: zstandard.ZstdCompressor = self._threads.compressor
        return found

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        if not hasattr(self._threads, "decompressor"):
            import zstandard

            self._threads.decompressor = zstandard.ZstdDecompressor()
        found: zstandard.ZstdDecompressor = self._threads.decompressor
        return found


def load_key(path: Path) -> bytes:
    """The node's key, made if there is none yet. Raises `Denied` when others could have read it,
    `Corrupt` for what is none, or a link to nothing."""
    if not path.exists():
        if path.is_symlink():
            raise Corrupt(f"{path} is a link to nothing: mount what has the key, or remove it")
        _make_key(path)
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise Denied(
                f"{path}, the key of this node's checkpoints, can be read by others: remove it and "
                "the checkpoints, so that new ones are made, or `chmod 600` it"
            )
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise Corrupt(
            f"{path} is no key of {KEY_BYTES} bytes: put the right one back, or remove it"
        )
    return key


def _make_key(path: Path) -> None:
    """Whole or not at all, and never over one that is there."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Names in it are on disk then."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(data).digest()
