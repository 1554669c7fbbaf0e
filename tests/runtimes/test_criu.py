"""CRIU's images, logs and command lines, and what is kept beside its images: without CRIU."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import Corrupt, EngineError, Unsupported
from tabane.model import InstanceId
from tabane.runtimes.criu import dump, engine, images, saved, tree
from tabane.runtimes.criu.engine import Criu
from tabane.runtimes.criu.saved import Names, Saved

# Images: a field is (number, wire type, value), as in the module


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))


def message(*fields: tuple[int, int | bytes]) -> bytes:
    encoded = b""
    for number, value in fields:
        if isinstance(value, int):
            encoded += varint(number << 3) + varint(value)
        else:
            encoded += varint(number << 3 | 2) + varint(len(value)) + value
    return encoded


def image(*entries: bytes, header: bytes = b"IMG1IMG2") -> bytes:
    return header + b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)


DUMPERS = message((1, 1), (5, 1), (6, 2), (7, 3), (8, 4), (9, 6), (10, 7), (11, 8), (12, 5))
PROCESSES = [(1, 2), (5, 9), (6, 10), (7, 11), (8, 12), (9, 13), (10, 14), (11, 15), (12, 300)]


def write_images(directory: Path, core: bytes = b"") -> None:
    inventory = image(message((1, 2), (3, DUMPERS), (13, b"run-id")), header=b"INVE")
    (directory / "inventory.img").write_bytes(inventory)
    (directory / "ids-1.img").write_bytes(image(message(*PROCESSES)))
    (directory / "core-1.img").write_bytes(image(core))


def test_a_restore_stays_in_the_namespaces_that_are_made_before(tmp_path: Path) -> None:
    write_images(tmp_path)
    images.stay(tmp_path)
    changed = dict(PROCESSES) | {8: 4, 10: 7, 11: 8, 12: 5}
    assert (tmp_path / "ids-1.img").read_bytes() == image(message(*changed.items()))


def test_threads_stay_in_the_cgroups_of_who_restores(tmp_path: Path) -> None:
    thread = [(1, 2**63), (13, b"name"), (15, b"rseq")]
    core = [(1, 1), (2, b"registers"), (5, message(*thread, (16, 2))), (9, b"other")]
    write_images(tmp_path, message(*core))
    images.stay(tmp_path)
    core[2] = (5, message(*thread))
    assert (tmp_path / "core-1.img").read_bytes() == image(message(*core))


def test_what_nobody_has_read_of_the_output_is_not_said_again(tmp_path: Path) -> None:
    def pipe(number: int, data: bytes) -> bytes:
        entry = message((1, number), (2, len(data)), (3, 65536))
        return struct.pack("<I", len(entry)) + entry + data

    path = tmp_path / images.PIPES_DATA
    images.forget_unread(tmp_path, ("pipe:[7]",))
    assert not path.exists()
    header = b"IMG1IMG2"
    path.write_bytes(header + pipe(5, b"five") + pipe(7, b"a line\n") + pipe(9, b""))
    images.forget_unread(tmp_path, ("pipe:[7]", "file[1:2]"))
    assert path.read_bytes() == header + pipe(5, b"five") + pipe(9, b"")
    path.write_bytes(header + pipe(5, b"five")[:-1])
    with pytest.raises(Corrupt, match="cut off"):
        images.forget_unread(tmp_path, ("pipe:[7]",))


@pytest.mark.parametrize("cut", [1, 3, 20])
def test_images_that_are_cut_off_are_refused(tmp_path: Path, cut: int) -> None:
    for name in ("inventory.img", "ids-1.img"):
        write_images(tmp_path)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-cut])
        with pytest.raises(Corrupt, match=r"cut off|names no namespaces"):
            images.stay(tmp_path)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_bytes_are_images_or_corrupt(inventory: bytes, ids: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "inventory.img").write_bytes(b"INVE" + inventory)
        (directory / "ids-1.img").write_bytes(b"IMG1IMG2" + ids)
        try:
            images.stay(directory)
        except Corrupt as problem:
            assert problem.message


# What CRIU says


def test_the_first_error_that_means_something_is_the_reason() -> None:
    log = """
