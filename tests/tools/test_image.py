"""`tabane image`, and images on their way with `tabane deploy`."""

from __future__ import annotations

import json
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tools.answers import APP, IMAGE
from tests.tools.conftest import APP_FILE, EVIL, Pretended, Run, check_refusal, reply

from tabane.errors import NotFound, UsageError
from tabane.tools.cli.images import find

ONE, TWO = "sha256:" + "1a" * 32, "sha256:" + "1b" * 32
SOURCE = "docker://registry.test/team/app:1"
OTHER = "docker://127.0.0.1:5000/me/tree:1"
ROWS = [
    IMAGE | {"digest": ONE, "node": "tokyo/tokyo-1", "sources": [SOURCE], "kind": "linux"},
    IMAGE | {"digest": ONE, "node": "osaka/osaka-1", "sources": [OTHER], "kind": "linux"},
    IMAGE | {"digest": TWO, "node": "osaka/osaka-1", "sources": ["rootfs:x"], "kind": "wasm"},
]
STORES = [
    {"node": f"{dc}/{dc}-1", "used_bytes": 5 << 20, "limit_bytes": 1 << 30}
    for dc in ("tokyo", "osaka")
]
PULLING = {"step": "pull", "where": "registry.test", "total_bytes": 3 << 20}
PULLED = {"node": "tokyo/tokyo-1", "digest": ONE, "kind": "linux", "bytes": 1 << 20}


def streamed(*said: dict[str, Any]) -> bytes:
    lines = "".join(json.dumps(one) + "\n" for one in said).encode()
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + lines


