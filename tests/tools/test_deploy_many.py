"""`tabane deploy` and `rm` of many apps: a directory, or files in one go."""

from __future__ import annotations

import json
import pwd
from pathlib import Path
from typing import Any

import pytest
from tests.tools.conftest import Pretended, Run, check_refusal, reply

from tabane.tools.cli import deploy

APP = 'name = "{name}"\nimage = "host"\ncommand = ["true"]\nport = 80\nhosts = ["{name}.test"]\n'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "apps"
    made.mkdir()
    for number in range(7):
        (made / f"{number}.toml").write_text(APP.format(name=f"app-{number}"))
    (made / "README").write_text("not an app file")
    return made


def test_root_says_whose_apps_they_are_to_be(
    tabane: Run, directory: Path, pretended: Pretended
) -> None:
    store = Store()
    pretended.begin(tokyo=store.answer)
    daemon = pwd.getpwnam("daemon").pw_uid
    for user, uid in (("daemon", daemon), ("4242", 4242)):
        assert tabane("deploy", "--owner", user, str(directory)).code == 0
        assert {app["owner"] for app in store.batches.pop()["apps"]} == {uid}
    assert tabane("deploy", str(directory)).code == 0
    assert not any("owner" in app for app in store.batches.pop()["apps"])
    refused = tabane("deploy", "--owner", "nobody-of-that-name", str(directory))
    check_refusal(refused, 2, "deploy: there is no user nobody-of-that-name here: give the uid")