(00.000652) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Not permitted
(00.000700) Warn  (criu/kerndat.c:1): something
Error (compel/src/lib/ptrace.c:27): suspending seccomp failed: Operation not permitted
(00.033077)      1: Error (criu/files-reg.c:2353): Can't open file fd/1: Permission denied
(00.038517) Error (criu/cr-restore.c:2331): Restoring FAILED.
"""
    assert engine.find_problem(log) == "Can't open file fd/1: Permission denied"
    said = "pie: 3: Error (criu/pie/restorer.c:729): The message is truncated\n"
    assert engine.find_problem(said) == "The message is truncated"
    assert engine.find_problem("Error (criu/cr-dump.c:1): Dumping FAILED.\n") == ""
    assert engine.find_problem("") == ""


def test_versions_are_compared_by_number() -> None:
    assert engine.parse_version("4.10") > engine.parse_version("4.2.1") >= engine.OLDEST
    assert engine.parse_version("3.17.1") < engine.OLDEST


def criu_on_path(directory: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = directory / "criu"
    program.write_text(f"#!/bin/sh\necho 'Version: {version}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory) + os.pathsep + os.environ["PATH"])
    monkeypatch.setattr(engine, "OWN", directory / "nothing")
    monkeypatch.setattr(engine, "STAGE", program)


def test_criu_is_found_and_asked_for_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    criu_on_path(tmp_path, "4.2.1", monkeypatch)
    assert engine.find_criu() == Criu((str(tmp_path / "criu"),), "4.2.1")
    criu_on_path(tmp_path, "4.1.1", monkeypatch)
    with pytest.raises(Unsupported, match=r"CRIU 4\.1\.1 is too old"):
        engine.find_criu()
    criu_on_path(tmp_path, "none of your business", monkeypatch)
    with pytest.raises(Unsupported, match="CRIU is not installed"):
        engine.find_criu()
    criu_on_path(tmp_path, "4.2.1", monkeypatch)
    monkeypatch.setattr(engine, "STAGE", tmp_path / "_stage")
    with pytest.raises(Unsupported, match="_stage was not compiled"):
        engine.find_criu()


# What a copy cannot have

MOUNTINFO = """\
199 125 0:45 / / rw,nosuid - overlay overlay rw
184 199 0:44 /dev /dev rw,nosuid - tmpfs tmpfs rw,size=65600k
198 199 254:0 /usr /usr ro,nosuid - ext4 /dev/vda rw
200 199 0:49 / /proc rw,nosuid - proc proc rw
201 184 0:50 / /dev/pts rw,nosuid - devpts devpts rw
202 199 0:51 / /sys ro,nosuid - sysfs sysfs rw
203 200 0:52 / /proc/acpi ro - tmpfs tmpfs rw
204 200 0:6 /null /proc/keys ro - devtmpfs devtmpfs rw
207 200 0:49 /sys /proc/sys ro - proc proc rw
208 199 0:60 / /run/tabane ro - tmpfs tmpfs rw
209 199 0:61 / /a\\040b rw - tmpfs tmpfs rw
"""


def test_what_the_node_shows_is_external() -> None:
    mounts = tree.parse_mounts(MOUNTINFO)
    assert mounts[-1].point == "/a b"
    external = tree.find_external(mounts)
    assert set(external) == {"/dev", "/usr", "/proc/acpi", "/proc/keys", "/run/tabane"}
    assert [point for point in external if tree.is_file(point, mounts)] == ["/proc/keys"]


def table(*sockets: tuple[str, str]) -> str:
    rows = (f" 0: {local} 00000000:0000 {state} 0 0 0 0 0 0" for local, state in sockets)
    return "\n".join(("  sl  local_address rem_address   st", *rows)) + "\n"


def test_an_address_of_its_own_is_found() -> None:
    everywhere, loopback, own = "00000000:1F90", "0100007F:1F90", "0708090A:1F40"
    harmless = table((everywhere, "0A"), (loopback, "0A"), (own, "01"))
    assert tree.find_bound(harmless, table((everywhere, "07"))) == ""
    assert tree.find_bound(table((own, "0A")), table()) == "10.9.8.7:8000"
    assert tree.find_bound(table(), table((own, "07"))) == "10.9.8.7:8000"


def test_clocks_of_a_time_namespace() -> None:
    offsets = "monotonic           5         7\nboottime           -1 999999999\n"
    assert tree.parse_offset_ns(offsets, "monotonic") == 5_000_000_007
    assert tree.parse_offset_ns(offsets, "boottime") == -1
    assert tree.parse_offset_ns("", "boottime") == 0


def test_who_waits_for_no_child_is_between_programs() -> None:
    assert dump.find_vfork([os.getpid(), 2**22 + 1]) is None


# What is kept beside the images

OLD = Names(InstanceId("aaaaaaaaaaaa"), "/old/aaaaaaaaaaaa", "/tabane/aaaaaaaaaaaa", 41)
NEW = Names(InstanceId("bbbbbbbbbbbb"), "", "/tabane/bbbbbbbbbbbb", 52)


def record(engine_name: str = "crun") -> Saved:
    return Saved(
        engine=engine_name,
        external=("/dev",),
        files=(),
        outputs=("pipe:[1]", "pipe:[1]"),
        monotonic_ns=1,
        boottime_ns=2,
        names=OLD,
    )


def test_the_engine_is_given_the_state_of_what_it_never_started(tmp_path: Path) -> None:
    state, images_place, new = (tmp_path / name for name in ("state", "images", "new"))
    for place in (state, images_place, new):
        place.mkdir()
    status = {
        "pid": 7,
        "process-start-time": 70,
        "cgroup-path": OLD.cgroup,
        "bundle": OLD.directory,
    }
    (state / "status").write_text(json.dumps(status))
    (state / "seccomp.bpf").write_bytes(b"\0filter")
    (state / "config.json").write_text('{"old": 1}')
    (new / "config.json").write_text('{"new": 1}')
    saved.save_state(state, images_place)
    target = tmp_path / "there"
    names = Names(NEW.id, str(new), NEW.cgroup, NEW.link_pid)
    saved.write_state(record(), images_place, target, names)
    assert (target / "config.json").read_text() == '{"new": 1}'
    assert (target / "seccomp.bpf").read_bytes() == b"\0filter"
    for _ in range(2):
        saved.complete_state(target, 8, 80)
        found = json.loads((target / "status").read_text())
        assert found == {
            "pid": 8,
            "process-start-time": 80,
            "cgroup-path": NEW.cgroup,
            "bundle": str(new),
        }
    saved.complete_state(target, 9, 90)
    assert json.loads((target / "status").read_text())["pid"] == 8


def test_runc_is_told_of_cgroups_that_are_there(tmp_path: Path) -> None:
    state, images_place, there = (tmp_path / name for name in ("state", "images", "there"))
    for place in (state, images_place):
        place.mkdir()
    content = {
        "id": OLD.id,
        "init_process_pid": 7,
        "init_process_start": 70,
        "config": {"namespaces": [{"type": "NEWNET", "path": "/proc/41/ns/net"}]},
        "cgroup_paths": {"pids": str(tmp_path), "blkio": str(tmp_path / "nothing")},
        "namespace_paths": {"NEWPID": "/proc/7/ns/pid"},
    }
    (state / "state.json").write_text(json.dumps(content))
    saved.save_state(state, images_place)
    saved.write_state(record("runc"), images_place, there, NEW)
    saved.complete_state(there, 8, 80)
    assert json.loads((there / "state.json").read_text()) == {
        "id": NEW.id,
        "init_process_pid": 8,
        "init_process_start": 80,
        "config": {"namespaces": [{"type": "NEWNET", "path": "/proc/52/ns/net"}]},
        "cgroup_paths": {"pids": str(tmp_path)},
        "namespace_paths": {"NEWPID": "/proc/8/ns/pid"},
    }


def test_a_layer_is_packed_and_unpacked(tmp_path: Path) -> None:
    layer, other, images_place = (tmp_path / name for name in ("layer", "other", "images"))
    for place in (
        layer / "up/etc",
        layer / "dev/shm",
        other / "up/etc",
        other / "dev",
        images_place,
    ):
        place.mkdir(parents=True)
    (layer / "up/etc/hosts").write_text("old")
    (layer / "up/etc/app").write_text("of the app")
    (layer / "up/link").symlink_to("/etc/app")
    os.link(layer / "up/etc/app", layer / "up/hard")
    (layer / "dev/shm/shared").write_bytes(b"s")
    (other / "up/etc/hosts").write_text("new")
    saved.pack(layer, images_place)
    saved.unpack(images_place, other)
    assert (other / "up/etc/hosts").read_text() == "new"
    assert (other / "up/etc/app").read_text() == "of the app"
    assert (other / "up/link").readlink() == Path("/etc/app")
    assert (other / "up/hard").stat().st_ino == (other / "up/etc/app").stat().st_ino
    assert (other / "dev/shm/shared").read_bytes() == b"s"
    (images_place / saved.LAYER).write_bytes(b"no archive")
    with pytest.raises(EngineError, match="tar"):
        saved.unpack(images_place, other)
