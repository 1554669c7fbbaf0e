"""What QEMU's machines are like: how they are confined, what is inside, and what goes wrong."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.clock import SYSTEM
from tabane.errors import Asleep, EngineError, NotFound, TabaneError, UsageError
from tabane.model import ExitStatus, Resources, Volume
from tabane.runtimes import mounts
from tabane.runtimes.api import Image, User
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.machines import kernel
from tabane.runtimes.machines.disks import copy_sparse, disk_of, make_image_disk
from tabane.runtimes.machines.parts import INNER_ID
from tabane.runtimes.machines.sizes import OVERHEAD_BYTES, memory_for
from tabane.runtimes.process import is_same, start_ticks
from tabane.testing.containers import BUSYBOX, ID_BASE, make_tree, open_directory
from tabane.testing.drivers import PATIENCE_S, until, wait_until_said
from tabane.testing.machine_bench import MachineBench, Running, make_app
from tabane.testing.machines import make_machine
from tabane.testing.talks import fetch, make_archive, put, run_inside

pytestmark = pytest.mark.real

PANIC = "echo c > /proc/sysrq-trigger"
VOLUMES = tuple(Volume(f"v{n}", f"/srv/v{n}", 8 << 20) for n in range(7))
"""With one more, as many as an app can have."""


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def image(ground: Path) -> Image:
    return make_tree(ground)


@pytest.fixture
def bench(microvms: MachineBench) -> MachineBench:
    return microvms


async def test_a_machine(bench: MachineBench) -> None:
    """One boot for all that can be seen of one machine."""
    resources = Resources(cpu=0.75, memory_bytes=48 << 20, pids=24, disk_bytes=4 << 20)
    large = replace(VOLUMES[6], size_bytes=512 << 20)
    volumes = (Volume("data", "/tmp", 16 << 20), *VOLUMES[:6], large)
    command = ("httpd", "-f", "-p", "80", "-h", "/etc")
    app = make_app(command, port=80, resources=resources, volumes=volumes)
    async with bench.running(app) as inside:
        await asyncio.wait_for(inside.driver.wait_listening(inside.handle, 80), PATIENCE_S)
        await see_confinement(inside)
        see_limits(inside)
        await see_files(inside, bench.image)
        await see_users(inside)
        await see_network(inside)
        await see_commands(inside)
        await see_copies(inside)
        await see_processes(inside)
        await see_volumes(inside)
        await see_frost(bench, inside)
        see_what_volumes_have(inside)


async def see_confinement(inside: Running) -> None:
    """Read from /proc, of QEMU and of what stays beside it."""
    for pid in await inside.driver.processes(inside.handle):
        fields = status_of(pid)
        assert fields["Uid"].split() == [str(ID_BASE + INNER_ID)] * 4
        assert fields["Gid"].split() == [str(ID_BASE + INNER_ID)] * 4
        assert fields["Groups"].strip() == ""
        for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
            assert int(fields[f"Cap{kind}"], 16) == 0
        assert fields["NoNewPrivs"] == "1"
    qemu = inside.handle.data["pid"]
    assert isinstance(qemu, int) and inside.spec.link is not None
    assert status_of(qemu)["Seccomp"] == "2"
    for name in ("user", "net"):
        theirs = Path(f"/proc/{inside.spec.link.parked_pid}/ns/{name}").readlink()
        assert Path(f"/proc/{qemu}/ns/{name}").readlink() == theirs
    for name in ("mnt", "pid", "ipc", "uts"):
        assert (
            Path(f"/proc/{qemu}/ns/{name}").readlink() != Path(f"/proc/self/ns/{name}").readlink()
        )
    root = Path(f"/proc/{qemu}/root")
    assert {path.name for path in root.iterdir()} <= {"usr", "lib", "lib64", "vm"}
    assert {path.name for path in (root / "vm").iterdir()} == {
        *("vmlinux", "initramfs", "image0", "layer", "start")
    }
    lines = Path(f"/proc/{qemu}/mountinfo").read_text().splitlines()
    writable = [line.split()[4] for line in lines if "ro" not in line.split()[5].split(",")]
    assert writable == ["/vm/layer"]
    assert all("nosuid" in line.split()[5] for line in lines)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def see_limits(inside: Running) -> None:
    resources = inside.spec.app.resources
    found = Cgroup(inside.spec.cgroup).limits()
    assert found["cpu"] == resources.cpu
    assert found["memory_bytes"] == memory_for(resources.memory_bytes) + OVERHEAD_BYTES
    assert 64 < found["pids"] < 128


async def see_files(inside: Running, image: Image) -> None:
    assert sorted((await inside.run("ls /")).split()) == sorted(
        path.name for path in image.tree.iterdir()
    )
    before = await inside.run("stat -c '%u:%g %a' / /etc /tmp /bin/busybox /dev/shm")
    assert before.splitlines() == ["0:0 755", "0:0 755", "0:0 1777", "0:0 755", "0:0 1777"]
    await inside.run("echo changed > /bin/echo2; echo new > /new; rm /bin/wc")
    assert await inside.run("cat /bin/echo2 /new; ls /bin/wc") == (
        "changed\nnew\nls: /bin/wc: No such file or directory\n"
    )
    assert (image.tree / "bin/wc").is_symlink() and not (image.tree / "bin/echo2").exists()
    assert await inside.run("dd if=/dev/zero of=/big bs=1M count=3 2>/dev/null; echo $?") == "0\n"
    assert "No space left" in await inside.run("dd if=/dev/zero of=/more bs=1M count=4")
    assert "No space left" in await inside.run("dd if=/dev/zero of=/dev/shm/more bs=1M count=4")
    await inside.run("rm /big /more /dev/shm/more")
    assert "not permitted" in await inside.run("busybox mknod /tmp/vda b 254 0 2>&1")
    assert "permission denied" in await inside.run("mount -t tmpfs none /tmp")
    assert "Read-only" in await inside.run("echo 1 > /sys/kernel/mm/ksm/run")
    names = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert " ".join(sorted((await inside.run("ls /dev")).split())) == names
    assert await inside.run("echo said >/dev/stderr") == "said\n"


async def see_users(inside: Running) -> None:
    fields = await inside.run("grep -E 'Cap|NoNew' /proc/self/status")
    assert "NoNewPrivs:\t1" in fields and "CapBnd:\t00000000800005fb" in fields
    assert "CapEff:\t00000000800005fb" in fields
    web = await inside.run(
        "id -u; id -g; id -G; grep CapEff /proc/self/status", User(33, 34, (44,))
    )
    assert web == "33\n34\n34 44\nCapEff:\t0000000000000000\n"
    fork = "for i in $(busybox seq 40); do sleep 100 & done; echo all"
    assert "can't fork" in await inside.run(fork)
    killed = await run_inside(inside.driver, inside.handle, ("busybox", "killall", "sleep"))
    assert killed.code == 0


async def see_network(inside: Running) -> None:
    link = inside.spec.link
    assert link is not None
    reader, writer = await asyncio.open_connection(link.address, 80)
    writer.write(b"GET /hostname HTTP/1.0\r\n\r\n")
    assert (await reader.read()).endswith(f"{inside.spec.id}\n".encode())
    writer.close()
    assert await inside.run("cat /etc/resolv.conf") == f"nameserver {link.gateway}\n"
    assert await inside.run("hostname") == f"{inside.spec.id}\n"
    assert f"{link.address} {inside.spec.id}\n" in await inside.run("cat /etc/hosts")
    listening = asyncio.ensure_future(inside.driver.wait_listening(inside.handle, 4321))
    await asyncio.wait([listening], timeout=0.1)
    assert not listening.done()
    listening.cancel()
    await asyncio.wait([listening])


async def see_commands(inside: Running) -> None:
    """Much output waits for who reads it, and holds up nobody else."""
    many = "for i in 1 2 3 4; do cat /bin/busybox; done"
    slow = await run_inside(inside.driver, inside.handle, ("sh", "-c", many))
    assert slow.stdout == BUSYBOX.resolve().read_bytes() * 4
    given = os.urandom(300_000)
    echoed = await run_inside(inside.driver, inside.handle, ("cat",), given=[given])
    assert echoed.stdout == given
    with pytest.raises(UsageError, match="there is no directory /nowhere in the instance"):
        await run_inside(inside.driver, inside.handle, ("true",), workdir="/nowhere")
    refused_one = await run_inside(inside.driver, inside.handle, ("/etc/passwd",))
    assert (refused_one.code, refused_one.stderr) == (126, b"/etc/passwd: cannot be executed\n")


async def see_copies(inside: Running) -> None:
    driver, handle = inside.driver, inside.handle
    await inside.run("mkdir -p /tmp/d/below; ln -s below /tmp/d/link; echo x > /tmp/d/ümlaut")
    long = "n" * 120
    await inside.run(f"echo long > /tmp/d/{long}; busybox truncate -s 3M /tmp/d/holes")
    out = await fetch(driver, handle, "/tmp/d")
    assert (out.code, out.stderr) == (0, b"")
    assert len(out.stdout) < 100_000
    with tarfile.open(fileobj=io.BytesIO(out.stdout)) as tar:
        found = {info.name: info for info in tar}
        assert found["d/link"].linkname == "below" and found["d/below"].isdir()
        assert found["d/holes"].size == 3 << 20 and f"d/{long}" in found
    back = await put(driver, handle, "/tmp/e", out.stdout, as_named=True)
    assert back == (0, b"", b"")
    assert await inside.run(f"cat /tmp/e/{long}; stat -c %s /tmp/e/holes") == "long\n3145728\n"
    assert await inside.run("busybox readlink /tmp/e/link") == "below\n"
    outside = make_archive({"../etc/passwd": b"mine"})
    ended = await put(driver, handle, "/tmp", outside)
    assert ended.code == 1 and b"outside of it" in ended.stderr
    for archive in (b"no archive at all" * 60, make_archive({"a": b"1" * 2000})[:700]):
        ended = await put(driver, handle, "/tmp", archive)
        assert ended.code == 1 and (b"broken" in ended.stderr or b"breaks off" in ended.stderr)
    ended = await put(driver, handle, "/tmp/no/such", make_archive({"a": b""}), as_named=True)
    assert (ended.code, ended.stderr) == (1, b"/tmp/no: No such file or directory\n")
    ended = await put(driver, handle, "/etc/its", make_archive({"a": b""}), user=User(33, 34))
    assert ended.code == 1 and b"No such file" in ended.stderr
    ended = await put(driver, handle, "/srv", make_archive({"a": b""}), user=User(33, 34))
    assert (ended.code, ended.stderr) == (1, b"a: Permission denied\n")


async def see_processes(inside: Running) -> None:
    """Those of the machine: its agent, the first in the container, the program. Inside, the agent
    is not to be seen."""
    found = await inside.driver.guest_processes(inside.handle)
    assert [(one.pid == 1, one.ppid) for one in found if one.name == "init"] == [
        *((True, 0), (False, 1))
    ]
    (httpd,) = [one for one in found if one.name == "httpd"]
    assert (httpd.ppid, httpd.uid, httpd.command) == (1, 0, "httpd -f -p 80 -h /etc")
    assert httpd.container == ""
    assert httpd.rss_kib > 0 and httpd.elapsed_s > 0 and httpd.start_ticks > 0
    assert not any(process.ppid == 2 for process in found)
    stats = await inside.driver.stats(inside.handle)
    assert stats.pids < 10 and stats.memory_bytes > 32 << 20


async def see_volumes(inside: Running) -> None:
    """They have a quota of their own, and are for files only; their files are nobody else's."""
    own = "grep -c 'nosuid,nodev,relatime - ext4' /proc/self/mountinfo"
    assert await inside.run(own) == "8\n"
    assert await inside.run("stat -c '%u:%g %a' /srv/v0 /tmp") == "0:0 755\n0:0 1777\n"
    assert "No space left" in await inside.run("dd if=/dev/zero of=/tmp/big bs=1M count=16")
    assert "can't create" in await inside.run("echo mine > /srv/v6/file", User(33, 34))
    assert await inside.run("rm -rf /tmp/*; echo kept > /srv/v6/file; ls /srv/v0 /srv/v5") == (
        "/srv/v0:\n\n/srv/v5:\n"
    )
    await inside.run("busybox fallocate -l 300M /srv/v6/large")
    far = "dd if=/bin/busybox of=/srv/v6/large bs=1M seek=290 count=1 conv=notrunc,fsync"
    assert await inside.run(f"{far} 2>/dev/null; echo $?") == "0\n"
    for storage in inside.spec.volumes:
        status = storage.file.stat()
        assert (status.st_uid, status.st_mode & 0o777) == (0, 0o600)
    held = "(sleep 1000 > /srv/v5/held 2>&1 &)"
    assert await inside.run(held) == ""


