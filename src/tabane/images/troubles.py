"""What went wrong with a registry, in one sentence that says what to do.

skopeo tells it in words only, so here, and nowhere else, words are looked at: those that the
distribution specification gives its error codes, and those of the Go library for the rest. What is
not known is passed on as skopeo said it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tabane.errors import (
    Busy,
    Corrupt,
    Denied,
    EngineError,
    NotFound,
    TabaneError,
    Unreachable,
    Unsupported,
)
from tabane.images.room import NoRoom
from tabane.references import Reference

LOG_LINE = re.compile(r'level=fatal msg="(?P<message>(?:[^"\\]|\\.)*)"')


class Trouble(NamedTuple):
    """`words` of skopeo's, any case; what it means: `{reference}`, `{host}`, `{words}` are filled
    in."""

    words: str
    kind: type[TabaneError]
    meaning: str


TROUBLES = (
    Trouble(
        r"no space left on device|disk quota exceeded",
        NoRoom,
        "{reference}: the disk is full: remove what is not needed there",
    ),
    Trouble(
        r"manifest unknown|name unknown|repository name not known|blob unknown|not found",
        NotFound,
        "{host} has no image {reference}: look at its name and tag",
    ),
    Trouble(
        r"unauthorized|authentication required|denied|forbidden|invalid username/password|"
        r"no basic auth credentials|status ?code: ?40[13]",
        Denied,
        "{host} does not let us have {reference}: log in on the node (`skopeo login {host}`), or "
        "name a file with a login that may (--authfile)",
    ),
    Trouble(
        r"toomanyrequests|too many requests",
        Busy,
        "{host} wants fewer requests: try again later, or log in there",
    ),
    Trouble(
        r"digest did not match|does not match|digest mismatch|invalid checksum|"
        r"provided digest did not",
        Corrupt,
        "{reference} is damaged in its registry, something is not what its digest says: push it "
        "again",
    ),
    Trouble(
        r"server gave http response to https client",
        Unsupported,
        "{host} speaks no TLS: have it do so, or say `insecure = true` for it in "
        "/etc/containers/registries.conf of each node",
    ),
    Trouble(
        r"x509:|certificate|tls:",
        Unsupported,
        "{host} cannot prove who it is: put its authority's certificate into "
        "/etc/containers/certs.d/{host}/ of each node ({words})",
    ),
    Trouble(
        r"connection refused|no such host|no route to host|network is unreachable|timeout|"
        r"timed out|connection reset|broken pipe|eof|server misbehaving|"
        r"(?:unexpected http status|status ?code):? ?5\d\d|5\d\d (?:internal|bad|service|gateway)",
        Unreachable,
        "{host} cannot be reached, or breaks off, also when asked again ({words})",
    ),
    Trouble(
        r"manifest invalid|unsupported",
        Unsupported,
        "{host} does not take this image: {words}",
    ),
)
"""The first whose words are found."""


def explain(output: str, reference: Reference, argv: tuple[str, ...]) -> TabaneError:
    """What skopeo's last words mean, when it failed at something about `reference`."""
    words = _last_words(output)
    for trouble in TROUBLES:
        if re.search(trouble.words, words, re.IGNORECASE):
            short = words.rpartition(": ")[2] if trouble.kind is Unreachable else words
            filled = {"reference": str(reference), "host": reference.host, "words": short}
            return trouble.kind(trouble.meaning.format(**filled))
    return EngineError(f"{reference}: skopeo failed: {words}", argv=argv, output=words)


def _last_words(output: str) -> str:
    lines = output.strip().splitlines() or ["it gave no reason"]
    found = LOG_LINE.search(lines[-1])
    return found["message"].replace('\\"', '"') if found else lines[-1].strip()