class Store:
    """Stores what it is asked to, but for the app named `refused`."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.batches: list[dict[str, Any]] = []

    def answer(self, line: str, body: bytes) -> bytes:
        asked = json.loads(body)
        self.batches.append(asked)
        told: dict[str, Any] = {"known": ["tokyo"], "unreachable": []}
        if "/removals" in line:
            return reply(told | {"names": asked["apps"]})
        names = [app["text"].split('"')[1] for app in asked["apps"]]
        if self.refused in names:
            message = f"default/{self.refused}: hosts: x leads to default/y already"
            return reply({"error": "conflict", "message": message}, 409)
        rows = [
            {
                "namespace": "default",
                "name": name,
                "revision": 1,
                "changed": name != "app-0",
                "warnings": ["it is odd"] if name == "app-3" else [],
            }
            for name in names
        ]
        return reply(told | {"apps": rows})


def test_a_directory_is_stored_in_as_few_commits_as_fit(
    tabane: Run, directory: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    pretended.begin(tokyo=store.answer)
    assert tabane("deploy", str(directory)) == (
        0,
        "6 apps stored, 1 are what their files say; known in tokyo\n",
        "tabane: default/app-3: it is odd\n",
    )
    (batch,) = store.batches
    assert [Path(app["file"]).name for app in batch["apps"]] == [f"{n}.toml" for n in range(7)]
    assert {app["image"] for app in batch["apps"]} == {"host"} and batch["force"] is False
    store.batches.clear()
    monkeypatch.setattr(deploy, "BATCH_APPS", 3)
    assert tabane("deploy", "--force", str(directory)).code == 0
    assert [len(batch["apps"]) for batch in store.batches] == [3, 3, 1]
    assert all(batch["force"] for batch in store.batches)


def test_large_files_are_fewer_to_a_commit(
    tabane: Run, directory: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    pretended.begin(tokyo=store.answer)
    monkeypatch.setattr(deploy, "BATCH_BYTES", 2 * len(APP.format(name="app-0")) + 1)
    assert tabane("deploy", "--json", str(directory)).code == 0
    assert [len(batch["apps"]) for batch in store.batches] == [2, 2, 2, 1]


def test_all_files_are_read_before_anything_is_stored(
    tabane: Run, directory: Path, pretended: Pretended
) -> None:
    store = Store()
    pretended.begin(tokyo=store.answer)
    (directory / "2.toml").write_text('name = "a"\nprot = 80\n')
    (directory / "4.toml").write_bytes(b"\xff")
    ended = tabane("deploy", str(directory))
    assert ended.code == 2 and not store.batches
    first, second, last = ended.err.splitlines()
    assert "2.toml:2: prot: there is no such field" in first and "is not UTF-8 text" in second
    assert last == "tabane: deploy: 2 of 7 files have mistakes: nothing was stored"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (APP.format(name="app-1"), "default/app-1 is in"),
        (APP.format(name="other").replace("other.test", "app-1.test"), "host app-1.test is in"),
    ],
)
def test_what_one_app_can_have_is_in_one_file(
    text: str, what: str, tabane: Run, directory: Path, pretended: Pretended
) -> None:
    store = Store()
    pretended.begin(tokyo=store.answer)
    (directory / "x.toml").write_text(text)
    check_refusal(tabane("deploy", str(directory)), 2, "x.toml: ", what, "1.toml, too")
    assert not store.batches


def test_what_is_stored_when_a_batch_is_refused_is_said(
    tabane: Run, directory: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(refused="app-5")
    pretended.begin(tokyo=store.answer)
    monkeypatch.setattr(deploy, "BATCH_APPS", 3)
    ended = tabane("deploy", str(directory))
    assert ended.code == 1 and ended.out == ""
    assert "deploy: 3 of 7 apps are stored, the rest is not" in ended.err
    assert "default/app-5: hosts: x leads to default/y already" in ended.err


@pytest.mark.parametrize(
    ("slow", "changed", "code"), [(1, True, 0), (3, True, 1), (1, False, 1), (None, True, 0)]
)
def test_who_knows_the_last_commit_knows_all_before(
    slow: int | None,
    changed: bool,
    code: int,
    tabane: Run,
    directory: Path,
    pretended: Pretended,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A data center that was slow to say so once is not said to be silent; unless what came later
    was there already, which tells nothing."""
    store, asked = Store(), 0

    def answer(line: str, body: bytes) -> bytes:
        nonlocal asked
        asked += 1
        told = json.loads(store.answer(line, body).partition(b"\r\n\r\n")[2])
        if asked == slow:
            told |= {"known": [], "unreachable": ["tokyo"]}
        elif not changed:
            told["apps"] = [row | {"changed": False} for row in told["apps"]]
        return reply(told)

    pretended.begin(tokyo=answer)
    monkeypatch.setattr(deploy, "BATCH_APPS", 3)
    ended = tabane("deploy", str(directory))
    assert asked == 3 and ended.code == code
    assert ("no answer from data center tokyo" in ended.err) == bool(code)


def test_several_files_are_stored_together_and_the_same_one_once(
    tabane: Run, directory: Path, pretended: Pretended
) -> None:
    store = Store()
    pretended.begin(tokyo=store.answer)
    files = [str(directory / f"{number}.toml") for number in (1, 2, 2)]
    told = json.loads(tabane("deploy", "--json", *files).out)
    assert [app["app"] for app in told["apps"]] == ["default/app-1", "default/app-2"]
    assert told["known"] == ["tokyo"] and len(store.batches[0]["apps"]) == 2


def test_many_are_only_looked_at(tabane: Run, directory: Path) -> None:
    ended = tabane("deploy", "--dry-run", str(directory))
    assert ended.code == 0 and ended.out.count(" is valid\n") == 7


def test_many_are_removed_in_as_few_commits(
    tabane: Run, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    pretended.begin(tokyo=store.answer)
    monkeypatch.setattr(deploy, "BATCH_APPS", 2)
    ended = tabane("rm", "a", "b", "a", "other/c")
    assert ended == (0, "3 apps removed; known in tokyo\n", "")
    batches = [batch["apps"] for batch in store.batches]
    assert batches == [["default/a", "default/b"], ["other/c"]]
    told = json.loads(tabane("rm", "--json", "a", "b").out)
    assert told == {"apps": ["default/a", "default/b"], "known": ["tokyo"], "unreachable": []}