def see_what_volumes_have(inside: Running) -> None:
    """When the machine has ended: all that was written, in a file system that was closed."""
    for storage in inside.spec.volumes:
        told = read_disk(storage.file, "stats")
        assert "Filesystem state:         clean" in told and "needs_recovery" not in told
    assert read_disk(inside.spec.volumes[7].file, "cat data/file") == "kept\n"


def read_disk(file: Path, request: str) -> str:
    """Of a disk that nobody has mounted."""
    argv = ("/usr/sbin/debugfs", "-R", request, str(file))
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def read_again(file: Path, request: str) -> str:
    """Of a disk whose machine was cut off."""
    done = subprocess.run(("/usr/sbin/e2fsck", "-p", str(file)), capture_output=True)
    assert b"recovering journal" in done.stdout and done.returncode in (0, 1)
    return read_disk(file, request)


async def see_frost(bench: MachineBench, inside: Running) -> None:
    """Nobody waits for a guest that stands still; thawed, it has the right time again. The next
    agent knows that it stands still."""
    await inside.driver.freeze(inside.handle)
    assert (await inside.driver.stats(inside.handle)).memory_bytes > 0
    with pytest.raises(Asleep, match="is frozen: thaw it first"):
        await run_inside(inside.driver, inside.handle, ("true",))
    again = bench.restarted()
    found = await again.recover(inside.spec, inside.handle)
    assert found == inside.handle
    with pytest.raises(Asleep):
        await again.guest_processes(found)
    await again.thaw(found)
    before = int(SYSTEM.wall())
    date = await run_inside(again, found, ("busybox", "date", "+%s"))
    assert before - 1 <= int(date.stdout) <= SYSTEM.wall() + 1
    await again.stop(found, PATIENCE_S)
    assert await again.wait(found) == ExitStatus(signal=signal.SIGTERM)


