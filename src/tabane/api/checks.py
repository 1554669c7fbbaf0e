"""What a request may name, and say. What it may not is the asker's mistake, and a path is made of
nothing else."""

from __future__ import annotations

import re

from tabane.errors import UsageError
from tabane.images.oci import DIGEST
from tabane.model import InstanceId
from tabane.units import shorten

INSTANCE = re.compile(r"[0-9a-z]([0-9a-z-]{0,62}[0-9a-z])?")
CONTAINER = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
MAX_WORD_BYTES = (128 << 10) - 1
"""The longest word that execve(2) takes (MAX_ARG_STRLEN)."""
MAX_WORDS_BYTES = 1 << 20
"""Of all words of a command: half of what Linux takes as a rule, which environments share."""


def check_instance(text: str) -> InstanceId:
    """Raises `UsageError`."""
    if not INSTANCE.fullmatch(text):
        raise UsageError(f"{shorten(text)} is no instance's id, which has up to 64 of a-z, 0-9, -")
    return InstanceId(text)


def check_container(text: str) -> str:
    """The name of a container of an instance; empty: its main one's. Raises `UsageError`."""
    if text and not CONTAINER.fullmatch(text):
        raise UsageError(
            f"{shorten(text)} is no container's name, which has up to 63 of a-z, 0-9, -"
        )
    return text


def check_digest(text: str) -> str:
    """Raises `UsageError`."""
    if not DIGEST.fullmatch(text):
        raise UsageError(f"{shorten(text)} is not a digest: sha256: and 64 hex digits")
    return text


def check_command(argv: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a command, as the kernel takes them. Raises `UsageError`."""
    sizes = [len(check_text("argv", word).encode()) for word in argv]
    if max(sizes) > MAX_WORD_BYTES or sum(sizes) > MAX_WORDS_BYTES:
        limits = f"{MAX_WORD_BYTES} bytes a word and {MAX_WORDS_BYTES} in all"
        raise UsageError(f"too long: at most {limits}; give it as the command's input")
    return argv


def check_env(env: dict[str, str]) -> tuple[str, ...]:
    """As `NAME=value`. Raises `UsageError`."""
    for name in env:
        if not name or "=" in name:
            raise UsageError(f"env: {shorten(name)} is no variable's name")
    entries = tuple(check_text("env", f"{name}={value}") for name, value in env.items())
    return check_command(entries) if entries else ()


def check_text(field: str, text: str) -> str:
    """Raises `UsageError` for what no program can be given."""
    if "\0" in text:
        raise UsageError(f"{field}: {shorten(text)} has a NUL in it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{field}: half a character (a lone surrogate) is no text") from None
    return text
