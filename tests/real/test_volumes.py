"""What an app writes to its volumes is there for its next instance, wherever that is asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.real.conftest import LocalCluster, wait_for

from tabane.clock import SYSTEM
from tabane.errors import Busy, EngineError, Unsupported, UsageError
from tabane.model import App, Volume
from tabane.node.local import HERE
from tabane.runtimes.api import Storage
from tabane.runtimes.volumes import VolumeFiles, lend, mount, settle, unmount_all, wait_free

pytestmark = pytest.mark.real

ADD = r"""
mkdir -p /tmp/cgi-bin
cat >/tmp/cgi-bin/add <<END
#!/bin/sh
echo line >>/srv/data/lines
printf 'Content-Type: text/plain\r\n\r\n'
wc -l </srv/data/lines
END
chmod +x /tmp/cgi-bin/add
echo WORD >/tmp/index.html
exec busybox httpd -f -p 8000 -h /tmp
"""
APP = """
name = "NAME"
image = "host"
command = ["sh", "-c", '''SCRIPT''']
port = 8000
hosts = ["NAME.test"]
[resources]
memory = "64MiB"
[reactive]
stop_after = "1h"
stop_timeout = "1s"
[[volumes]]
name = "data"
path = "/srv/data"
size = "SIZE"
"""


def deploy(cluster: LocalCluster, name: str, word: str = "here", size: str = "32MiB") -> str:
    """Returns what is said of a mistake."""
    text = APP.replace("SCRIPT", ADD).replace("WORD", word)
    text = text.replace("NAME", name).replace("SIZE", size)
    return cluster.tabane("deploy", "-", stdin=text).err


def add(cluster: LocalCluster, name: str, at: str = "tokyo") -> int:
    answer = cluster.get(name, at, "/cgi-bin/add")
    assert answer.status == 200, answer
    return int(answer.body.split()[1])  # in a chunk


def only(cluster: LocalCluster, name: str) -> str:
    found = [i["id"] for i in cluster.instances(name)]
    assert len(found) == 1, found
    return str(found[0])


def test_data_outlives_instances_revisions_agents_and_the_app(cluster: LocalCluster) -> None:
    deploy(cluster, "keeper")
    assert add(cluster, "keeper") == 1
    assert add(cluster, "keeper", "osaka") == 2, "asked for elsewhere it is the same instance"
    first = only(cluster, "keeper")
    node = next(i["node"] for i in cluster.instances("keeper"))
    cluster.tabane("stop", first)
    wait_for(lambda: not cluster.instances("keeper"), "its end")
    assert add(cluster, "keeper") == 3
    deploy(cluster, "keeper", "again")
    wait_for(lambda: cluster.get("keeper").body == "again\n", "the new revision")
    assert add(cluster, "keeper") == 4
    cluster.kill("agent", node)
    wait_for(lambda: cluster.answers(node), "the next agent")
    assert add(cluster, "keeper") == 5
    assert cluster.tabane("rm", "keeper").code == 0
    wait_for(lambda: not cluster.instances("keeper"), "its end")
    assert "no app" in cluster.tabane("volume", "ls").out
    deploy(cluster, "keeper")
    assert add(cluster, "keeper") == 6, "another id range has the same files"


def test_an_instance_whose_record_cannot_be_read_loses_no_data(cluster: LocalCluster) -> None:
    deploy(cluster, "unread")
    assert add(cluster, "unread") == 1
    first = only(cluster, "unread")
    node = next(i["node"] for i in cluster.instances("unread"))
    record = Path(f"/proc/{cluster.holder(node)}/root{HERE}/run/{first}/record.json")
    record.write_text("of another version")
    cluster.kill("agentd", node)
    wait_for(lambda: cluster.answers(node), "the next agent")
    wait_for(lambda: first not in [i["id"] for i in cluster.instances("unread")], "its end")
    assert not record.parent.exists()
    assert wait_for(lambda: cluster.get("unread").status == 200)
    assert add(cluster, "unread") == 2


def test_two_instances_never_have_a_volume(cluster: LocalCluster) -> None:
    """Revision after revision, while requests flow: each is there before the next begins."""
    deploy(cluster, "alone")
    count = add(cluster, "alone")
    for word in ("one", "two", "three"):
        deploy(cluster, "alone", word)
        with cluster.requests("alone", path="/", threads=2) as seen:
            wait_for(lambda w=word: seen.answers[-1].body == f"{w}\n", "the new revision")  # type: ignore[misc]
        assert seen.failures() == []
    assert add(cluster, "alone") == count + 1
    assert "more than one" not in cluster.tabane("scale", "alone", "--max", "2").out
    assert "one instance at most" in cluster.tabane("scale", "alone", "--max", "2").err


def test_its_size_is_its_quota_and_it_can_grow_only(cluster: LocalCluster) -> None:
    deploy(cluster, "full", size="16MiB")
    add(cluster, "full")
    fill = "dd if=/dev/zero of=/srv/data/fill bs=1M count=20"
    code, _ = cluster.inside("full", "sh", "-c", fill)
    assert code != 0
    assert cluster.inside("full", "sh", "-c", "stat -c %s /srv/data/fill")[1] < f"{16 << 20}"
    assert "cannot shrink" in deploy(cluster, "full", size="8MiB")
    assert not deploy(cluster, "full", "larger", size="64MiB")
    wait_for(lambda: cluster.get("full").body == "larger\n", "the new revision")
    assert cluster.inside("full", "sh", "-c", fill)[0] == 0
    assert add(cluster, "full") == 2


def test_a_volume_is_removed_by_itself_only(cluster: LocalCluster) -> None:
    deploy(cluster, "dropped")
    assert add(cluster, "dropped") == 1
    refused = cluster.tabane("volume", "rm", "dropped/data")
    assert refused.code != 0 and "uses its volume data" in refused.err
    cluster.tabane("rm", "dropped")
    wait_for(lambda: not cluster.instances("dropped"), "its end")
    lost = cluster.tabane("volume", "rm", "--lost", "dropped")
    assert lost.code != 0 and "remove them by name" in lost.err
    assert cluster.tabane("volume", "rm", "dropped/data").code == 0
    assert "dropped" not in cluster.tabane("volume", "ls").out
    assert "has no volumes" in cluster.tabane("volume", "rm", "dropped/data").err
    deploy(cluster, "dropped")
    assert add(cluster, "dropped") == 1


def test_a_volume_that_is_mounted_is_no_disk_for_another_kernel(tmp_path: Path) -> None:
    storage = make_volume(tmp_path)
    wait_free(storage.file)
    place = tmp_path / "place"
    place.mkdir()
    mount = f"mount -o loop {storage.file} {place} && echo mounted && read _ && umount {place}"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", mount], stdin=pipe, stdout=pipe, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "mounted\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tabane.runtimes.volumes.RELEASE_S", 0.05)
            with pytest.raises(Busy, match="still in use by loop"):
                wait_free(storage.file)
        other.communicate("\n", timeout=60)
    began = SYSTEM.now()
    wait_free(storage.file)
    assert SYSTEM.now() - began < 30


def change_disk(file: Path, *requests: str) -> None:
    """As a machine's kernel can."""
    for request in requests:
        argv = ("/usr/sbin/debugfs", "-w", "-R", request, str(file))
        subprocess.run(argv, capture_output=True, check=True)