async def test_all_output_is_in_the_log(bench: MachineBench) -> None:
    """Whatever is under way when the program ends, from both of its streams."""
    script = "busybox seq 60000; echo problem >&2; exit 7"
    async with bench.running(make_app(("sh", "-c", script))) as inside:
        status, log = await inside.end()
        assert status == ExitStatus(7)
        numbers = [line for line in log.splitlines() if line.isdecimal()]
        assert numbers == [str(n) for n in range(1, 60001)]
        assert "problem" in log


async def test_a_boot_goes_on_without_the_agent(bench: MachineBench) -> None:
    """The next one finds a machine that had not got to its program yet."""
    async with bench.prepared(make_app(("httpd", "-f", "-p", "8000"))) as (spec, handle):
        start = asyncio.ensure_future(bench.driver.start(spec, handle))
        await until_there(spec.directory / "pid")
        start.cancel()
        await asyncio.wait([start])
        again = bench.restarted()
        found = await again.recover(spec, handle)
        assert found is not None and found.data["pid"]
        await asyncio.wait_for(again.wait_listening(handle, 8000), PATIENCE_S)
        await again.stop(found, PATIENCE_S)
        assert await again.wait(found) == ExitStatus(signal=signal.SIGTERM)


async def until_there(path: Path) -> None:
    async def there() -> bool:
        return path.exists() and path.stat().st_size > 0

    await until(there)


