"""Paths, users and commands are looked up inside the image's tree, and never outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import UsageError
from tabane.runtimes.api import User
from tabane.runtimes.lookup import find_command, find_user, lead, resolve


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("lookup")
    (base / "secret").write_text("outside")
    tree = base / "tree"
    for name in ("usr/bin", "etc", "deep/er"):
        (tree / name).mkdir(parents=True)
    (tree / "bin").symlink_to("usr/bin")
    (tree / "usr/bin/tool").write_text("#!")
    (tree / "usr/bin/tool").chmod(0o755)
    (tree / "usr/bin/data").write_text("not a program")
    (tree / "usr/bin/absolute").symlink_to("/bin/tool")
    (tree / "usr/bin/climbing").symlink_to("../../../../../usr/bin/tool")
    (tree / "usr/bin/out").symlink_to("../../../secret")
    (tree / "loop").symlink_to("loop")
    (tree / "etc/passwd").write_text("root:x:0:0\nweb:x:33:34:\nbroken\n7:x:70:71\nbig:x:70000:1\n")
    (tree / "etc/group").write_text("www:x:34:\nlogs:x:44:root,web\nadm:x:45:web\n")
    return tree


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/bin/tool", "usr/bin/tool"),
        ("bin/absolute", "usr/bin/tool"),
        ("/deep/../bin/climbing", "usr/bin/tool"),
        ("//bin//tool", "usr/bin/tool"),
        ("/../../../../etc/passwd", "etc/passwd"),
        ("/", ""),
        ("/bin/out", None),
        ("/loop", None),
        ("/missing/x", None),
        ("/etc/passwd/x", None),
    ],
)
def test_resolve(tree: Path, path: str, found: str | None) -> None:
    assert resolve(tree, path) == (None if found is None else tree / found)


@given(parts=st.lists(st.sampled_from(["..", "bin", "out", "climbing", "usr", "secret", "."])))
def test_nothing_outside_is_ever_found(tree: Path, parts: list[str]) -> None:
    found = resolve(tree, "/".join(parts))
    assert found is None or found == tree or tree in found.parents


def test_mounts_lie_over_the_tree(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/other").write_text("")
    mounts = {"usr": tmp_path}
    assert resolve(tree, "/bin/other", mounts) == tmp_path / "bin/other"
    assert resolve(tree, "/bin/tool", mounts) is None


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("tool", "/bin/tool"),
        ("/usr/bin/tool", "/usr/bin/tool"),
        ("./tool", "/usr/bin/./tool"),
        ("data", None),
        ("/etc", None),
        ("nothing", None),
    ],
)
def test_find_command(tree: Path, command: str, found: str | None) -> None:
    assert find_command(tree, command, "/sbin:/bin", "/usr/bin") == found


@pytest.mark.parametrize(
    ("user", "found"),
    [
        ("", User(0, 0, (44,))),
        ("root", User(0, 0, (44,))),
        ("web", User(33, 34, (44, 45))),
        ("33", User(33, 34, (44, 45))),
        ("web:logs", User(33, 44)),
        ("web:7", User(33, 7)),
        ("1000", User(1000, 0)),
        ("1000:1001", User(1000, 1001)),
    ],
)
def test_find_user(tree: Path, user: str, found: User) -> None:
    assert find_user(tree, user) == found


@pytest.mark.parametrize(
    ("user", "problem"),
    [
        ("nobody-here", "no user 'nobody-here'"),
        ("web:nothing", "no group 'nothing'"),
        ("70000", "above 65535"),
        ("big", "above 65535"),
        ("0:65536", "above 65535"),
    ],
)
def test_find_user_refuses(tree: Path, user: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        find_user(tree, user)


def test_an_image_without_users(tmp_path: Path) -> None:
    assert find_user(tmp_path, "") == User(0, 0)
    assert find_user(tmp_path, "5") == User(5, 0)


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/srv/data", "/srv/data"),
        ("/gone", "/nowhere/else"),
        ("/gone/data", "/nowhere/else/data"),
        ("/srv/beside/x", "/srv/missing/x"),
        ("/srv/out/x", "/etc/x"),
        ("/srv/../gone/..", "/nowhere"),
    ],
)
def test_where_a_path_leads_also_to_what_is_not_there(
    path: str, there: str, tmp_path: Path
) -> None:
    (tmp_path / "srv").mkdir()
    (tmp_path / "gone").symlink_to("/nowhere/else")
    (tmp_path / "srv/beside").symlink_to("missing")
    (tmp_path / "srv/out").symlink_to("../../../etc")
    assert lead(tmp_path, path) == there


def test_nothing_is_above_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert resolve(tmp_path, "/missing/../file") is None
    assert resolve(tmp_path, "/file/x") is None


def test_links_that_go_round_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(UsageError, match="make /one/data lead nowhere"):
        lead(tmp_path, "/one/data")
