"""The host's parsers of HTTP and CGI heads, with sanitizers, over what nobody would send."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest

from tabane.runtimes.unikernel.host import HOST

pytestmark = pytest.mark.real

SOURCES = HOST.parent / "host"
HARNESS = Path(__file__).parent / "wasm/parse.c"
SANITIZERS = "-fsanitize=address,undefined"
ROUNDS = 4000
PIECES = (
    *(b"GET ", b"/", b"%41", b"%", b"?a=b", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\r"),
    *(b"Host: x", b"Content-Length: ", b"5", b"99999999999999999999", b"Cookie: a", b": ", b":"),
    *(b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Status: ", b"404 No", b"-1"),
    *(b"Location: /", b"Content-Type: t", b"Proxy: p", b"X" * 300, b"\xff\x80", b"\t", b" "),
)


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("parser") / "parse"
    flags = ("-g", "-O1", "-std=gnu11", SANITIZERS, "-fno-sanitize-recover=all", f"-I{SOURCES}")
    argv = ("gcc", *flags, "-o", str(target), str(HARNESS), str(SOURCES / "cgi.c"))
    subprocess.run(argv, check=True, timeout=60)
    return target


def parse(parser: Path, *heads: tuple[bytes, bytes]) -> list[str]:
    """A line for each (kind, text)."""
    fed = b"".join(kind + struct.pack("=I", len(text)) + text for kind, text in heads)
    done = subprocess.run((str(parser),), input=fed, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode("latin-1").splitlines()


def test_requests(parser: Path) -> None:
    plain = b"GET http://there/a%20b?c HTTP/1.1\r\nX-A: 1\r\nx-a:  2 \r\nContent-Type: t\r\n\r\n"
    (line,) = parse(parser, (b"q", plain))
    assert line.split("|") == [
        *("0", "REQUEST_METHOD=GET", "SERVER_PROTOCOL=HTTP/1.1"),
        *("REQUEST_URI=http://there/a%20b?c", "PATH_INFO=/a b", "QUERY_STRING=c"),
        *("HTTP_X_A=1, 2", "CONTENT_TYPE=t"),
    ]


def test_answers(parser: Path) -> None:
    heads = (b"Status: 404 No\n\n", b"Location: /x\r\n\r\n", b"A: b\n\n", b"nothing\n\n", b"\n\n")
    lines = parse(parser, *((b"a", head) for head in heads), (b"a", b"Status: 99\n\n"))
    assert lines == ["0 404", "0 302", "0 200", "-1 0", "-1 0", "-1 0"]


def test_any_bytes(parser: Path) -> None:
    """Each is taken or refused; nothing else happens."""
    rng = random.Random(5)
    heads = [
        (rng.choice((b"q", b"a")), b"".join(rng.choices(PIECES, k=rng.randrange(40)))[:32000])
        for _ in range(ROUNDS)
    ]
    whole = b"POST /a%41?b HTTP/1.1\r\nHost: x\r\nCookie: a\r\nCookie: b\r\n\r\n"
    heads += [(b"q", whole[:size]) for size in range(len(whole))]
    heads += [(b"q", b"GET / HTTP/1.1\r\nA: " + b"y" * 31000 + b"\r\n" * 2)]
    heads += [(b"a", b"A: " + b"y" * 32000 + b"\r\n" * 2)]
    heads = [(kind, text.replace(b"\0", b"")) for kind, text in heads]
    lines = parse(parser, *heads)
    assert len([line for line in lines if line[:1].isdigit() or line[:1] == "-"]) >= len(heads)