async def test_a_kernel_that_panics(bench: MachineBench) -> None:
    script = f"until [ -e /now ]; do sleep 0.1; done; {PANIC}"
    async with bench.running(make_app(("sh", "-c", script))) as inside:
        with suppress(TabaneError):  # it may panic before that command ends
            await inside.run("busybox touch /now")
        status, log = await asyncio.wait_for(inside.end(), PATIENCE_S)
        why = "Kernel panic - not syncing: sysrq triggered crash"
        assert status == ExitStatus(255, reason=f"its machine went down: {why}")
        assert "Kernel panic" in log
        with pytest.raises(NotFound):
            await inside.driver.stats(inside.handle)


async def test_a_kernel_that_panics_at_its_start(
    bench: MachineBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a first program that cannot be executed."""
    (tmp_path / "agent").write_text("no program")
    monkeypatch.setattr(kernel, "AGENT", tmp_path / "agent")
    async with bench.prepared(make_app()) as (spec, handle):
        with pytest.raises(EngineError, match="Kernel panic - not syncing: ") as failure:
            await bench.driver.start(spec, handle)
        assert failure.value.status == 255


async def test_a_guest_that_never_answers(
    bench: MachineBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start is given up by who waits; asked to stop, it is killed."""
    monkeypatch.setattr(kernel, "AGENT", BUSYBOX.resolve())
    async with bench.prepared(make_app()) as (spec, handle):
        start = asyncio.ensure_future(bench.driver.start(spec, handle))
        await until_there(spec.directory / "pid")
        await asyncio.wait([start], timeout=1)
        assert not start.done()
        start.cancel()
        await asyncio.wait([start])
        found = await bench.driver.recover(spec, handle)
        assert found is not None
        await bench.driver.stop(found, 0.2)
        assert await bench.driver.wait(found) == ExitStatus(signal=signal.SIGKILL)


@pytest.mark.parametrize("victim", ["qemu", "confine"])
async def test_killed_in_the_middle_of_a_start(bench: MachineBench, victim: str) -> None:
    async with bench.prepared(make_app()) as (spec, handle):
        start = asyncio.ensure_future(bench.driver.start(spec, handle))
        await until_there(spec.directory / "pid")
        qemu = int((spec.directory / "pid").read_text())
        began = start_ticks(qemu)
        other = int(status_of(qemu)["PPid"])
        os.kill(qemu if victim == "qemu" else other, signal.SIGKILL)
        with pytest.raises(EngineError, match="killed by SIGKILL") as failure:
            await start
        assert failure.value.status

        async def gone() -> bool:
            return not is_same(qemu, began)

        await until(gone)


async def test_killed_in_the_middle_of_a_stop(bench: MachineBench) -> None:
    """Gone with it is what the program wrote and did not ask to be on the disk, no more."""
    script = "trap 'echo deaf' TERM; echo kept > /srv/v0/file; busybox sync; echo ready"
    script += "; while :; do sleep 0.05; done"
    async with bench.running(make_app(("sh", "-c", script), volumes=VOLUMES[:1])) as inside:
        await wait_until_said(inside.spec, b"ready")
        stop = asyncio.ensure_future(inside.driver.stop(inside.handle, PATIENCE_S))

        async def heard() -> bool:
            return "deaf" in inside.spec.log.read_text()

        await until(heard)
        os.kill(int(str(inside.handle.data["pid"])), signal.SIGKILL)
        await asyncio.wait_for(stop, 60)
        assert await inside.driver.wait(inside.handle) == ExitStatus(signal=signal.SIGKILL)
        (storage,) = inside.spec.volumes
        assert read_again(storage.file, "cat data/file") == "kept\n"


async def test_a_volume_on_a_full_disk_of_the_node(bench: MachineBench, tmp_path: Path) -> None:
    """The program is told, and its machine neither stands still nor is in the way of its end."""
    app = make_app(("sleep", "1000"), volumes=VOLUMES[:1])
    async with make_machine(bench.ground, bench.image, app) as spec:
        mounts.mount("tmpfs", tmp_path, "size=3m")
        (storage,) = spec.volumes
        small = replace(storage, file=tmp_path / "volume.ext4")
        copy_sparse(storage.file, small.file)
        spec = replace(spec, volumes=(small,))
        handle = await bench.driver.prepare(spec)
        try:
            handle = await bench.driver.start(spec, handle)
            inside = Running(bench.driver, spec, handle)
            fill = "dd if=/dev/zero of=/srv/v0/file bs=1M count=6 conv=fsync"
            assert "Input/output error" in await inside.run(fill)
            await bench.driver.stop(handle, PATIENCE_S)
            assert (await inside.end())[0] == ExitStatus(signal=signal.SIGTERM)
        finally:
            await bench.driver.destroy(handle)
            mounts.unmount(tmp_path)
        assert bench.left_of(spec) == []


async def test_disks_that_are_broken(bench: MachineBench, ground: Path) -> None:
    """Cut short, an image's disk is made anew; what a guest cannot read, its agent says."""
    place = ground / "other"
    place.mkdir()
    tree = make_tree(place).tree
    broken = Image("sha256:" + "5" * 64, tree, cmd=("sleep", "1000"))
    await make_image_disk(tree)
    whole = disk_of(tree).stat().st_size
    disk_of(tree).chmod(0o644)
    os.truncate(disk_of(tree), whole // 2)
    async with bench.prepared(make_app(name="other"), broken) as (spec, handle):
        assert disk_of(tree).stat().st_size == whole
        disk_of(tree).chmod(0o644)
        with disk_of(tree).open("r+b") as file:
            file.write(bytes(64 << 10))
        with pytest.raises(EngineError, match=r"cannot mount /dev/vd. on /pod/image0: ") as failure:
            await bench.driver.start(spec, handle)
        assert failure.value.output.endswith("Invalid argument")