@pytest.mark.parametrize("name", ["data", "data.new"])
def test_no_link_in_a_volume_leads_out_of_it(tmp_path: Path, name: str) -> None:
    """Whoever had it as a disk could have put one there."""
    storage = make_volume(tmp_path)
    victim, place = tmp_path / "victim", tmp_path / "place"
    for directory in (victim, place):
        directory.mkdir()
    before = victim.stat()
    change_disk(storage.file, f"symlink {name} {victim}")
    with pytest.raises(EngineError, match=rf"{name} in .*/data\.ext4 is no directory"):
        mount(storage, place, tmp_path / "image", "/proc/self/ns/user")
    unmount_all(place)
    assert victim.stat() == before and list(place.iterdir()) == []
    wait_free(storage.file)


def test_what_another_kernel_had_is_checked_before_this_one_mounts_it(tmp_path: Path) -> None:
    storage = make_volume(tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    lend(storage.file)
    change_disk(storage.file, "mkdir data", "set_inode_field data block[0] 1")
    with pytest.raises(EngineError, match=r"e2fsck failed for .*/data\.ext4"):
        mount(storage, place, tmp_path / "image", "/proc/self/ns/user")
    unmount_all(place)
    settle(storage.file)
    VolumeFiles(tmp_path / "volumes").remove("default/db", "data")
    settle(storage.file)
    assert list(tmp_path.joinpath("volumes").glob("**/data*")) == []


def make_volume(directory: Path) -> Storage:
    files = VolumeFiles(directory / "volumes")
    app = App("db", "host", volumes=(Volume("data", "/data", 8 << 20),))
    files.ensure(app)
    return files.of(app)[0]


def test_files_are_made_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = VolumeFiles(tmp_path)
    app = App("db", "host", volumes=(Volume("data", "/data", 8 << 20),))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("tabane.runtimes.volumes.shutil.which", lambda *_, **__: None)
    with pytest.raises(Exception, match="install the package e2fsprogs"):
        files.ensure(app)
    assert list(files.sizes()) == []
    assert not files.of(app)[0].file.exists()
    monkeypatch.undo()
    files.ensure(app)
    ((key, name, size, disk),) = files.sizes()
    assert (key, name, size) == ("default/db", "data", 8 << 20) and disk < size
    smaller = App("db", "host", volumes=(Volume("data", "/data", 4 << 20),))
    with pytest.raises(UsageError, match="cannot shrink"):
        files.ensure(smaller)
    files.remove("default/db", "data")
    assert list(tmp_path.iterdir()) == []


def test_an_enlargement_that_was_cut_off_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = VolumeFiles(tmp_path / "volumes")
    files.ensure(App("db", "host", volumes=(Volume("data", "/data", 8 << 20),)))
    larger = App("db", "host", volumes=(Volume("data", "/data", 32 << 20),))
    (storage,) = files.of(larger)

    def refuse(file: Path) -> None:
        raise EngineError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr("tabane.runtimes.volumes._check", refuse)
        with pytest.raises(EngineError, match="cut off"):
            files.ensure(larger)
    assert storage.file.stat().st_size == 32 << 20 > inside_bytes(storage.file)
    files.ensure(larger)
    assert inside_bytes(storage.file) == 32 << 20
    assert [path.name for path in storage.file.parent.iterdir()] == [storage.file.name]


def inside_bytes(file: Path) -> int:
    """How large the file system is, as its superblock says."""
    with file.open("rb") as disk:
        disk.seek(1024)
        block = disk.read(28)
    count, shift = int.from_bytes(block[4:8], "little"), int.from_bytes(block[24:28], "little")
    return count << 10 << shift


@pytest.mark.parametrize(
    ("path", "owner"), [("/absolute/notes", 0), ("/srv/up/notes", 0), ("/inner/notes", 7)]
)
def test_what_is_new_is_owned_as_in_the_image_wherever_links_there_lead(
    tmp_path: Path, path: str, owner: int
) -> None:
    storage = replace(make_volume(tmp_path), path=path)
    tree, foreign, place = (tmp_path / name for name in ("tree", "foreign", "place"))
    for directory, uid in ((tree / "srv/notes", 7), (foreign / "notes", 4711), (place, 0)):
        directory.mkdir(parents=True)
        os.chown(directory, uid, uid)
    (tree / "absolute").symlink_to(foreign)
    (tree / "srv/up").symlink_to("../../foreign")
    (tree / "inner").symlink_to("/srv")
    try:
        with pytest.raises(Unsupported, match="cannot map ids"):  # to the machine's own
            mount(storage, place, tree, "/proc/self/ns/user")
        assert (place / "volumes/data.fs/data").stat().st_uid == owner
    finally:
        unmount_all(place)
    wait_free(storage.file)
