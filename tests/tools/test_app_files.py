"""App files and images that `tabane deploy` refuses: file, line, field, and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tools.conftest import APP_FILE, EVIL, Pretended, Run, check_refusal, reply


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ('name = "x', "1", "this is not TOML"),
        (APP_FILE + "prot = 80", "4: prot", "did you mean port? (allowed here: name"),
        (APP_FILE + 'port = "80"', "4: port", "'80' is not a whole number from 1 to 65535"),
        (APP_FILE + "[reactive]\nmin = 3\nmax = 2", "5: reactive.min", "lower it or raise max"),
        (APP_FILE + "[resources]\nmemory = 1", "5: resources.memory", "from 1MiB"),
        (APP_FILE + 'class = "pod"', "4: class", "none of container, sandbox"),
        (APP_FILE + f"{json.dumps(EVIL)} = 1", "", "there is no such field"),
        ('image = "host"', " name", "is missing"),
        (APP_FILE.replace("host", "docker://x"), "2: image", "write docker://HOST/"),
        (APP_FILE.replace("host", "ftp:x"), "2: image", "none of docker://HOST/REPOSITORY:TAG"),
        ("x = " + "[" * 100_000, "", "nested too deeply"),
        ("#" * (1 << 20) + "#", "", "longer than an app file may be"),
        ("\0", "1", "this is not TOML"),
    ],
)
def test_app_files_with_mistakes(
    text: str, where: str, words: str, tabane: Run, tmp_path: Path
) -> None:
    file = tmp_path / "app.toml"
    file.write_text(text)
    place = f"{file}:{where}: " if where else str(file)
    check_refusal(tabane("deploy", str(file)), 2, f"tabane: {place}", words)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("nowhere.toml", "cannot be read: No such file or directory"),
        (".", "there is no app file (*.toml) in"),
        ("file/app.toml", "cannot be read: Not a directory"),
        ("x" * 300, "cannot be read: File name too long"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("latin-1", "latin-1:2: is not UTF-8 text: save it as UTF-8"),
        ("/dev/zero", "is longer than an app file may be"),
    ],
)
def test_app_files_that_cannot_be_read(file: str, words: str, tabane: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin-1").write_bytes(b'# one\nname = "caf\xe9"\n')
    check_refusal(tabane("deploy", str(tmp_path / file)), 1 if "cannot be" in words else 2, words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("rootfs:nowhere", "nowhere does not exist"),
        ("rootfs:file", "file is not a directory"),
        ("oci:file", "file"),
        ("archive:file", "is no tar archive, or is cut off: make it again"),
        ("archive:/etc/passwd", "is no tar archive, or is cut off: make it again"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_images_that_are_none(
    source: str,
    words: str,
    dry: tuple[str, ...],
    tabane: Run,
    tmp_path: Path,
    pretended: Pretended,
) -> None:
    pretended.begin(tokyo=reply({}))
    (tmp_path / "file").write_text("no image")
    file = tmp_path / "app.toml"
    file.write_text(APP_FILE.replace("host", source))
    check_refusal(tabane("deploy", *dry, str(file)), 2, f"tabane: {file}:2: image: ", words)
    assert pretended.nodes["tokyo"].asked == []


def test_a_dry_run_needs_no_cluster(tabane: Run, tmp_path: Path) -> None:
    file = tmp_path / "app.toml"
    file.write_text(APP_FILE)
    assert tabane("deploy", "--dry-run", str(file)) == (0, "default/hello is valid\n", "")
    file.write_text(APP_FILE + "prot = 80")
    check_refusal(tabane("deploy", "--dry-run", str(file)), 2, "app.toml:4: prot")


def test_what_a_deploy_says(tabane: Run, tmp_path: Path, pretended: Pretended) -> None:
    answer = {
        "namespace": "default",
        "name": "hello",
        "revision": 3,
        "changed": True,
        "known": ["tokyo"],
        "unreachable": [],
    }
    pretended.begin(tokyo=reply(answer | {"warnings": ["there is no data center kyoto"]}))
    file = tmp_path / "app.toml"
    file.write_text(APP_FILE)
    ended = tabane("deploy", str(file))
    assert ended == (
        0,
        "default/hello revision 3 stored; known in tokyo\n",
        "tabane: default/hello: there is no data center kyoto\n",
    )
    assert json.loads(tabane("deploy", "--json", str(file)).out)["warnings"]
    pretended.nodes["tokyo"].answer = reply(answer | {"changed": False, "warnings": []})
    ended = tabane("deploy", "--force", str(file))
    assert "revision 3 is what the file says, nothing was changed" in ended.out
    assert json.loads(pretended.nodes["tokyo"].asked[-1][1])["force"] is True


def test_tables_of_apps_fit(tabane: Run, pretended: Pretended) -> None:
    app = {
        "namespace": "default",
        "name": "hello-world",
        "revision": 123,
        "class": "container",
        "image": "rootfs:/srv/images/far/away/hello",
        "digest": "sha256:0123456789abcdef",
        "port": 65535,
        "hosts": ["www.hello-world.example.com", "hello.test"],
        "ready": 10,
        "instances": 10,
    }
    pretended.begin(tokyo=reply({"apps": [app], "silent": []}))
    heading, row = tabane("apps").out.splitlines()
    assert max(len(heading), len(row)) <= 100
    for words in ("/away/hello", "0123456789ab ", "example.com,+1"):
        assert words in row
