from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from tabane.errors import Denied, Unauthenticated
from tabane.security.identity import (
    Principal,
    check_bearer,
    check_origin,
    new_token,
    peer_principal,
    read_token,
)

HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


def test_the_kernel_says_who_is_at_the_other_end_of_a_pair() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_principal(ours) == Principal("peer", os.getuid(), os.getgid(), os.getpid())


def test_the_kernel_says_who_has_connected(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        accepted, _ = listener.accept()
        with accepted:
            assert peer_principal(accepted).pid == os.getpid()


@pytest.mark.real
def test_the_peers_user_is_the_one_it_had_when_it_connected() -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")
        listener.listen()
        os.setegid(4321)
        os.seteuid(1234)
        try:
            client.connect(listener.getsockname())
        finally:
            os.seteuid(0)
            os.setegid(0)
        accepted, _ = listener.accept()
        with accepted:
            principal = peer_principal(accepted)
    assert principal == Principal("peer", 1234, 4321, os.getpid())
    assert not principal.is_root


def test_who_may_do_everything() -> None:
    assert Principal("token").is_root
    assert Principal("member").is_root
    assert Principal("peer", 0).is_root
    assert Principal("peer", os.geteuid()).is_root
    assert not Principal("peer", os.geteuid() + 1).is_root
    assert not Principal("peer").is_root


def test_tokens_are_long_and_fresh() -> None:
    assert new_token() != new_token()
    assert len(new_token()) >= 43


def test_a_token_is_read_from_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret\n")
    path.chmod(0o600)
    assert read_token(path) == "secret"
    for mode in (stat.S_IRGRP, stat.S_IROTH, stat.S_IWOTH):
        path.chmod(0o600 | mode)
        with pytest.raises(Denied, match="chmod 600"):
            read_token(path)


@pytest.mark.parametrize("header", ["Bearer secret", "bearer secret", "BEARER  secret "])
def test_the_bearer_of_the_token_is_known(header: str) -> None:
    assert check_bearer(header, "secret") == Principal("token")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "secret",
        "Bearer",
        "Bearer ",
        "Bearer secre",
        "Bearer secrets",
        "Basic secret",
        "ÿ",
    ],
)
def test_nobody_else_is(header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        check_bearer(header, "secret")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost"},
        {"host": "localhost:8000"},
        {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"},
        {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
        {"host": "[::1]"},
    ],
)
def test_requests_for_this_port_pass(headers: dict[str, str]) -> None:
    check_origin(headers, HOSTS)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "evil.test"},
        {"host": "localhost.evil.test"},
        {"host": "evil.test:localhost"},
        {"host": "[::1.evil.test]"},
        {"host": "localhost", "origin": "http://evil.test"},
        {"host": "localhost", "origin": "null"},
        {"host": "localhost", "origin": ""},
        {"host": "localhost", "origin": "http://evil.test/http://localhost"},
        {"host": "localhost", "origin": "http://localhost@evil.test"},
    ],
)
def test_foreign_ones_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(Denied):
        check_origin(headers, HOSTS)
