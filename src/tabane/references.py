"""Names of images in registries, as `docker://registry.example.com/team/app:1.2`. Pure.

The grammar is the distribution project's, but the registry is always named: which one a short name
means differs from machine to machine.
"""

from __future__ import annotations

import ipaddress
import re

from tabane.errors import UsageError
from tabane.model import Value
from tabane.units import shorten

SCHEME = "docker://"
LATEST = "latest"
_HOST = re.compile(
    r"(?P<name>[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-f:]+\])(?::\d{1,5})?"
)
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
LONGEST = 255
"""Of a registry's and a repository's name together."""


class Reference(Value, frozen=True):
    """An image in a registry. `digest` decides, where there is one."""

    host: str
    repository: str
    tag: str = LATEST
    digest: str = ""

    def __str__(self) -> str:
        version = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{SCHEME}{self.host}/{self.repository}{version}"

    def at(self, digest: str) -> Reference:
        """The image with that digest in the same repository."""
        return Reference(self.host, self.repository, self.tag, digest)

    @property
    def is_local(self) -> bool:
        """Whether its registry is on this machine's loopback."""
        name = _HOST.fullmatch(self.host)
        assert name is not None
        bare = name["name"].strip("[]")
        try:
            return ipaddress.ip_address(bare).is_loopback
        except ValueError:
            return bare == "localhost"


def parse_reference(text: str) -> Reference:
    """Raises `UsageError`."""
    rest = text.removeprefix(SCHEME)
    rest, at, digest = rest.partition("@")
    host, _, path = rest.partition("/")
    repository, _, tag = path.partition(":")
    parts = repository.split("/")
    fits = text.startswith(SCHEME) and _HOST.fullmatch(host) and len(f"{host}/{path}") <= LONGEST
    if not (fits and all(map(_REPOSITORY.fullmatch, parts))):
        raise UsageError(
            f"{shorten(text)} is no image of a registry: write docker://HOST/REPOSITORY:TAG, "
            "with the registry's name, as docker://registry.example.com/team/app:1.2"
        )
    if not (_is_registry(host)):
        raise UsageError(
            f"{shorten(text)} does not say which registry: the name of one, as "
            f"registry.example.com, has a dot or a port, which {host} has not"
        )
    if ":" in path and not _TAG.fullmatch(tag):
        raise UsageError(f"{shorten(tag)} is no tag: up to 128 of letters, digits, _, . and -")
    if at and not _DIGEST.fullmatch(digest):
        raise UsageError(f"{shorten(digest)} is no digest: sha256: and 64 hex digits")
    return Reference(host, repository, tag or LATEST, digest)


def _is_registry(host: str) -> bool:
    return "." in host or ":" in host or host == "localhost"
