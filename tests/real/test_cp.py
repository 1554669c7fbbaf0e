"""`tabane cp` both ways, as whom, and what an instance may not do with it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.real.conftest import HTTPD, LocalCluster

from tabane.testing.talks import make_archive

pytestmark = pytest.mark.real

MTIME_NS = 1_234_567_890_123_456_789


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


@pytest.fixture(scope="module")
def awake(cluster: LocalCluster) -> dict[str, Any]:
    cluster.deploy("files", HTTPD, resources={"memory": "64MiB", "disk": "8MiB"})
    return cluster.wake("files", at="ishikari")


def inside(cluster: LocalCluster, script: str, *options: str) -> str:
    ended = cluster.tabane("exec", *options, "files", "sh", "-c", script)
    assert ended.code == 0, ended
    return ended.out


def good(ended: Any) -> None:
    assert ended == (0, "", "")


def piped(
    cluster: LocalCluster, *argv: str, given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(cluster.root), *argv]
    return subprocess.run(command, input=given, capture_output=True, timeout=60)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "below").mkdir(parents=True)
    (root / "below" / "script").write_text("#!/bin/sh\necho hi\n")
    (root / "below" / "script").chmod(0o755)
    (root / "ümlaut\n").write_bytes(b"\0\xff")
    (root / "link").symlink_to("below/script")
    os.utime(root / "below" / "script", ns=(MTIME_NS, MTIME_NS))
    return root


def test_there_and_back(
    cluster: LocalCluster, awake: dict[str, Any], tree: Path, tmp_path: Path
) -> None:
    good(cluster.tabane("cp", str(tree), "files:/srv/copy"))
    assert inside(cluster, "/srv/copy/link; stat -c '%a %u %Y' /srv/copy/below/script") == (
        "hi\n755 0 1234567890\n"
    )
    good(cluster.tabane("cp", f"{awake['id']}:/srv/copy", str(tmp_path / "back")))
    back = tmp_path / "back"
    assert (back / "below" / "script").stat().st_mtime_ns == MTIME_NS
    assert stat.S_IMODE((back / "below" / "script").stat().st_mode) == 0o755
    assert (back / "ümlaut\n").read_bytes() == b"\0\xff"
    assert (back / "link").readlink() == Path("below/script")
    (tmp_path / "here").mkdir()
    good(cluster.tabane("cp", "files:srv/copy/below", str(tmp_path / "here")))
    assert (tmp_path / "here" / "below" / "script").exists()
    good(cluster.tabane("cp", "files:/srv/copy/below/.", str(tmp_path / "here")))
    assert (tmp_path / "here" / "script").exists()
    good(cluster.tabane("cp", "files:/srv/copy/link", str(tmp_path / "file")))
    assert (tmp_path / "file").read_text().endswith("echo hi\n")


def test_names_as_of_cp(cluster: LocalCluster, awake: dict[str, Any], tree: Path) -> None:
    file = str(tree / "below" / "script")
    inside(cluster, "mkdir -p /tmp/names/there")
    good(cluster.tabane("cp", file, "files:/tmp/names/there"))
    good(cluster.tabane("cp", file, "files:/tmp/names/other"))
    good(cluster.tabane("cp", f"{tree}/.", "files:/tmp/names/there"))
    assert inside(cluster, "cd /tmp/names; echo *; cd there; echo *").splitlines() == [
        "other there",
        "below link script ümlaut",
        "",
    ]
    ended = cluster.tabane("cp", file, "files:/tmp/names/nowhere/")
    assert ended == (1, "", "tabane: cp: /tmp/names/nowhere/: there is no such directory\n")
    ended = cluster.tabane("cp", file, "files:/tmp/nowhere/file")
    assert ended == (1, "", "tabane: cp: /tmp/nowhere: No such file or directory\n")
    ended = cluster.tabane("cp", "files:/tmp/nowhere", ".")
    assert ended == (1, "", "tabane: cp: /tmp/nowhere: No such file or directory\n")
    ended = cluster.tabane("cp", "/tmp/nowhere", "files:/")
    assert (ended.code, ended.err) == (1, "tabane: cp: there is no /tmp/nowhere\n")


def test_streams(cluster: LocalCluster, awake: dict[str, Any], tmp_path: Path) -> None:
    inside(cluster, "mkdir -p /tmp/streams")
    archive = make_archive({"a/b": b"words", "c": b"more"})
    done = piped(cluster, "cp", "-", "files:/tmp/streams", given=archive)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = piped(cluster, "cp", "files:/tmp/streams", "-")
    assert done.returncode == 0
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=done.stdout, check=True)
    assert (tmp_path / "streams" / "a" / "b").read_bytes() == b"words"
    done = piped(cluster, "cp", "-", "files:/tmp/streams", given=archive[:700])
    assert done.returncode == 1
    assert b"broken" in done.stderr or b"breaks off" in done.stderr
    done = piped(cluster, "cp", "-", "files:/tmp/streams/c", given=archive)
    assert (done.returncode, done.stderr) == (1, b"tabane: cp: /tmp/streams/c: Not a directory\n")


def test_as_whom(cluster: LocalCluster, awake: dict[str, Any], tree: Path, tmp_path: Path) -> None:
    file = str(tree / "below" / "script")
    good(cluster.tabane("cp", "-u", "nobody", file, "files:/tmp/its-own"))
    assert inside(cluster, "stat -c %U /tmp/its-own").strip() == "nobody"
    ended = cluster.tabane("cp", "-u", "nobody", file, "files:/etc/its-own")
    assert ended == (1, "", "tabane: cp: script: Permission denied\n")
    inside(cluster, "echo secret >/tmp/secret; chmod 600 /tmp/secret")
    ended = cluster.tabane("cp", "-u", "nobody", "files:/tmp/secret", str(tmp_path))
    assert ended == (1, "", "tabane: cp: /tmp/secret: Permission denied\n")
    inside(cluster, "mkdir /tmp/mixed; cp /tmp/secret /tmp/mixed; echo ok >/tmp/mixed/zzz")
    ended = cluster.tabane("cp", "-u", "nobody", "files:/tmp/mixed", str(tmp_path))
    assert ended == (1, "", "tabane: cp: mixed/secret: Permission denied\n")
    assert (tmp_path / "mixed" / "zzz").read_text() == "ok\n"
    ended = cluster.tabane("cp", "-u", "nosuch", file, "files:/tmp")
    assert ended.code == 2


def test_links_lead_nowhere_else(
    cluster: LocalCluster, awake: dict[str, Any], tree: Path, tmp_path: Path
) -> None:
    """What is there at the same path of the node is never reached."""
    secret = tmp_path / "of-the-node"
    secret.write_text("secret of the node")
    inside(cluster, f"mkdir -p /tmp/l; ln -s {secret} /tmp/l/out; ln -s {tmp_path} /tmp/l/dir")
    ended = cluster.tabane("cp", "files:/tmp/l/out", str(tmp_path / "stolen"))
    assert ended == (1, "", "tabane: cp: /tmp/l/out: No such file or directory\n")
    inside(cluster, "ln -s ../../../../../../../../etc /tmp/l/up")
    good(cluster.tabane("cp", "files:/tmp/l/up/hostname", str(tmp_path / "name")))
    assert (tmp_path / "name").read_text().strip() == inside(cluster, "hostname").strip()
    ended = cluster.tabane("cp", str(tree), "files:/tmp/l/dir/new")
    assert ended.code == 1
    assert not (tmp_path / "new").exists()
    for process in ("1", "self"):
        path = Path("/proc") / process / "root" / "etc" / "hostname"
        ended = cluster.tabane("cp", f"files:{path}", str(tmp_path / "x"))
        assert ended.code == 1 or (tmp_path / "x").read_text() == (tmp_path / "name").read_text()


def test_a_full_layer_is_said(cluster: LocalCluster, awake: dict[str, Any], tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * (20 << 20))
    ended = cluster.tabane("cp", str(big), "files:/tmp/big")
    assert ended == (1, "", "tabane: cp: big: there is no space left\n")
    assert "big" not in inside(cluster, "ls -a /tmp")
    assert ".tabane" not in inside(cluster, "ls -a /tmp")


def test_large_files_and_holes(
    cluster: LocalCluster, awake: dict[str, Any], tmp_path: Path
) -> None:
    inside(cluster, "truncate -s 2G /tmp/holes; echo end >>/tmp/holes")
    good(cluster.tabane("cp", "files:/tmp/holes", str(tmp_path)))
    found = (tmp_path / "holes").stat()
    assert found.st_size == (2 << 30) + 4
    assert found.st_blocks < 1000
    good(cluster.tabane("cp", str(tmp_path / "holes"), "files:/tmp/again"))
    assert inside(cluster, "tail -c 4 /tmp/again; rm /tmp/again /tmp/holes") == "end\n"
    shown = cluster.tabane("cp", "--json", "files:/usr/bin/python3", str(tmp_path / "python"))
    assert json.loads(shown.out)["stream_bytes"] > (tmp_path / "python").stat().st_size
    assert (tmp_path / "python").read_bytes() == Path("/usr/bin/python3").read_bytes()


def test_who_leaves_in_the_middle_leaves_nothing(
    cluster: LocalCluster, awake: dict[str, Any], tmp_path: Path
) -> None:
    archive = make_archive({"whole": b"1", "half": bytes(4 << 20)})
    command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(cluster.root)]
    command += ["cp", "-", "files:/tmp"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(archive[: 1 << 20])
        process.stdin.flush()
        while "whole" not in inside(cluster, "ls -a /tmp"):
            pass
        process.kill()
    while ".tabane" in inside(cluster, "ls -a /tmp"):
        pass
    assert "half" not in inside(cluster, "ls /tmp")


def test_through_another_node(cluster: LocalCluster, awake: dict[str, Any], tmp_path: Path) -> None:
    path = cluster.root / "nodes" / awake["node"] / "api.sock"
    hidden = path.rename(path.with_name("hidden.sock"))
    try:
        (tmp_path / "some").write_bytes(os.urandom(3 << 20))
        good(cluster.tabane("cp", str(tmp_path / "some"), "files:/tmp/some"))
        good(cluster.tabane("cp", "files:/tmp/some", str(tmp_path / "same")))
        assert (tmp_path / "some").read_bytes() == (tmp_path / "same").read_bytes()
    finally:
        hidden.rename(path)