class Node:
    """Answers as a node does; what it was asked is in `asked`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.removed = [
            {"node": "tokyo/tokyo-1", "digests": [ONE], "bytes": 5 << 20, "problem": ""},
            {"node": "osaka/osaka-1", "digests": [], "bytes": 0, "problem": "it is used by a/b"},
        ]
        self.pull: list[dict[str, Any]] = [
            {"step": "resolve", "where": "registry.test"},
            PULLING | {"done_bytes": 0},
            PULLING | {"done_bytes": 3 << 20},
            PULLED,
        ]
        self.has = False

    def __call__(self, line: str, body: bytes) -> bytes:
        method, target = line.split()[:2]
        is_json = body.startswith(b"{")
        self.asked.append((f"{method} {target}", json.loads(body) if is_json else len(body)))
        path = target.partition("?")[0].removeprefix("/api/v1/")
        if path in ("images/pull", "images/push"):
            return streamed(*self.pull)
        if path.endswith("/description") and not self.has:
            return reply({"error": "not_found", "message": "no"}, 404)
        answers = {
            "GET images": {"images": ROWS, "stores": STORES, "silent": []},
            "POST images": PULLED,
            "POST images/gc": {"removed": self.removed, "silent": []},
            "POST apps": APP,
        }
        if method == "DELETE":
            return reply({"removed": self.removed, "silent": ["nara/nara-1"]})
        return reply(answers.get(f"{method} {path}", PULLED | {"manifest": {}}))


@pytest.fixture
def node(pretended: Pretended) -> Iterator[Node]:
    node = Node()
    pretended.begin(tokyo=node, osaka=node)
    yield node


def test_ls(tabane: Run, node: Node) -> None:
    ended = tabane("image", "ls")
    assert ended.code == 0
    lines = [line.split() for line in ended.out.splitlines()]
    assert lines[0] == ["DIGEST", "KIND", "SIZE", "UNPACKED", "NODES", "APPS", "USED", "SOURCE"]
    assert lines[1][:5] == ["1a" * 6, "linux", "5B", "5B", "tokyo-1,osaka-1"]
    assert lines[1][-2:] == [SOURCE, "(+1)"] and lines[2][0] == "1b" * 6
    assert lines[4] == ["NODE", "USED", "QUOTA"]
    assert lines[5] == ["tokyo/tokyo-1", "5.0Mi", "1.0Gi"]
    ended = tabane("image", "ls", "--node", "tokyo-1", "--json")
    shown = json.loads(ended.out)
    assert [row["digest"] for row in shown["images"]] == [ONE]
    assert [store["node"] for store in shown["stores"]] == ["tokyo-1"]


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("1a1a", ONE),
        (ONE, ONE),
        (TWO[:20], TWO),
        (SOURCE, ONE),
        (OTHER, ONE),
        ("registry.test/team/app:1", ONE),
        ("rootfs:x", TWO),
    ],
)
def test_what_an_image_may_be_called(name: str, digest: str) -> None:
    assert {row["digest"] for row in find(ROWS, name)} == {digest}


def test_what_no_image_or_several_are_called() -> None:
    with pytest.raises(UsageError, match="'1a1': write 4 digits or more"):
        find(ROWS, "1a1")
    for name in ("", "2222", "registry.test", "sha256:"):
        with pytest.raises(NotFound, match="no node has an image"):
            find(ROWS, name)
    rows = [IMAGE | {"digest": digest, "sources": [SOURCE]} for digest in (ONE, TWO)]
    with pytest.raises(UsageError, match=f"several images: write more of one of {'1a' * 6}"):
        find(rows, SOURCE)


def test_pull(tabane: Run, node: Node) -> None:
    ended = tabane("image", "pull", SOURCE)
    assert (ended.code, ended.out) == (0, f"{ONE} is on tokyo/tokyo-1 (1.0MiB, linux)\n")
    assert ended.err.splitlines() == [
        "tabane: looking it up in registry.test",
        "tabane: pulling from registry.test (3.0MiB)",
    ]
    assert node.asked == [("POST /api/v1/images/pull", {"source": SOURCE, "auth": ""})]
    ended = tabane("image", "pull", SOURCE, "--json")
    assert json.loads(ended.out)["images"][0]["dc"] == "tokyo" and ended.err == ""


def test_pull_to_all_nodes_and_with_a_login(tabane: Run, node: Node, tmp_path: Path) -> None:
    login = tmp_path / "auth.json"
    login.write_text('{"auths": {"registry.test": {"auth": "eA=="}}}')
    assert tabane("image", "pull", "--all", "--authfile", str(login), SOURCE).code == 0
    bodies = [body for _, body in node.asked]
    assert len(bodies) == 2 and bodies[0]["auth"] == login.read_text()
    assert [body.get("digest") for body in bodies] == [None, ONE], "a tag is looked up once"


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ([{"error": "not_found", "message": "registry.test has no image"}], 1, "has no image"),
        ([{"error": "usage", "message": "it is for arm64"}], 2, "it is for arm64"),
        ([{"error": "unavailable", "message": EVIL}], 1, ""),
        ([PULLING], 1, "a node ended its answer before it was done: pull again"),
    ],
)
def test_pulls_that_fail(
    tabane: Run, node: Node, said: list[dict[str, Any]], code: int, words: str
) -> None:
    node.pull = said
    ended = tabane("image", "pull", SOURCE)
    assert (ended.code, ended.out) == (code, "")
    assert words in ended.err.splitlines()[-1]


def test_push(tabane: Run, node: Node) -> None:
    node.pull = [PULLED | {"target": "docker://r.test/a:1"}]
    ended = tabane("image", "push", "1b1b", "docker://r.test/a:1")
    assert (ended.code, ended.out) == (0, f"{TWO} is docker://r.test/a:1\n")
    said = {"digest": TWO, "target": "docker://r.test/a:1", "auth": ""}
    assert node.asked[-1] == ("POST /api/v1/images/push", said)


def test_import(tabane: Run, node: Node, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    ended = tabane("image", "import", f"rootfs:{tmp_path}/tree")
    assert ended.code == 0 and ended.out.startswith(f"{ONE} is on tokyo/tokyo-1")
    asked, size = node.asked[-1]
    assert asked.startswith("POST /api/v1/images?size=") and "&source=rootfs%3A%2F" in asked
    assert size > 0 and "sending to a node" in ended.err
    node.has, node.asked = True, []
    assert tabane("image", "import", f"rootfs:{tmp_path}/tree").code == 0
    assert [asked[:4] for asked, _ in node.asked] == ["GET "], "it is there already"


def test_inspect(tabane: Run, node: Node) -> None:
    node.has = True
    shown = json.loads(tabane("image", "inspect", "1b1b").out)
    assert shown["node"] == "tokyo-1" and "manifest" in shown
    assert node.asked[-1][0] == f"GET /api/v1/images/{TWO}/description"


def test_rm(tabane: Run, node: Node) -> None:
    ended = tabane("image", "rm", "1a1a", SOURCE)
    assert ended.code == 1
    assert ended.out == f"tokyo/tokyo-1: {'1a' * 6} removed (5.0MiB)\n"
    assert "tabane: image: it is used by a/b\n" in ended.err
    assert "no answer from nara/nara-1" in ended.err
    assert [asked for asked, _ in node.asked if asked.startswith("DEL")] == [
        f"DELETE /api/v1/images/{ONE}"
    ]
    tabane("image", "rm", "1b1b", "--node", "osaka-1")
    assert node.asked[-1][0] == f"DELETE /api/v1/images/{TWO}?node=osaka/osaka-1"


def test_gc(tabane: Run, node: Node) -> None:
    ended = tabane("image", "gc", "-n", "--node", "osaka-1")
    assert f"tokyo/tokyo-1: {'1a' * 6} would be removed (5.0MiB)" in ended.out
    assert node.asked[-1][1] == {"dry_run": True, "node": "osaka/osaka-1"}
    node.removed = []
    assert tabane("image", "gc").out == (
        "nothing removed (what an app names or an instance runs from, or was asked for in the last "
        "minute, stays)\n"
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "image:"),
        ("build x", "ACTION: 'build' is none of ls, pull"),
        ("pull", "write: tabane image pull docker://HOST/REPOSITORY:TAG"),
        ("push 1a1a", "write: tabane image push IMAGE docker://HOST"),
        ("rm", "write: tabane image rm IMAGE..."),
        ("ls x", "write: tabane image ls"),
        ("ls --all", "ls has no option --all"),
        ("rm 1a1a -n", "rm has no option --dry-run"),
        ("pull x --all --node tokyo-1", "give --node or --all, not both"),
        ("import ftp:x", "is none of rootfs:PATH"),
        ("pull x --authfile /nowhere", "--authfile: /nowhere: No such file"),
        ("pull x --authfile /etc/passwd", "--authfile: /etc/passwd is none: `skopeo login"),
    ],
)
def test_bad_lines(tabane: Run, node: Node, line: str, words: str) -> None:
    check_refusal(tabane("image", *line.split()), 2, "tabane: ", words)


@pytest.mark.parametrize("line", ["ls --node mars", "rm 1a1a --node mars", "gc --node mars"])
def test_nodes_that_are_not_there(tabane: Run, node: Node, line: str) -> None:
    check_refusal(tabane("image", *line.split()), 1, "there is no node 'mars'")


def test_deploy_has_a_node_pull(tabane: Run, node: Node, tmp_path: Path) -> None:
    file = tmp_path / "app.toml"
    file.write_text(APP_FILE.replace("host", SOURCE))
    ended = tabane("deploy", str(file))
    assert ended.code == 0 and "pulling from registry.test (3.0MiB)" in ended.err
    assert [asked for asked, _ in node.asked] == [
        "POST /api/v1/images/pull",
        "POST /api/v1/apps",
    ]
    assert node.asked[-1][1]["image"] == ONE
    assert tabane("deploy", "--dry-run", str(file)).code == 0
    node.pull = [{"error": "denied", "message": "registry.test does not let us have it"}]
    ended = tabane("deploy", str(file))
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.endswith("registry.test does not let us have it\n")


def test_bars_on_a_terminal() -> None:
    """They go to stderr, and leave nothing on it."""
    script = (
        "from tabane.tools.cli.progress import shown\n"
        "with shown() as tell:\n"
        "    tell({'step': 'resolve', 'where': 'registry.test'})\n"
        "    tell({'step': 'pull', 'where': '[red]r\\x1b[2J', 'done_bytes': 5, 'total_bytes': 9})\n"
    )
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as screen:  # noqa: PTH123 - a descriptor
        argv = [sys.executable, "-c", script]
        with open(theirs, "wb", buffering=0) as terminal:  # noqa: PTH123
            done = subprocess.run(argv, stderr=terminal, capture_output=False, timeout=60)
        shown = screen.read(1 << 16)
    assert done.returncode == 0
    assert b"pulling from [red]r\\x1b[2J" in shown and "━".encode() in shown
